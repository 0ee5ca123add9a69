"""diffusers pipelines as links of the chain: each gives what the pipeline itself gives."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLPipeline,
)
from network_pipelines import PIPELINES
from peft import LoraConfig, inject_adapter_in_model
from small_pipeline import close
from tiny_pipelines import inpainting

from libs.build import make_denoiser
from libs.config import load
from libs.defaults import base_config
from libs.denoiser import guided
from libs.distillation.flash import Flash
from libs.distillation.flash_stages import read_stages
from libs.distillation.teacher_features import TeacherFeatures, feature_shape
from libs.errors import UserError
from libs.heads.discriminator import make_discriminator
from libs.lora import AdaptersOff, add_lora
from libs.methods import flash
from libs.pipelines.flash_settings import FLASH
from libs.pipelines.model import PipelineModel, describe_scheduler, load_pipeline_model
from libs.policies.sites import unwrap
from libs.samplers.ddim import ddim
from libs.schedule import make_schedule, time_grid
from libs.training.batches import Batch

TEXTS = ["a cat", "the red sea"]
STEPS, GUIDANCE = 3, 4.0
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vocabularies")


@pytest.fixture(params=list(PIPELINES))
def pipe(request, folder):
    return PIPELINES[request.param](folder)


@pytest.fixture(params=["sd15", "sdxl", "pixart", "sd3"])
def family(request, folder):
    """One pipeline for each network and each way to encode texts."""
    return PIPELINES[request.param](folder)


def with_ddim(pipe, **options):
    """The pipeline with the sampler that ours is compared with; one that matches flows keeps Euler's."""
    if not type(pipe.scheduler).__name__.startswith("FlowMatch"):
        given = {"clip_sample": False, "set_alpha_to_one": True, "steps_offset": 0} | options
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **given)
    return pipe


def edges(rows: int = 2):
    """White lines on black, uint8 (b, 32, 32, 1)."""
    return 255 * (torch.rand(rows, 32, 32, 1, generator=torch.Generator().manual_seed(4)) < 0.2).to(torch.uint8)


def called(pipe, **options):
    """What the pipeline's own call makes of TEXTS and of the noise x_T(); 32 x 32 pixels."""
    name = type(pipe).__name__
    if name == "PixArtAlphaPipeline":
        options |= {"use_resolution_binning": False, "clean_caption": False}
    if hasattr(pipe, "adapter"):
        image = edges().permute(0, 3, 1, 2).float() / 255
        options |= {"image": image.expand(-1, pipe.adapter.config.in_channels, -1, -1),
                    "adapter_conditioning_scale": 0.8}
    given = {"output_type": "latent", "guidance_scale": GUIDANCE, **options}
    return pipe(TEXTS, height=32, width=32, num_inference_steps=STEPS, latents=x_T(), **given).images


def x_T():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def conditions(model):
    cond = model.encode(TEXTS)
    return cond | model.adapt(edges()) if hasattr(model.pipe, "adapter") else cond


def own_times(pipe, schedule):
    """The times (STEPS + 1,) of the pipeline's scheduler, on our scale of t."""
    if hasattr(pipe.scheduler, "sigmas"):
        pipe.scheduler.set_timesteps(STEPS)
        sigma = pipe.scheduler.sigmas.double()
        return schedule.t_of_lambda(torch.log((1 - sigma) / sigma))
    pipe.scheduler.set_timesteps(STEPS)
    return torch.cat([(pipe.scheduler.timesteps.double() + 1) / 1000, torch.zeros(1, dtype=torch.float64)])


@torch.no_grad()
def sampled(model, ts, cond=None, null=None):
    denoiser = make_denoiser(model.net, model.description)
    cond = cond or conditions(model)
    denoise = guided(denoiser, GUIDANCE, null or model.null(cond))
    return ddim(lambda x, t: denoise(x, t, cond), x_T(), ts, denoiser.schedule)


def test_our_sampler_makes_the_pipelines_own_latents(pipe):
    """Network, times, prediction, texts, unconditional texts, sizes and adapter features are all the pipeline's."""
    expected = called(with_ddim(pipe))
    model = PipelineModel(pipe, image_size=32, adapter_scale=0.8)
    ts = own_times(pipe, make_schedule(**model.description["schedule"]))
    assert close(sampled(model, ts), expected, 1e-4)
    cond = conditions(model)
    assert not close(sampled(model, ts, cond, cond), expected, 1e-2)  # a wrong unconditional does show


def test_a_negative_prompt_takes_the_place_of_the_unconditional(family):
    expected = called(with_ddim(family), negative_prompt=["a blurry photo"] * 2)
    model = PipelineModel(family, negative_prompt="a blurry photo", image_size=32)
    ts = own_times(family, make_schedule(**model.description["schedule"]))
    assert close(sampled(model, ts), expected, 1e-4)


def test_the_unconditional_of_each_family(folder):
    names = ("sd15", "sdxl", "sdxl_adapter", "pixart", "sd3")
    models = {name: PipelineModel(PIPELINES[name](folder)) for name in names}
    for name, model in models.items():
        cond = conditions(model)
        null = model.null(cond)
        assert null.keys() == cond.keys()
        assert all(null[key].shape == value.shape and null[key].dtype == value.dtype for key, value in cond.items())
        empty = {**model.encode([""] * 2), **{key: cond[key] for key in cond if key.startswith("adapter")}}
        of_text = {"context", "pooled"} & cond.keys()
        if name.startswith("sdxl"):  # force_zeros_for_empty_prompt
            assert not any(null[key].any() for key in of_text)
            assert all(empty[key].any() for key in of_text)
        else:
            assert all(close(null[key], empty[key]) for key in of_text)
        for key in cond.keys() - of_text - {"mask"}:  # sizes and adapter features guide nothing
            assert torch.equal(null[key], cond[key])
    pixart = models["pixart"]
    cond = pixart.encode(TEXTS)
    assert cond["mask"].sum(1).tolist() == [3, 4]  # tokens and the end of the text
    assert pixart.null(cond)["mask"].sum(1).tolist() == [1, 1]


def test_a_text_does_not_depend_on_its_company(family):
    model = PipelineModel(family)
    texts = ["a cat", "the red sea", "a dog", "a photo of the sea", "", "a red dog"]
    together = model.encode(texts)
    for i, text in enumerate(texts):
        assert all(torch.equal(together[name][i], value[0]) for name, value in model.encode([text]).items())


def test_texts_are_encoded_once_and_the_encoders_leave(family):
    model = PipelineModel(family)
    cond = model.encode(TEXTS)
    before = model.null(cond)
    assert not any(value.requires_grad for value in cond.values())
    model.encoders_to("meta")
    assert {each.device.type for each in model.net.parameters()} == {"cpu"}
    assert {each.device.type for each in family.text_encoder.parameters()} == {"meta"}
    assert all(torch.equal(value, before[name]) for name, value in model.null(cond).items())


def test_sizes(folder):
    model = PipelineModel(PIPELINES["sdxl"](folder))
    assert model.encode(TEXTS)["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 2
    other = torch.tensor([[64.0, 48, 3, 5, 32, 32]]).repeat(2, 1)
    expected = called(with_ddim(model.pipe), original_size=(64, 48), crops_coords_top_left=(3, 5))
    ts = own_times(model.pipe, make_schedule(**model.description["schedule"]))
    assert close(sampled(model, ts, model.encode(TEXTS, time_ids=other)), expected, 1e-4)
    assert not close(sampled(model, ts), expected, 1e-3)
    pixart = PipelineModel(PIPELINES["pixart"](folder), image_size=64)
    assert pixart.encode(TEXTS)["resolution"].tolist() == [[64, 64]] * 2
    assert pixart.description["image"] == {"size": 64, "channels": 3}
    assert "resolution" not in PipelineModel(PIPELINES["pixart"](folder, sample_size=32)).encode(TEXTS)


def test_the_learned_variance_of_pixart_is_left_out(folder):
    model = PipelineModel(PIPELINES["pixart"](folder))
    assert model.net.inner.config.out_channels == 8
    assert model.net(x_T(), torch.full((2,), 500.0), **model.encode(TEXTS)).shape == (2, 4, 8, 8)


@torch.no_grad()
def test_adapter_features_are_not_changed(folder):
    for name in ("sd15_adapter", "sdxl_adapter"):
        model = PipelineModel(PIPELINES[name](folder))
        cond = conditions(model)
        held = {key: value.clone() for key, value in cond.items()}
        out = model.net(x_T(), torch.full((2,), 500.0), **cond)
        assert torch.equal(out, model.net(x_T(), torch.full((2,), 500.0), **cond))
        assert all(torch.equal(value, held[key]) for key, value in cond.items())
        features = [key for key in cond if key.startswith("adapter")]
        without = {key: value for key, value in cond.items() if key not in features}
        assert not close(out, model.net(x_T(), torch.full((2,), 500.0), **without), 1e-3)
        half = PipelineModel(model.pipe, adapter_scale=0.5).adapt(edges())
        assert all(torch.equal(half[key], 0.5 * cond[key]) for key in features)


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_the_codec_is_the_pipelines_autoencoder(folder, name):
    pipe = with_ddim(PIPELINES[name](folder))
    model, config = PipelineModel(pipe), pipe.vae.config
    shift = {"sd15": 0.0, "sd3": 0.0609}[name]
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    noise = torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        latents = pipe.vae.encode(pipe.image_processor.preprocess(images.permute(0, 3, 1, 2).float() / 255)).latent_dist
    for z, x in ((latents.mean, model.codec.encode(images)),
                 (latents.mean + latents.std * noise, model.codec.encode(images, noise))):
        assert close(x, (z - shift) * config.scaling_factor)
    assert model.codec.latent_shape(32, 3) == (4, 8, 8)
    shown = called(pipe, output_type="pt", guidance_scale=1.0).permute(0, 2, 3, 1)
    decoded = model.codec.decode(called(pipe, guidance_scale=1.0))
    assert (decoded.int() - (shown * 255).round().int()).abs().max() <= 1
    assert decoded.float().std() > 1


def test_a_codec_with_statistics_of_each_channel(folder):
    pipe = with_ddim(PIPELINES["sdxl"](folder))
    pipe.vae.register_to_config(latents_mean=[-1.6, 0.4, 1.2, 0.1], latents_std=[8.4, 5.2, 3.7, 6.1])
    shown = called(pipe, output_type="pt").permute(0, 2, 3, 1)
    codec = PipelineModel(pipe).codec
    assert (codec.decode(called(pipe)).int() - (shown * 255).round().int()).abs().max() <= 1
    z = torch.randn(2, 8, 8, 8)
    assert close(codec.encode_moments(z), (z[:, :4] - codec.shift) * codec.scale_factor)


@pytest.mark.parametrize("name", ["sd15_adapter", "sdxl_adapter", "pixart", "sd3"])
def test_gradients_reach_every_lora_and_nothing_else(name, folder):
    pipe = PIPELINES[name](folder)
    model = PipelineModel(pipe)
    model.net.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=ATTENTION, init_lora_weights="gaussian"), model.net)
    cond = conditions(model)
    denoiser = make_denoiser(model.net, model.description)
    x_0, eps, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.75], dtype=torch.float64)
    denoiser.loss(x_0, eps, t, cond).sum().backward()
    trained = {name for name, each in model.net.named_parameters() if each.grad is not None}
    loras = {name for name, _ in model.net.named_parameters() if ".lora_" in name}
    assert trained == loras != set()
    assert all(each.grad.abs().max() > 0 for name, each in model.net.named_parameters() if ".lora_B" in name)
    assert all(name.startswith(model.net.part + ".") for name in loras)  # as pipelines name them
    assert not any(each.requires_grad for each in [*pipe.vae.parameters(), *pipe.text_encoder.parameters()])


def test_flash_distils_every_family(family):
    """All three losses, with gradients for the LoRA and the discriminator and for nothing else."""
    name = {"StableDiffusionPipeline": "sd15", "StableDiffusionXLPipeline": "sdxl", "PixArtAlphaPipeline": "pixart",
            "StableDiffusion3Pipeline": "sd3"}[type(family).__name__]
    config = base_config()
    flash(config, **FLASH[name] | {"teacher_steps": "4", "stage_updates": "1,1,1,1", "discriminator_width": 4})
    section, model = config.distill, PipelineModel(family, negative_prompt=FLASH[name]["negative_prompt"])
    add_lora(model.net, rank=2, alpha=section.lora_alpha)
    teacher = make_denoiser(AdaptersOff(model.net), model.description)
    student = make_denoiser(model.net, model.description)
    discriminator = make_discriminator(section, *feature_shape(model.net, (4, 8, 8)))
    objective = Flash(read_stages(section), teacher, model.null, TeacherFeatures(teacher, model.net), discriminator,
                      section)
    batch = Batch(x_T(), model.encode(TEXTS), torch.arange(2), seed=0, step=3)  # of the last stage
    loss = objective(student, batch)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert set(objective.terms) == {"distil", "dmd", "adversarial", "discriminator"}
    reached = {name for name, each in model.net.named_parameters() if each.grad is not None}
    assert reached == {name for name, _ in model.net.named_parameters() if ".lora_" in name}
    assert sum(each.grad.abs().sum() for each in model.net.parameters() if each.grad is not None) > 0
    assert all(each.grad.abs().sum() > 0 for each in discriminator.parameters())


def test_checkpointing_and_half_precision(family):
    model = PipelineModel(family)
    cond, times = conditions(model), torch.full((2,), 500.0)
    out = model.net(x_T(), times, **cond).detach()
    model.net.train().enable_gradient_checkpointing()
    assert any(getattr(each, "gradient_checkpointing", False) for each in model.net.modules())
    assert close(model.net(x_T(), times, **cond).detach(), out)
    half = model.net.eval().to(torch.bfloat16)(x_T(), times, **cond)
    assert half.dtype == torch.bfloat16
    assert close(half.detach().float(), out, 0.05)


def test_the_network_inside_is_found(family):
    """By policies and by all that hooks blocks."""
    model = PipelineModel(family)
    assert unwrap(model.net) is model.net.inner is getattr(family, model.net.part)
    assert set(model.net.state_dict()) == {f"{model.net.part}.{name}" for name in model.net.inner.state_dict()}


@pytest.mark.parametrize(("beta_schedule", "prediction"), [("scaled_linear", "v_prediction"), ("linear", "epsilon"),
                                                           ("squaredcos_cap_v2", "sample")])
def test_schedules_are_the_schedulers(beta_schedule, prediction):
    scheduler = DDPMScheduler(beta_start=0.001, beta_end=0.015, beta_schedule=beta_schedule, num_train_timesteps=500,
                              prediction_type=prediction)
    schedule, denoiser = describe_scheduler(scheduler)
    schedule = make_schedule(**schedule)
    t = torch.arange(1, 501, dtype=torch.float64) / 500
    assert torch.allclose(schedule.alpha(t) ** 2, scheduler.alphas_cumprod.double(), rtol=1e-4)
    assert denoiser == {"prediction": {"v_prediction": "v", "epsilon": "eps", "sample": "x_0"}[prediction],
                        "time_input": "index"}


def test_a_shifted_flow():
    """sigma is diffusers' at every time, and all that samplers know of the path follows from it."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    section, denoiser = describe_scheduler(scheduler)
    schedule = make_schedule(**section)
    t = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    assert torch.allclose(schedule.sigma(t), scheduler.sigmas.double(), atol=1e-6)
    assert denoiser == {"prediction": "flow", "time_input": "1000sigma", "time_scale": 1.0}
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64).requires_grad_()
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert torch.allclose(alpha + sigma, torch.ones_like(sigma))
    assert torch.allclose(schedule.t_of_lambda(schedule.lambda_(t)), t)
    drift, = torch.autograd.grad(alpha.log().sum(), t, retain_graph=True)
    variance, = torch.autograd.grad((sigma**2).sum(), t)
    assert torch.allclose(schedule.drift(t), drift)
    assert torch.allclose(schedule.diffusion2(t), variance - 2 * drift * sigma.detach() ** 2)
    assert time_grid("uniform", 4, schedule).tolist() == [1, 0.75, 0.5, 0.25, 0]  # at sigma = 1, 0.9, 0.75, 0.5


def refused(*fragments, call):
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert all(fragment in text for fragment in fragments), text


def test_what_is_not_supported(folder):
    pipe, _ = inpainting()
    assert isinstance(pipe, StableDiffusionInpaintPipeline)
    refused("pipeline class='StableDiffusionInpaintPipeline' is unknown", "StableDiffusionXLPipeline",
            "PixArtAlphaPipeline", "StableDiffusion3Pipeline", call=lambda: PipelineModel(pipe))
    for scheduler, fragment in ((EDMEulerScheduler(), "EDMEulerScheduler: beta_schedule=None is unknown; choose from"),
                                (DDIMScheduler(rescale_betas_zero_snr=True), "rescale_betas_zero_snr=True is not"),
                                (DDIMScheduler(trained_betas=[0.1] * 10), "trained_betas=[0.1, "),
                                (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting")):
        refused(fragment, call=lambda scheduler=scheduler: describe_scheduler(scheduler))
    wrong = PIPELINES["sd15"](folder)
    wrong.scheduler = EDMEulerScheduler()
    refused("EDMEulerScheduler", call=lambda: PipelineModel(wrong))


def test_a_model_from_a_folder(folder, tmp_path):
    saved = PIPELINES["sdxl"](folder)
    saved.save_pretrained(tmp_path)
    section = load("configs/sdxl.py").pipeline.to_dict() | {"path": str(tmp_path)}
    model = load_pipeline_model(section)
    assert isinstance(model.pipe, StableDiffusionXLPipeline)
    assert model.description["backbone"] == {"name": "pipeline", "class": "StableDiffusionXLPipeline",
                                             "path": str(tmp_path)}
    ours, theirs = model.encode(TEXTS), PipelineModel(saved).encode(TEXTS)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    half = load_pipeline_model({**section, "height": 64, "width": 64}, dtype=torch.bfloat16)
    assert half.encode(TEXTS)["context"].dtype == torch.bfloat16
    assert half.image_size == 64
    vae = saved.vae.state_dict()
    assert all(torch.equal(value, vae[name]) for name, value in half.codec.vae.state_dict().items())
    assert half.codec.decode(torch.zeros(1, 4, 8, 8)).shape == (1, 32, 32, 3)
    refused("pipeline.height=64, pipeline.width=32",
            call=lambda: load_pipeline_model({**section, "height": 64, "width": 32}))
    for name in ("sd15", "sd3"):
        refused("holds a StableDiffusionXLPipeline, not a StableDiffusion", "sdxl (StableDiffusionXLPipeline)",
                call=lambda name=name: load_pipeline_model({**section, "name": name}))
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionXLPipeline", FluxPipeline.__name__))
    refused("holds a FluxPipeline", call=lambda: load_pipeline_model({**section, "name": "pixart"}))


def test_published_settings():
    """They make four stages, and grids that the modes of the starts fit."""
    assert set(FLASH) == {"sd15", "sdxl", "sdxl_adapter", "pixart", "sd3"}
    for name, settings in FLASH.items():
        config = base_config()
        flash(config, **settings)
        stages = read_stages(config.distill)
        assert sum(stage.updates for stage in stages) == config.train.steps
        assert [len(stage.start_probabilities) for stage in stages] == [16 if name in ("pixart", "sdxl_adapter")
                                                                        else 32] * 4
        assert [stage.dmd for stage in stages] == [0, 0.3, 0.5, 0.7]
        assert all(1 < stage.guidance[0] < stage.guidance[1] for stage in stages)
        assert config.train.lr == config.distill.discriminator_lr == 1e-5
        assert load(f"configs/{name}.py:flash").data.flip is False  # a picture and its caption stay as they are

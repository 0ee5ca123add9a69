"""Students as files: what is written loads by everybody's tools and by `load_student`, which sets all at once."""

import copy
import functools
import json
import shutil

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, FlowMatchLCMScheduler, LCMScheduler
from network_pipelines import PIPELINES
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_pipelines import unet2d

from libs.backbones import UViT
from libs.errors import UserError
from libs.lora import add_lora, lora_state, merge_lora
from libs.pipelines import load_student, save_student
from libs.pipelines.student import pick

MODES = [999, 749, 499, 249]
SIGMAS = [1000, 900, 750, 500]  # 1000 sigma of t = 1, 3/4, 1/2, 1/4 with SD3's shift of 3
FAMILIES = ("sd15", "sdxl", "pixart", "sd3")
every = pytest.mark.parametrize("name", FAMILIES)
PROMPT = "a cat"
PEFT = "base_model.model."


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """name -> a fresh pipeline."""
    pipes = {name: PIPELINES[name](tmp_path_factory.mktemp(name)) for name in FAMILIES}
    return lambda name: copy.deepcopy(pipes[name])


def part_of(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def train(net, seed=1, **options):
    """As if trained: a LoRA that does something."""
    torch.manual_seed(seed)
    add_lora(net, 4, **options)
    for name, tensor in lora_state(net).items():
        if ".lora_B." in name:
            tensor.normal_(std=0.1)


def draw(pipe, **options):
    sizes = {"height": 32, "width": 32, "output_type": "latent", "generator": torch.Generator().manual_seed(5)}
    if "PixArt" in type(pipe).__name__:
        sizes["use_resolution_binning"] = False
    return torch.as_tensor(pipe(PROMPT, **sizes, **options).images)


def seen(pipe):
    """The times that the network is called with from now on, as a list that grows."""
    times = []

    def note(module, args, kwargs):
        t = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        times.extend(t.reshape(-1)[:1].tolist())

    part_of(pipe).register_forward_pre_hook(note, with_kwargs=True)
    return times


@pytest.fixture(scope="module")
def student(built, tmp_path_factory):
    """(folder of a student of a family, the pipeline whose network still has its LoRA)."""
    @functools.cache
    def made(name, alpha=0):
        pipe, folder = built(name), tmp_path_factory.mktemp(f"{name}_student")
        train(part_of(pipe), alpha=alpha)
        save_student(folder, part_of(pipe), SIGMAS if name == "sd3" else MODES, base="a/model")
        return folder, pipe

    return made


@every
def test_a_loaded_student_draws_what_the_trained_network_draws(built, student, name):
    """All noise comes from the call's generator."""
    folder, trained = student(name)
    trained, pipe = copy.deepcopy(trained), built(name)
    before, own = draw(pipe, num_inference_steps=2), pipe.scheduler
    times = seen(pipe)
    with load_student(pipe, folder) as loaded:
        assert loaded.call == {"num_inference_steps": 4, "guidance_scale": 0.0}
        image = draw(pipe)
        assert times == pytest.approx(SIGMAS if name == "sd3" else MODES)  # one call of the network each
        assert times == pytest.approx(loaded.timesteps)
        assert torch.equal(draw(pipe, num_inference_steps=4, guidance_scale=0.0), image)
        learned = lora_state(part_of(trained))
        assert lora_state(part_of(pipe)).keys() == learned.keys()
        assert all(torch.equal(each, learned[key]) for key, each in lora_state(part_of(pipe)).items())
        trained.__class__, trained.scheduler = type(pipe), copy.deepcopy(pipe.scheduler)
        assert torch.equal(draw(trained), image)
    assert pipe.scheduler is own
    assert torch.equal(draw(pipe, num_inference_steps=2), before)
    assert not torch.allclose(before, image, atol=1e-2)


def test_diffusers_loads_the_same_student(built, student):
    """As users of released students do, but for the times, which are those of the trained modes here only."""
    folder, _ = student("sdxl", alpha=2)
    ours, theirs = built("sdxl"), built("sdxl")
    load_student(ours, folder)
    theirs.load_lora_weights(folder)
    theirs.scheduler = LCMScheduler.from_config(theirs.scheduler.config, timestep_spacing="trailing")
    call = {"num_inference_steps": 4, "guidance_scale": 0}
    image = draw(theirs, **call)
    assert theirs.scheduler.timesteps.tolist() == [999, 759, 499, 259]
    assert not torch.allclose(draw(ours), image, atol=1e-4)
    theirs.scheduler = LCMScheduler.from_config(ours.scheduler.config)
    assert torch.allclose(draw(ours), draw(theirs, **call), atol=1e-5)
    assert theirs.scheduler.timesteps.tolist() == MODES


@pytest.mark.parametrize("tool", ["peft", "diffusers"])
def test_others_load_the_same_student_of_stable_diffusion_3(built, student, tool):
    folder, _ = student("sd3", alpha=2)
    ours, theirs = built("sd3"), built("sd3")
    before = draw(theirs, num_inference_steps=4, guidance_scale=0)
    load_student(ours, folder)
    if tool == "peft":
        theirs.transformer = PeftModel.from_pretrained(theirs.transformer, folder)
    else:
        theirs.load_lora_weights(folder)
        assert not torch.allclose(draw(theirs, num_inference_steps=4, guidance_scale=0), before, atol=1e-3)
    theirs.scheduler = ours.scheduler
    theirs.__class__ = type(ours)  # hands the generator on
    assert torch.allclose(draw(ours), draw(theirs, num_inference_steps=4, guidance_scale=0), atol=1e-5)


@pytest.mark.parametrize(("name", "form"), [("sdxl", "unet"), ("sd15", "lora.down"), ("sd15", "processor"),
                                            ("sd3", "peft"), ("sd15", "metadata")])
def test_released_formats_load(built, tmp_path, name, form):
    """Files as diffusers and peft of different ages wrote them; they say neither timesteps nor a fingerprint."""
    pipe = built(name)
    train(part_of(pipe), alpha=2 if form in ("peft", "metadata") else 0)
    held = {key: each.clone() for key, each in lora_state(part_of(pipe)).items()}
    if form == "peft":
        save_file({PEFT + key: each for key, each in held.items()}, tmp_path / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "target_modules": ["to_q"]}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    else:
        if form == "lora.down":
            held = {key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): each for key, each in held.items()}
        if form == "processor":
            for layer in ("to_q", "to_k", "to_v", "to_out.0"):
                for part, old in (("lora_A", "down"), ("lora_B", "up")):
                    new = f"processor.{layer.removesuffix('.0')}_lora.{old}"
                    held = {key.replace(f"{layer}.{part}", new): each for key, each in held.items()}
        metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 2})}
        save_file({f"unet.{key}": each for key, each in held.items()}, tmp_path / "pytorch_lora_weights.safetensors",
                  metadata if form == "metadata" else None)
    other = built(name)
    assert load_student(other, tmp_path).timesteps == (SIGMAS if name == "sd3" else MODES)
    mine, theirs = (dict(part_of(each).named_modules()) for each in (other, pipe))
    layers = [key.rpartition(".lora_A")[0] for key in lora_state(part_of(pipe)) if ".lora_A" in key]
    for layer in layers:
        a, b = mine[layer], theirs[layer]
        assert torch.equal(a.get_delta_weight("student"), b.get_delta_weight("default"))
    assert len(layers) == len(lora_state(part_of(other))) / 2


def test_fewer_steps_take_some_of_the_trained_times(built, student):
    folder, _ = student("sd15")
    pipe = built("sd15")
    loaded = load_student(pipe, folder, steps=2)
    times = seen(pipe)
    draw(pipe)
    draw(pipe, num_inference_steps=1)
    assert times == [999, 499, 999]
    assert loaded.timesteps == [999, 499]
    with pytest.raises(UserError, match=r"^num_inference_steps=5: .*999, 749, 499, 249; choose from 1 to 4 steps$"):
        draw(pipe, num_inference_steps=5)
    loaded.disable()
    with pytest.raises(UserError, match="num_inference_steps=8"):
        load_student(pipe, folder, steps=8)
    assert not lora_state(pipe.unet)
    assert isinstance(pipe.scheduler, DDIMScheduler)


def test_times_that_no_lcm_grid_has():
    assert pick([999, 666, 332], 3) == [999, 666, 332]
    assert pick(MODES, 3) == [999, 749, 499]
    with pytest.raises(UserError, match="num_inference_steps=0"):
        pick(MODES, 0)


def test_guided_and_merged(built, student):
    """Guidance of the call is obeyed, and a student that is merged is as good."""
    pipe = built("sd15")
    load_student(pipe, student("sd15")[0])
    image = draw(pipe)
    assert not torch.allclose(draw(pipe, guidance_scale=5.0), image, atol=1e-3)
    merge_lora(pipe.unet)
    assert torch.allclose(draw(pipe), image, atol=1e-4)


@pytest.mark.parametrize("first", ["style", "student"])
def test_a_student_and_a_style(built, student, first):
    """Each goes without the other, whichever came first."""
    folder, _ = student("sd15")
    pipe, call = built("sd15"), {"num_inference_steps": 2}

    def load_style():
        train_of_style = built("sd15")
        train(train_of_style.unet, seed=3)
        held = {f"unet.{name}": each.clone() for name, each in lora_state(train_of_style.unet).items()}
        pipe.load_lora_weights(held, adapter_name="style")

    plain, alone = draw(pipe, **call), built("sd15")
    load_student(alone, folder)
    if first == "style":
        load_style()
        styled = draw(pipe, **call)
        loaded = load_student(pipe, folder)
    else:
        loaded = load_student(pipe, folder)
        load_style()
        pipe.set_adapters(["student", "style"])
    both = draw(pipe)
    assert set(pipe.get_active_adapters()) == {"student", "style"}
    assert not torch.allclose(both, draw(alone), atol=1e-3)
    pipe.set_adapters(["student"])
    assert torch.equal(draw(pipe), draw(alone))
    pipe.set_adapters(["style", "student"])
    loaded.disable()
    assert pipe.get_list_adapters() == {"unet": ["style"]}
    if first == "student":
        styled = draw(pipe, **call)
    assert torch.equal(draw(pipe, **call), styled)
    assert not torch.allclose(styled, plain, atol=1e-3)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe, **call), plain)


@pytest.mark.parametrize(("name", "kind", "call"), [("sd15", LCMScheduler, {"timesteps": MODES}),
                                                    ("sd3", FlowMatchLCMScheduler, {"sigmas": [1, 0.9, 0.75, 0.5]})])
def test_diffusers_alone_loads_a_saved_pipeline(built, student, tmp_path, name, kind, call):
    pipe = built(name)
    loaded = load_student(pipe, student(name)[0])
    with pytest.raises(UserError, match=r"^save_pretrained: .* has a LoRA in it; merge_lora\(pipe\.[a-z]*\)"):
        pipe.save_pretrained(tmp_path)
    merge_lora(loaded.network)
    pipe.save_pretrained(tmp_path)
    image = draw(pipe)  # by the student's scheduler, which is still there
    theirs = type(built(name)).from_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffusers", kind.__name__]
    assert type(theirs.scheduler) is kind
    theirs.scheduler.set_timesteps(**call)
    assert theirs.scheduler.timesteps.tolist() == pytest.approx(loaded.timesteps)
    if name == "sd3":
        theirs.__class__ = type(pipe)  # hands the generator on
        theirs.scheduler = type(pipe.scheduler).from_config(theirs.scheduler.config)
    assert torch.allclose(draw(theirs, guidance_scale=0, **call), image, atol=1e-5)


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_a_scheduler_made_of_anothers_config_has_the_same_times(built, student, tmp_path, name, caplog):
    pipe = built(name)
    loaded = load_student(pipe, student(name)[0])
    kind = type(pipe.scheduler)
    pipe.scheduler.save_pretrained(tmp_path)
    for other in (kind.from_config(pipe.scheduler.config), kind.from_config(pipe.scheduler.plain().config),
                  kind.from_pretrained(tmp_path), copy.deepcopy(pipe.scheduler)):
        other.set_timesteps(4)
        assert other.timesteps.tolist() == pytest.approx(loaded.timesteps)
    assert not caplog.records


def test_the_card_says_what_it_is(student):
    folder, pipe = student("sd15", alpha=2)
    card = json.loads((folder / "student.json").read_text())
    assert {"rank": 4, "alpha": 2, "timesteps": MODES, "guidance_scale": 0.0, "base": "a/model",
            "network": "UNet2DConditionModel"}.items() <= card.items()
    assert sorted(each.name for each in folder.iterdir()) == ["pytorch_lora_weights.safetensors", "student.json"]
    names = load_file(folder / "pytorch_lora_weights.safetensors").keys()
    assert names == {f"unet.{name}" for name in lora_state(pipe.unet)}


def test_what_is_around_a_network_leaves_no_trace(built, tmp_path):
    """As a trainer's `PipelineNet`."""
    pipe = built("pixart")
    wrapped = torch.nn.ModuleDict({"transformer": pipe.transformer})
    train(wrapped)
    save_student(tmp_path, wrapped, MODES)
    held = load_file(tmp_path / "adapter_model.safetensors")
    learned = {PEFT + name.removeprefix("transformer."): each for name, each in lora_state(wrapped).items()}
    assert held.keys() == learned.keys()
    assert all(torch.equal(each, learned[name]) for name, each in held.items())


def test_a_network_of_ours_travels_too(tmp_path):
    def network():
        torch.manual_seed(0)
        return UViT(img_size=8, patch_size=2, in_chans=4, embed_dim=16, depth=2, num_heads=2)

    net = network()
    train(net)
    save_student(tmp_path, net, MODES)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([999.0, 249.0])
    assert torch.equal(PeftModel.from_pretrained(network(), tmp_path)(x, t), net(x, t))
    assert not torch.equal(network()(x, t), net(x, t))
    with pytest.raises(ValueError, match="no LoRA"):
        save_student(tmp_path, network(), MODES)


def test_half_precision_is_the_same_base(built, student):
    pipe = built("sd15")
    pipe.unet.half()
    load_student(pipe, student("sd15")[0])
    assert {each.dtype for each in lora_state(pipe.unet).values()} == {torch.float16}


def refused(pipe, folder, *fragments, **options):
    with pytest.raises(UserError) as caught:
        load_student(pipe, folder, **options)
    text = str(caught.value)
    assert "\n" not in text
    for fragment in fragments:
        assert fragment in text, text


def test_a_student_of_another_base_is_refused(built, student, tmp_path):
    shutil.copytree(student("sd15")[0], tmp_path, dirs_exist_ok=True)
    pipe = built("sd15")
    torch.manual_seed(9)
    for parameter in pipe.unet.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    before = draw(pipe, num_inference_steps=2)
    refused(pipe, tmp_path, "LoRA of another base model (a/model)", "StableDiffusionPipeline", "other_base=True")
    assert torch.equal(draw(pipe, num_inference_steps=2), before)
    load_student(pipe, tmp_path, other_base=True)
    (tmp_path / "student.json").unlink()  # as a released one, of which only names and shapes can tell
    refused(built("sdxl"), tmp_path, "is a LoRA of another network", "UNet2DConditionModel")
    refused(built("pixart"), tmp_path, "is a LoRA of another network", "PixArtTransformer2DModel")


def test_pipelines_that_cannot_say_which_can(built, student):
    folder, _ = student("sd15")
    pipe = DDIMPipeline(unet2d(), DDIMScheduler())
    refused(pipe, folder, "a DDIMPipeline is not supported", "UNet2DConditionModel", "PixArtTransformer2DModel")
    pipe = built("sd15")
    load_student(pipe, folder)
    refused(pipe, folder, "has a LoRA named student already")


def test_folders_that_hold_no_student(built, student, tmp_path):
    pipe = built("pixart")
    refused(pipe, tmp_path, "neither pytorch_lora_weights.safetensors nor adapter_model.safetensors")
    refused(pipe, tmp_path / "nowhere", "is no folder")
    shutil.copytree(student("pixart")[0], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    refused(pipe, tmp_path, "use_rslora=True is not supported")
    (tmp_path / "adapter_config.json").unlink()
    refused(pipe, tmp_path, "adapter_config.json cannot be read")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no tensors")
    refused(pipe, tmp_path, "cannot be read")
    save_file({"text_encoder.layer.weight": torch.zeros(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    refused(pipe, tmp_path, "text_encoder.layer.weight is no weight of a LoRA")

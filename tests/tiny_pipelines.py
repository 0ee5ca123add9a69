"""Tiny random diffusers models and pipelines, built in memory: what tests of policies and of prompt sampling run on.

Every pipeline function returns (pipe, kwargs); `pipe(**kwargs, generator=torch.Generator().manual_seed(0))` makes one
image in less than a second. Weights are the same at every call; safety checker, watermark and progress bars are off.
"""

import json

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMPipeline,
    DDIMScheduler,
    MultiAdapter,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
    UNet2DModel,
)

STEPS = 6
TOKENS = 7  # of the ready-made prompt embeddings
SIZE = 32  # pixels; latents are SIZE / 4
CROSS = 32  # channels of the text features

_LEVELS = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "block_out_channels": (32, 64, 64, 64),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}


def _random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unet(cross: int = CROSS, in_channels: int = 4, **options) -> UNet2DConditionModel:
    """A UNet of Stable Diffusion 1.5's shape: four levels, cross-attention on the first three."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        **_LEVELS,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        cross_attention_dim=cross,
        **options,
    ).eval()


def sdxl_unet() -> UNet2DConditionModel:
    """A UNet of SDXL's shape: three levels, the first without attention, added text (32 channels) and 6 size ids."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=CROSS + 6 * 8,
        cross_attention_dim=CROSS,
        norm_num_groups=8,
        sample_size=8,
    ).eval()


def unet2d() -> UNet2DModel:
    """An unconditional pixel-space UNet."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()


def autoencoder() -> AutoencoderKL:
    """A KL autoencoder with a factor of 4: (b, 3, 32, 32) <-> (b, 4, 8, 8)."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        norm_num_groups=8,
        latent_channels=4,
        sample_size=SIZE,
    ).eval()


def scheduler(**options) -> DDIMScheduler:
    """DDIM with Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **options,
    )


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _parts(model: UNet2DConditionModel, **others) -> dict:
    """The components of a Stable Diffusion 1.5 pipeline that is given its prompts as embeddings."""
    return {
        "vae": autoencoder(),
        "unet": model,
        "scheduler": scheduler(),
        "text_encoder": None,
        "tokenizer": None,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
        **others,
    }


def _call(output: str = "latent", **others) -> dict:
    return {
        "prompt_embeds": _random(1, TOKENS, CROSS, seed=1),
        "negative_prompt_embeds": _random(1, TOKENS, CROSS, seed=2),
        "num_inference_steps": STEPS,
        "guidance_scale": 7.5,
        "output_type": output,
        **others,
    }


def _picture(channels: int = 3, seed: int = 3) -> torch.Tensor:
    return torch.rand(1, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def text_to_image():
    return _quiet(StableDiffusionPipeline(**_parts(unet()))), _call(height=SIZE, width=SIZE)


def text_to_image_2():
    """Stable Diffusion 2.1's: linear projections around attention, v."""
    parts = _parts(unet(use_linear_projection=True))
    parts["scheduler"] = scheduler(prediction_type="v_prediction")
    return _quiet(StableDiffusionPipeline(**parts)), _call(height=SIZE, width=SIZE)


def image_to_image():
    return _quiet(StableDiffusionImg2ImgPipeline(**_parts(unet()))), _call(image=_picture(), strength=0.8)


def inpainting(channels: int = 9):
    """`channels` is 9 (mask and masked image enter the UNet) or 4 (an ordinary UNet, the known part is put back)."""
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., SIZE // 2 :] = 1
    kwargs = _call(image=_picture(), mask_image=mask, height=SIZE, width=SIZE, strength=1.0)
    return _quiet(StableDiffusionInpaintPipeline(**_parts(unet(in_channels=channels)))), kwargs


def control_model(seed: int = 0) -> ControlNetModel:
    """A ControlNet for `unet()`, its zero-initialised layers made random so that it does steer."""
    torch.manual_seed(seed)
    model = ControlNetModel(**_LEVELS, cross_attention_dim=CROSS, conditioning_embedding_out_channels=(8, 16, 16))
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def controlnet(nets: int = 1):
    """One ControlNet, or a MultiControlNet of `nets`."""
    models = [control_model(seed) for seed in range(nets)]
    images = [_picture(seed=3 + seed) for seed in range(nets)]
    pipe = StableDiffusionControlNetPipeline(**_parts(unet()), controlnet=models if nets > 1 else models[0])
    return _quiet(pipe), _call(image=images if nets > 1 else images[0], height=SIZE, width=SIZE)


def _adapter(seed: int = 0) -> T2IAdapter:
    torch.manual_seed(seed)
    # A factor of 4 in front of the first level, as the autoencoder's, so that its features fit the UNet's levels.
    return T2IAdapter(in_channels=3, channels=[32, 64, 64, 64], num_res_blocks=1, downscale_factor=4).eval()


def t2i_adapter(adapters: int = 1):
    """One T2I-Adapter, or a MultiAdapter of `adapters`."""
    models = [_adapter(seed) for seed in range(adapters)]
    images = [_picture(seed=3 + seed) for seed in range(adapters)]
    if adapters == 1:
        given = {"image": images[0]}
    else:
        given = {"image": images, "adapter_conditioning_scale": [1 / adapters] * adapters}
    adapter = models[0] if adapters == 1 else MultiAdapter(models)
    pipe = StableDiffusionAdapterPipeline(**_parts(unet()), adapter=adapter)
    return _quiet(pipe), _call(**given, height=SIZE, width=SIZE)


def _sdxl_parts() -> dict:
    return {
        "vae": autoencoder(),
        "unet": sdxl_unet(),
        "scheduler": scheduler(),
        "text_encoder": None,
        "text_encoder_2": None,
        "tokenizer": None,
        "tokenizer_2": None,
        "add_watermarker": False,
    }


def _sdxl_call(**others) -> dict:
    pooled = _random(1, CROSS, seed=5)
    return _call(pooled_prompt_embeds=pooled, negative_pooled_prompt_embeds=_random(1, CROSS, seed=6), **others)


def sdxl():
    return _quiet(StableDiffusionXLPipeline(**_sdxl_parts())), _sdxl_call(height=SIZE, width=SIZE)


def sdxl_image_to_image():
    return _quiet(StableDiffusionXLImg2ImgPipeline(**_sdxl_parts())), _sdxl_call(image=_picture(), strength=0.8)


def ddim_unconditional():
    kwargs = {"num_inference_steps": STEPS, "output_type": "np"}
    return _quiet(DDIMPipeline(unet=unet2d(), scheduler=DDIMScheduler())), kwargs


WORDS = ("a", "cat", "dog", "photo", "of", "the", "red", "sea", "prompt", "blurry")


def clip_tokenizer(folder):
    """A CLIPTokenizer over WORDS (anything else becomes its letters), made from a vocabulary written into `folder`."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz,."
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            merge = f"{symbols[0]} {symbols[1]}"
            symbols[:2] = [symbols[0] + symbols[1]]
            if merge not in merges:
                merges.append(merge)
                tokens.append(symbols[0])
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def clip_text_model(tokenizer, kind: str = "CLIPTextModel"):
    import transformers

    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CROSS,
        projection_dim=CROSS,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return getattr(transformers, kind)(config).eval()


def clip_model(folder):
    """The path, in `folder`, of a CLIP model of 28 x 28 pixels and 16 tokens with random weights."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tokenizer = clip_tokenizer(folder / "vocabulary")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config=small | {"vocab_size": len(tokenizer), "max_position_embeddings": 16,
                             "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id},
        vision_config=small | {"image_size": 28, "patch_size": 7}, projection_dim=24)
    net = CLIPModel(config)
    for layer in net.modules():  # its own initialisation is so small that all images look alike
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            torch.nn.init.normal_(layer.weight, std=0.3)
    net.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(folder / "model")
    return folder / "model"


def prompted(folder):
    """Text to image with its own tokenizer and text encoder: `pipe("a cat")` works, and `save_pretrained` too.

    `folder` (a pathlib.Path) receives the tokenizer's vocabulary.
    """
    tokenizer = clip_tokenizer(folder / "vocabulary")
    parts = _parts(unet(), tokenizer=tokenizer, text_encoder=clip_text_model(tokenizer))
    kwargs = {"prompt": "a photo of a cat", "num_inference_steps": STEPS, "output_type": "np"}
    return _quiet(StableDiffusionPipeline(**parts)), kwargs


def prompted_controlnet(folder, nets: int = 1):
    """`prompted` with one ControlNet (or several) beside the UNet."""
    tokenizer = clip_tokenizer(folder / "vocabulary")
    parts = _parts(unet(), tokenizer=tokenizer, text_encoder=clip_text_model(tokenizer))
    models = [control_model(seed) for seed in range(nets)]
    images = [_picture(seed=3 + seed) for seed in range(nets)]
    pipe = StableDiffusionControlNetPipeline(**parts, controlnet=models if nets > 1 else models[0])
    kwargs = {
        "prompt": "a photo of a cat",
        "image": images if nets > 1 else images[0],
        "num_inference_steps": STEPS,
        "output_type": "np",
    }
    return _quiet(pipe), kwargs


def prompted_sdxl(folder):
    """SDXL with the second of its two text encoders, as the refiner has it."""
    tokenizer = clip_tokenizer(folder / "vocabulary")
    encoder = clip_text_model(tokenizer, "CLIPTextModelWithProjection")
    pipe = StableDiffusionXLPipeline(**_sdxl_parts() | {"tokenizer_2": tokenizer, "text_encoder_2": encoder})
    return _quiet(pipe), {"prompt": "a photo of a cat", "num_inference_steps": STEPS, "output_type": "np"}


IN_MEMORY = {
    "text_to_image": text_to_image,
    "text_to_image_2": text_to_image_2,
    "image_to_image": image_to_image,
    "inpainting": inpainting,
    "inpainting_4": lambda: inpainting(channels=4),
    "controlnet": controlnet,
    "multi_controlnet": lambda: controlnet(nets=2),
    "t2i_adapter": t2i_adapter,
    "multi_adapter": lambda: t2i_adapter(adapters=2),
    "sdxl": sdxl,
    "sdxl_image_to_image": sdxl_image_to_image,
    "ddim_unconditional": ddim_unconditional,
}

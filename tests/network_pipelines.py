"""Tiny random pipelines of every family that `libs.pipelines.model` serves, with their tokenizers and text encoders.

`PIPELINES[name](folder)` builds one; `folder` receives the vocabulary of its tokenizers. Images have 32 x 32 pixels,
latents 4 x 8 x 8. Weights are the same at every call.
"""

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from small_pipeline import small_unet
from tiny_pipelines import (
    CROSS,
    WORDS,
    autoencoder,
    clip_text_model,
    clip_tokenizer,
    scheduler,
)

WIDTH = 2 * CROSS  # channels of two text encoders together


def sd15(folder):
    tokenizer = clip_tokenizer(folder / "vocabulary")
    return StableDiffusionPipeline(
        vae=autoencoder(), unet=small_unet(), scheduler=scheduler(), tokenizer=tokenizer,
        text_encoder=clip_text_model(tokenizer), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)


def sd21(folder):
    """Stable Diffusion 2.1's: v-prediction."""
    pipe = sd15(folder)
    pipe.scheduler = scheduler(prediction_type="v_prediction")
    return pipe


def _sdxl_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32, 32), layers_per_block=1, attention_head_dim=(2, 4, 4), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, cross_attention_dim=WIDTH,
        projection_class_embeddings_input_dim=CROSS + 6 * 8, norm_num_groups=8, sample_size=8,
    ).eval()


def _two_encoders(folder, first: str) -> dict:
    tokenizer = clip_tokenizer(folder / "vocabulary")
    second = clip_text_model(tokenizer, "CLIPTextModelWithProjection")
    with torch.no_grad():  # unlike the first
        second.text_model.embeddings.token_embedding.weight.mul_(2)
    return {"tokenizer": tokenizer, "text_encoder": clip_text_model(tokenizer, first), "tokenizer_2": tokenizer,
            "text_encoder_2": second}


def sdxl(folder):
    return StableDiffusionXLPipeline(vae=autoencoder(), unet=_sdxl_unet(), scheduler=scheduler(),
                                     add_watermarker=False, **_two_encoders(folder, "CLIPTextModel"))


def t5_parts(width: int) -> dict:
    """The tokenizer and text encoder of a pipeline: T5's, of `width` channels."""
    letters = [("▁" + word, -3.0) for word in WORDS] + [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz,."]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    tokenizer = transformers.T5Tokenizer(vocab=vocab, extra_ids=0)
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=len(vocab), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return {"tokenizer": tokenizer, "text_encoder": transformers.T5EncoderModel(config).eval()}


def pixart(folder, sample_size: int = 128):
    """sample_size: of 128 is the size that the network is told, as the published one for 1,024 pixels."""
    parts = t5_parts(CROSS)
    torch.manual_seed(0)
    net = PixArtTransformer2DModel(num_attention_heads=2, attention_head_dim=24, num_layers=2, cross_attention_dim=48,
                                   caption_channels=CROSS, sample_size=sample_size).eval()
    noise = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    return PixArtAlphaPipeline(vae=autoencoder(), transformer=net, scheduler=noise, **parts)


def sd3(folder):
    t5 = t5_parts(WIDTH)
    torch.manual_seed(0)
    net = SD3Transformer2DModel(sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
                                num_attention_heads=2, joint_attention_dim=WIDTH, caption_projection_dim=16,
                                pooled_projection_dim=WIDTH, pos_embed_max_size=8).eval()
    vae = AutoencoderKL.from_config(autoencoder().config, scaling_factor=1.5305, shift_factor=0.0609,
                                    use_quant_conv=False, use_post_quant_conv=False).eval()
    return StableDiffusion3Pipeline(
        vae=vae, transformer=net, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **_two_encoders(folder, "CLIPTextModelWithProjection"),
        tokenizer_3=t5["tokenizer"], text_encoder_3=t5["text_encoder"],
    )


def sd15_adapter(folder):
    pipe = sd15(folder)
    torch.manual_seed(0)
    adapter = T2IAdapter(in_channels=1, channels=[16, 32, 32], num_res_blocks=1, downscale_factor=4).eval()
    parts = pipe.components
    del parts["image_encoder"]
    return StableDiffusionAdapterPipeline(**parts, adapter=adapter, requires_safety_checker=False)


def sdxl_adapter(folder):
    pipe = sdxl(folder)
    torch.manual_seed(0)
    adapter = T2IAdapter(in_channels=3, channels=[16, 32, 32, 32], num_res_blocks=1, downscale_factor=8,
                         adapter_type="full_adapter_xl").eval()
    return StableDiffusionXLAdapterPipeline(**pipe.components, adapter=adapter)


def quiet(build):
    def built(folder, **options):
        pipe = build(folder, **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return built


PIPELINES = {build.__name__: quiet(build) for build in (sd15, sd21, sdxl, pixart, sd3, sd15_adapter, sdxl_adapter)}

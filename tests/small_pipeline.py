"""A text to image pipeline smaller still than those of tiny_pipelines, and what tests do with it."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_pipelines import CROSS, image_to_image, text_to_image

from libs.adaptors import make_adaptor
from libs.errors import UserError

HERE = {"c_in": 16, "c_out": 32, "temb_dim": 64}  # of `small_unet` at depth 1


def small_unet(levels: int = 3) -> UNet2DConditionModel:
    torch.manual_seed(0)
    crossed = levels - 1
    return UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D",) * crossed + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * crossed,
        block_out_channels=(16, 32, 32)[:levels],
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=8,
        sample_size=8,
        cross_attention_dim=CROSS,
    ).eval()


def small(kind=text_to_image, **kwargs):
    """(pipe, kwargs) of a kind of `tiny_pipelines` around a UNet of three levels."""
    pipe, defaults = kind()
    pipe.register_modules(unet=small_unet())
    return pipe, defaults | kwargs


def small_image_to_image(**kwargs):
    return small(image_to_image, **kwargs)


def image(pipe, kwargs: dict, seed: int = 0, **others) -> torch.Tensor:
    return torch.as_tensor(pipe(**kwargs | others, generator=torch.Generator().manual_seed(seed)).images)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Whether the largest difference is below `tolerance` of the largest value."""
    return float((a - b).abs().max() / b.abs().max()) < tolerance


def swap_scheduler(pipe, cls, **options) -> None:
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **options)


def traces(*modules) -> list[dict]:
    return [{name: id(value) for name, value in vars(each).items()} for module in modules for each in module.modules()]


def resnet(**sizes) -> torch.nn.Module:
    return make_adaptor("resnet", **HERE | sizes, width=16)


def in_one_line(make, words: str):
    with pytest.raises(UserError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)

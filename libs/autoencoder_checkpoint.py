"""The autoencoder files of latent diffusion (2112.10752) as diffusers' `AutoencoderKL`.

U-ViT's `autoencoder_kl.pth` and `autoencoder_kl_ema.pth` hold the names of the original code without a prefix:

    {encoder,decoder}.{conv_in,norm_out,conv_out}     {encoder,decoder}.mid.{block_1,attn_1,block_2}
    encoder.down.{i}.block.{j}, .downsample.conv      decoder.up.{i}.block.{j}, .upsample.conv (i = 0 is the largest)
    quant_conv, post_quant_conv
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .checkpoint import read
from .errors import UserError

NORM_GROUPS = 32  # of every group norm, in all published autoencoders

RENAMED = (  # what the original code calls a part -> diffusers, in the order in which they are replaced
    (r"\bmid\.block_(\d)", lambda found: f"mid_block.resnets.{int(found[1]) - 1}"),
    (r"\bmid\.attn_1\.norm\b", "mid_block.attentions.0.group_norm"),
    (r"\bmid\.attn_1\.(q|k|v)\b", r"mid_block.attentions.0.to_\1"),
    (r"\bmid\.attn_1\.proj_out\b", "mid_block.attentions.0.to_out.0"),
    (r"\bdown\.(\d+)\.block\.", r"down_blocks.\1.resnets."),
    (r"\bdown\.(\d+)\.downsample\.", r"down_blocks.\1.downsamplers.0."),
    (r"\bup\.(\d+)\.block\.", r"up_blocks.\1.resnets."),
    (r"\bup\.(\d+)\.upsample\.", r"up_blocks.\1.upsamplers.0."),
    (r"\bnin_shortcut\b", "conv_shortcut"),
    (r"\bnorm_out\b", "conv_norm_out"),
)


def load_autoencoder(path: str | Path, field: str = "codec.pretrained") -> nn.Module:
    """diffusers' `AutoencoderKL` with the weights of a .pth file; its architecture is that of the weights.

    Raises UserError, naming `field`, for a file that is missing, holds more than tensors, or another network.
    """
    from diffusers import AutoencoderKL

    tensors, _ = read(path, field)
    try:
        vae = AutoencoderKL(**autoencoder_config(tensors))
        vae.load_state_dict(diffusers_names(tensors))
    except (KeyError, RuntimeError, ValueError, IndexError) as error:
        problem = re.sub(r"\s+", " ", str(error))[:200]
        raise UserError(f"{field}={str(path)!r} holds no autoencoder of latent diffusion ({problem})") from error
    return vae


def autoencoder_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of `AutoencoderKL` for weights under the original names."""
    levels = 1 + _highest(tensors, r"encoder\.down\.(\d+)\.")
    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(tensors[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)),
        "layers_per_block": 1 + _highest(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": tensors["post_quant_conv.weight"].shape[0],
        "norm_num_groups": NORM_GROUPS,
    }


def diffusers_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under diffusers' names; the maps of the attention, 1 x 1 convolutions, as matrices."""
    levels = 1 + _highest(tensors, r"decoder\.up\.(\d+)\.")
    renamed = {}
    for name, tensor in tensors.items():
        # diffusers counts the decoder's blocks in the order in which they run
        new = re.sub(r"\bup\.(\d+)\.", lambda found: f"up.{levels - 1 - int(found[1])}.", name)
        for pattern, replacement in RENAMED:
            new = re.sub(pattern, replacement, new)
        is_map = ".attentions." in new and tensor.ndim == 4
        renamed[new] = tensor[:, :, 0, 0] if is_map else tensor
    return renamed


def _highest(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """The highest number that stands in the names' place of the pattern's group."""
    numbers = [int(found[1]) for found in (re.match(pattern, name) for name in tensors) if found]
    if not numbers:
        raise KeyError(f"no weights {pattern}".replace("\\", ""))
    return max(numbers)

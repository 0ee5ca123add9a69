"""A tiny network of every family that can be a teacher, with its input, its conditions and where its middle is."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    DiTTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn

from libs.backbones import DDPMUNet, UViT
from libs.backbones.unet2d import UNet2D

UNET = {"sample_size": 16, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4,
        "attention_head_dim": 4}
TEXT_UNET = {**UNET, "cross_attention_dim": 6, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
             "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
TRANSFORMER = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8}
TEXT = {"encoder_hidden_states": (5, 6)}


class Adapted(nn.Module):
    """A diffusers network behind the call that all backbones share."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x, timesteps, **cond):
        return self.net(x, timestep=timesteps, return_dict=False, **cond)[0]


class Family(NamedTuple):
    """A tiny network: its input (c, h, w), its conditions (...) a row, and where its middle is.

    tokens: (rows, columns) of patches at the end of the block's output; None where that is a map
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    cond: dict[str, tuple[int, ...]]
    middle: str
    tokens: tuple[int, int] | None = None


FAMILIES = {
    "UNet2D": Family(lambda: UNet2D(**UNET, num_class_embeds=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                                    up_block_types=("AttnUpBlock2D", "UpBlock2D")), (3, 16, 8), {"y": ()}, "mid_block"),
    "UNet2DCondition": Family(lambda: Adapted(UNet2DConditionModel(**TEXT_UNET)), (4, 10, 7), TEXT, "net.mid_block"),
    "without a middle": Family(lambda: Adapted(UNet2DConditionModel(**TEXT_UNET, mid_block_type=None)), (4, 8, 8), TEXT,
                               "net.down_blocks.1"),
    "added conditions": Family(
        lambda: Adapted(UNet2DConditionModel(**TEXT_UNET, class_embed_type="projection",
                                             projection_class_embeddings_input_dim=5)),
        (4, 8, 8), {**TEXT, "class_labels": (5,)}, "net.mid_block"),
    "DDPMUNet": Family(lambda: DDPMUNet(channel=8, channel_multiplier=(1, 2, 3), n_res_blocks=1, num_classes=4),
                       (3, 16, 8), {"y": ()}, "mid.1"),
    "UViT": Family(lambda: UViT(img_size=8, patch_size=2, embed_dim=16, depth=2, num_heads=2, num_classes=4, clip_dim=6,
                                num_clip_token=5), (3, 8, 8), {"y": (), "context": (5, 6)}, "mid_block", (4, 4)),
    "DiT": Family(lambda: Adapted(DiTTransformer2DModel(**TRANSFORMER, num_layers=3, num_embeds_ada_norm=4,
                                                        norm_num_groups=4)),
                  (4, 8, 8), {"class_labels": ()}, "net.transformer_blocks.1", (4, 4)),
    "PixArt": Family(lambda: Adapted(PixArtTransformer2DModel(**TRANSFORMER, num_layers=4, cross_attention_dim=16,
                                                              caption_channels=6, use_additional_conditions=False)),
                     (4, 8, 12), TEXT, "net.transformer_blocks.2", (4, 6)),
    "Sana": Family(lambda: Adapted(SanaTransformer2DModel(**{**TRANSFORMER, "patch_size": 1}, num_layers=3,
                                                          num_cross_attention_heads=2, cross_attention_head_dim=8,
                                                          cross_attention_dim=16, caption_channels=6)),
                   (4, 4, 6), TEXT, "net.transformer_blocks.1", (4, 6)),
    "SD3": Family(lambda: Adapted(SD3Transformer2DModel(**TRANSFORMER, num_layers=4, joint_attention_dim=6,
                                                        caption_projection_dim=16, pooled_projection_dim=7,
                                                        out_channels=4, pos_embed_max_size=8)),
                  (4, 8, 12), {**TEXT, "pooled_projections": (7,)}, "net.transformer_blocks.2", (4, 6)),
    "AuraFlow": Family(lambda: Adapted(AuraFlowTransformer2DModel(
        **TRANSFORMER, num_mmdit_layers=1, num_single_dit_layers=3, joint_attention_dim=6, caption_projection_dim=16,
        pos_embed_max_size=64)), (4, 8, 8), TEXT, "net.single_transformer_blocks.1", (4, 4)),
    "AuraFlow, joint": Family(lambda: Adapted(AuraFlowTransformer2DModel(
        **TRANSFORMER, num_mmdit_layers=3, num_single_dit_layers=1, joint_attention_dim=6, caption_projection_dim=16,
        pos_embed_max_size=64)), (4, 8, 8), TEXT, "net.joint_transformer_blocks.2", (4, 4)),
}


def frozen(family: Family) -> nn.Module:
    torch.manual_seed(0)
    net = family.build().eval().requires_grad_(False)
    for parameter in net.parameters():
        if parameter.dim() < 2 or not parameter.any():  # zeros would hide what a layer does
            parameter.normal_(std=0.3)
    return net


def inputs(family: Family, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor, dict]:
    cond = {name: torch.randn(rows, *shape) if shape else torch.arange(1, rows + 1)
            for name, shape in family.cond.items()}
    return torch.randn(rows, *family.shape), torch.linspace(0.2, 0.7, rows, dtype=torch.float64), cond

"""A small network of diffusion_distiller's kind, and the flags that make the commands build it."""

from torch import nn

from libs.backbones import DDPMUNet
from libs.checkpoint import build_backbone

CONFIG = "configs/celebahq256_unet.py"
TINY = {"name": "ddpm_unet", "in_channels": 3, "channel": 8, "channel_multiplier": (1, 2), "n_res_blocks": 1,
        "attn_strides": (2,), "attn_heads": 2, "use_affine_time": True, "dropout": 0.0, "fold": 1}
FLAGS = (f"--config={CONFIG}", "--config.compute.device=cpu", "--config.backbone.channel=8",
         "--config.backbone.channel_multiplier=1,2", "--config.backbone.n_res_blocks=1",
         "--config.backbone.attn_strides=2", "--config.backbone.attn_heads=2", "--config.data.image_size=8")


def tiny(**options) -> DDPMUNet:
    """A small network whose branches are not near zero."""
    net = build_backbone(TINY | options).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net

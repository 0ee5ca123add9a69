"""Tiny U-ViTs whose rows leave at all layers, and what their layers give, written out."""

from pathlib import Path

import torch
from torch import nn

from libs import build
from libs.backbones import UViT
from libs.checkpoint import build_backbone, save_backbone
from libs.config import load

ROWS = 15
THRESHOLD = 0.5


def tiny(depth: int = 4, **options) -> UViT:
    torch.manual_seed(0)
    options = {"img_size": 8, "patch_size": 2, "embed_dim": 32, "num_heads": 2, "uem": "released"} | options
    net = UViT(depth=depth, **options).eval()
    for name, parameter in net.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)  # layers that change much, and heads that tell images apart
        if "guidance_embedding" in name:
            nn.init.normal_(parameter, std=0.3)
    return net


def inputs(net: UViT, rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """x, timesteps and conditions, all of which differ from row to row."""
    torch.manual_seed(1)
    more = {}
    if net.num_classes > 0:
        more["y"] = torch.arange(rows) % net.num_classes
    if net.num_clip_token:
        more["context"] = torch.randn(rows, net.num_clip_token, 6)
    if net.guidance_embedding is not None:
        more["guidance"] = torch.linspace(1, 4, rows)
    return torch.randn(rows, 3, 8, 8), torch.linspace(10, 990, rows), more


@torch.no_grad()
def layer_maps(net: UViT, x, t, more) -> list[torch.Tensor]:
    """Tokens after every layer, written out."""
    tokens, skips, maps = net.embed(x, t, **more), [], []
    for block in net.in_blocks:
        tokens = block(tokens)
        skips.append(tokens)
        maps.append(tokens)
    tokens = net.mid_block(tokens)
    maps.append(tokens)
    for block in net.out_blocks:
        tokens = block(tokens, skips.pop()) if net.has_skip else block(tokens)
        maps.append(tokens)
    return maps


def certainty_maps(net: UViT, layer: int, tokens: torch.Tensor, time: torch.Tensor | None = None) -> torch.Tensor:
    """(b, patches, p1 p2 c): what the head of one layer (0 is the first) says of its tokens."""
    return net.lte_classifer(tokens[None], time, layer)[0, :, net.extras:]


@torch.no_grad()
def certainties(net: UViT, x, t, more) -> torch.Tensor:
    """(layers, b): the mean certainty of each row."""
    maps, time = layer_maps(net, x, t, more), net.uem_time(t)
    return torch.stack([certainty_maps(net, i, tokens, time).mean(dim=(1, 2)) for i, tokens in enumerate(maps)])


@torch.no_grad()
def mix_exits(net: UViT, x, t, more, threshold: float = THRESHOLD) -> None:
    """Biases by which as many of these rows leave at every layer."""
    maps, time = layer_maps(net, x, t, more), net.uem_time(t)
    staying = torch.ones(len(x), dtype=torch.bool)
    for i, head in enumerate(net.lte_classifer):
        nn.init.zeros_(head.lte.bias)
        logits, (low, high) = certainty_maps(net, i, maps[i], time).logit(), (-9.0, 9.0)
        share = int(staying.sum()) // (len(maps) - i)
        for _ in range(30):
            bias = (low + high) / 2
            sure = ((logits + bias).sigmoid().mean(dim=(1, 2)) > threshold) & staying
            low, high = (bias, high) if sure.sum() < share else (low, bias)
        nn.init.constant_(head.lte.bias, high + 1e-4)
        staying &= certainty_maps(net, i, maps[i], time).mean(dim=(1, 2)) <= threshold


def digits_checkpoint(folder: Path) -> Path:
    """The file of an untrained network of configs/digits_uvit.py with heads, at the threshold 0.5."""
    config = load("configs/digits_uvit.py:early_exit")
    torch.manual_seed(0)
    net = build_backbone(config.backbone).eval()
    for head in net.lte_classifer:
        nn.init.normal_(head.lte.weight, std=0.5)
    path = folder / "digits.safetensors"
    save_backbone(path, net.state_dict(), build.describe(config))
    return path

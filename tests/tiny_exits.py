"""A tiny U-ViT on the digits whose images leave at all its layers, as a config file and its checkpoint."""

from pathlib import Path

import torch
from torch import nn

from libs import build
from libs import config as config_files
from libs.checkpoint import build_backbone, save_backbone
from libs.exits.random_heads import add_random_heads

CPU = torch.device("cpu")
THRESHOLD = 0.5
CONFIG = '''
from libs.defaults import base_config, uvit_backbone
from libs.methods import METHODS, apply_methods

def get_config(methods=""):
    config = base_config()
    config.checkpoint = "{checkpoint}"
    config.backbone = uvit_backbone(8, 2, 32, 4, 2, in_chans=1, num_classes=11)
    config.cond.update(kind="label", num_classes=10, null_label=10)
    config.data.update(name="digits", path="", image_size=8, channels=1, flip=False)
    config.compute.update(rows=4, device="cpu")
    config.sampler.steps = 6
    config.eval.update(metrics=(), benchmark_repeats=2)
    apply_methods(config, methods, METHODS)
    if "early_exit" in config:
        config.policy.threshold = {threshold}
    config.eval.benchmark_rows = (1,)
    return config
'''


def write(folder: Path, heads: bool = True) -> Path:
    """The config's file; its checkpoint lies beside it."""
    path = folder / "tiny.py"
    path.write_text(CONFIG.format(checkpoint=folder / "tiny.safetensors", threshold=THRESHOLD))
    config = config_files.load(f"{path}:early_exit")
    torch.manual_seed(0)
    net = build_backbone({name: value for name, value in config.backbone.items() if name != "uem"}).eval()
    for parameter in net.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)  # layers that change much, heads that tell images apart
    description = build.describe(config)
    if heads:
        add_random_heads(net, config, description, CPU, 0.6)
    else:
        description["backbone"].pop("uem")
    save_backbone(folder / "tiny.safetensors", net.state_dict(), description)
    return path

"""Weights of a training run for release, in half precision: python -m libs.release RUN OUT.safetensors"""

import sys
from pathlib import Path

import torch

from .checkpoint import read, resolve, save_backbone
from .errors import UserError


def main(argv: list[str]) -> int:
    if len(argv) != 2 or not argv[1].endswith(".safetensors"):
        print("usage: python -m libs.release RUN OUT.safetensors", file=sys.stderr)
        return 2
    try:
        tensors, description = read(resolve(argv[0], "RUN"))
        save_backbone(Path(argv[1]), tensors, description, torch.float16)
    except UserError as error:
        print("error:", error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Multiply-adds per image, counted on the calls that a sampling loop makes.

The counter watches every operation that runs, so a policy that skips work, a guided pair and a solver's extra
evaluations are all counted as they happen. Attention products (Q K^T and the weights times V) are counted
apart, since published numbers leave them out as often as not.
"""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .backbones.attention import sdpa_attention
from .generate import Chain
from .policies import Full

# Functions that multiply two activations. Layers multiply by a weight: F.linear, F.conv2d.
PRODUCTS = {F.scaled_dot_product_attention, torch.matmul, torch.bmm, torch.baddbmm,
            torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.bmm}
# Kernels of scaled_dot_product_attention whose formula torch's counter lacks in some versions or on some devices.
KERNELS = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_fused_attention_overrideable",
           "_scaled_dot_product_attention_math_for_mps")


def _attention_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(q_shape, k_shape, v_shape)


class MacCounter(TorchFunctionMode):
    """Multiply-adds of matrix products and convolutions that run in the `with` block, on any device.

    total       all of them, for all rows of all calls
    attention   those of attention products: the fused kernels, and products of two activations
    """

    def __init__(self):
        super().__init__()
        mapping = {getattr(torch.ops.aten, name): _attention_flops for name in KERNELS}
        self._flops = FlopCounterMode(display=False, custom_mapping=mapping)
        self._attention_flops = 0

    def __enter__(self):
        self._flops.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._flops.__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        before = self._flops.get_total_flops()
        out = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            self._attention_flops += self._flops.get_total_flops() - before
        return out

    @property
    def total(self) -> int:
        return self._flops.get_total_flops() // 2  # one multiply-add is two operations

    @property
    def attention(self) -> int:
        return self._attention_flops // 2


@contextlib.contextmanager
def countable(net: nn.Module) -> Iterator[None]:
    """Run `net` uncompiled and with torch's own attention: the counter does not see into other kernels."""
    layers = [(layer, layer.attention_function) for layer in net.modules() if hasattr(layer, "attention_function")]
    for layer, _ in layers:
        layer.attention_function = sdpa_attention
    try:
        with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            # The hooks are the counter's.
            warnings.filterwarnings("ignore", message=r".*torch\.compile.* when there are global hooks")
            yield
    finally:
        for layer, function in layers:
            layer.attention_function = function


def gmacs_per_image(chain: Chain, seeds: list[int], labels: list[int] | None = None) -> dict[str, float]:
    """Giga multiply-adds of all network calls for one image, the mean over `seeds` (an untimed pass of its own).

    Both rows of a guided pair count. The codec's decoder and the text encoder do not. `counted_images` says how many
    seeds that is: one is enough for a policy that does the same for every image.
    """
    chain.policy.start(chain.denoiser.time_input(chain.times))  # what a policy does once is no cost of an image
    if chain.contexts is not None:
        chain.contexts(seeds)  # embeds the texts, which is no call of the network
    elif chain.shown is not None and "text" in chain.conditioners.reads:
        chain.shown(seeds, None if labels is None else torch.tensor(labels, device=chain.device))
    counted = replace(chain, rows=len(seeds))
    if type(chain.policy) is Full:  # all its calls are the same, so one step stands for all
        counted = replace(counted, ts=chain.ts[[0, -1]])
    with countable(chain.policy.net), MacCounter() as counter:
        counted.sample(seeds, labels)
    unit = 1e9 * len(seeds) * counted.nfe / chain.nfe
    return {"with_attention_products": counter.total / unit,
            "without_attention_products": (counter.total - counter.attention) / unit,
            "counted_images": len(seeds)}

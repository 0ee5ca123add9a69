"""Softmax attention, three ways: torch's fused kernel (default), xformers on request, plain as the reference."""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError, choose


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's `scaled_dot_product_attention`; q, k, v and the result are (b, heads, l, d)."""
    return F.scaled_dot_product_attention(q, k, v)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, written out; the (l, l) matrix is stored."""
    weights = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5  # b heads l l
    return weights.softmax(dim=-1) @ v


def xformers_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """xformers' memory-efficient attention, which wants (b, l, heads, d)."""
    from xformers.ops import memory_efficient_attention

    out = memory_efficient_attention(*(each.transpose(1, 2).contiguous() for each in (q, k, v)))
    return out.transpose(1, 2)


ATTENTION = {"sdpa": sdpa_attention, "xformers": xformers_attention, "plain": plain_attention}


def choose_attention(name: str):
    """The function called `name`; xformers must be installed when it is asked for."""
    function = choose("attention", name, ATTENTION)
    if name == "xformers" and importlib.util.find_spec("xformers") is None:
        raise UserError("attention='xformers' needs the package xformers (requirements-xformers.txt); "
                        "installed here: sdpa, plain")
    return function


def set_attention(net: torch.nn.Module, name: str) -> None:
    """Switch every attention layer of `net` that has a `function` to the one called `name`."""
    function = choose_attention(name)
    for module in net.modules():
        if hasattr(module, "attention_function"):
            module.attention_function = function

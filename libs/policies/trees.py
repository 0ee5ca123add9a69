"""Nested arguments and outputs of networks: tensors in tuples, lists and dicts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def tensor_map(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply `function` to every tensor in nested tuples, lists and dicts (diffusers' outputs are dicts)."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(tensor_map(function, each) for each in value))
    if isinstance(value, tuple | list):
        return type(value)(tensor_map(function, each) for each in value)
    if isinstance(value, dict):
        return type(value)(**{key: tensor_map(function, each) for key, each in value.items()})
    return value


def repeat_rows(value: Any, rows: int) -> Any:
    """Repeat the whole batch of every tensor until it has `rows` rows."""
    return tensor_map(lambda x: x if len(x) == rows else x.repeat(rows // len(x), *[1] * (x.dim() - 1)), value)


def signature(sample: Tensor) -> tuple:
    """What decides whether features made for one input fit another."""
    return sample.shape, sample.dtype, sample.device


def own_lists(given: dict) -> dict:
    """diffusers pops adapters' residuals from the list that it is given; ours are needed again."""
    return {name: list(value) if isinstance(value, list) else value for name, value in given.items()}


def repeat_argument(value: Any, k: int) -> Any:
    """An argument for k copies of the batch, one after another."""
    return tensor_map(lambda x: x.repeat(k, *[1] * (x.dim() - 1)) if x.dim() else x, value)


def own_copy(new: Tensor, buffer: Tensor | None) -> Tensor:
    """`new` in memory of our own, `buffer` where it fits."""
    if buffer is not None and buffer.shape == new.shape and buffer.dtype == new.dtype:
        return buffer.copy_(new)
    return new.detach().clone()


def map_beside(function: Callable[[Tensor, Any], Tensor], value: Any, beside: Any) -> Any:
    """`function(tensor, its counterpart in beside or None)` over nested tuples."""
    if isinstance(value, Tensor):
        return function(value, beside)
    if isinstance(value, tuple | list):
        others = beside if isinstance(beside, tuple | list) and len(beside) == len(value) else [None] * len(value)
        return tuple(map_beside(function, each, other) for each, other in zip(value, others, strict=True))
    return value


def same_values(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.device == b.device and bool(torch.equal(a, b))


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors that are both still there are views of the same values; the device is not waited for."""
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)


def equal(a: Any, b: Any, same: Callable[[Tensor, Tensor], bool] = same_values) -> bool:
    """Equality of nested arguments; the same objects, the usual case, are not looked into. same: compares tensors."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return same(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key], same) for key in a)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(equal(*each, same) for each in zip(a, b, strict=True))
    return type(a) is type(b) and a == b

"""Hooks on the blocks of a network that let its own forward skip them.

A root hook (`StepCache`) decides for every call whether the network runs in full or reuses; the hooks here obey. The
model's forward does all the plumbing, so what it can do (ControlNet and adapter residuals, added conditions, LoRA,
FreeU) it still does.

What a hook remembers goes through two attributes. A full call leaves what it computed in `fresh`; the root, which
torch.compile does not trace, then copies it into memory of its own and hands that to `memory` before a call that
reuses. So a compiled graph never sees state that changes, and the buffers of a CUDA graph are not kept.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from ..errors import UserError
from .trees import repeat_rows, tensor_map

# Under torch.compile only the network itself is compiled: frames marked `through` are skipped but let what they call
# be compiled, frames marked `outside` run as plain Python with all that they call.
through = torch.compiler.disable(recursive=False)
outside = torch.compiler.disable


class Mode:
    """What the hooks of one network do in the present call."""

    def __init__(self):
        self.reuse = False


class OwnHook(ModelHook):
    """A hook that refuses to be copied with its module, whose copy would run the original's weights for good: the
    `forward` that diffusers put on it is bound to the original.
    """

    def __deepcopy__(self, memo: dict):
        self._refuse()

    def __reduce__(self):
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UserError("a network with a caching policy cannot be copied or pickled; disable() the policy first, "
                        "or save its state_dict()")


class SiteHook(OwnHook):
    """What all site hooks share. `mode` is common to the network."""

    def __init__(self, mode: Mode):
        super().__init__()
        self.mode = mode
        self.fresh: Any = None
        self.memory: Any = None

    def run(self, *args, **kwargs):
        return self.fn_ref.original_forward(*args, **kwargs)


class Drop(SiteHook):
    """Reuse: the block does not run, and nobody looks at what it returns."""

    def new_forward(self, module: nn.Module, *args, **kwargs):
        if self.mode.reuse:
            return _fresh_hidden(self.memory)
        out = self.run(*args, **kwargs)
        hidden, *rest = out if isinstance(out, tuple) else (out,)
        # The hidden state keeps its shape, as adapters add to it in place; residuals need none.
        placeholders = (torch.zeros_like(hidden), *tensor_map(lambda x: x.new_zeros(()), tuple(rest)))
        self.fresh = placeholders if isinstance(out, tuple) else placeholders[0]
        return out


class Replay(SiteHook):
    """Reuse: the block returns what it returned in the last full call, for each of the copies in a decoder batch."""

    def new_forward(self, module: nn.Module, *args, **kwargs):
        if self.mode.reuse:
            hidden = args[0] if args else next(iter(kwargs.values()))
            return _fresh_hidden(repeat_rows(self.memory, len(hidden)))
        out = self.run(*args, **kwargs)
        # FreeU and adapters change the middle's output in place. What a down block hands on, the next one replays.
        self.fresh = out.clone() if isinstance(out, Tensor) else out
        return out


class ReplayTokens(SiteHook):
    """`Replay` of a transformer block whose time embedding is a token: that token keeps its own time.

    The cached token moves by as much as the block's input token did since then, for the embedding enters the residual
    stream by addition.
    """

    def __init__(self, mode: Mode, token: int):
        super().__init__(mode)
        self.token = token

    def new_forward(self, module: nn.Module, x: Tensor, *args, **kwargs):
        i = self.token
        if self.mode.reuse:
            out, before = repeat_rows(self.memory, len(x))
            own = out[:, i:i + 1] + (x[:, i:i + 1] - before)
            return torch.cat([out[:, :i], own, out[:, i + 1:]], dim=1)
        out = self.run(x, *args, **kwargs)
        self.fresh = out, x[:, i:i + 1]
        return out


class Deep(SiteHook):
    """The decoder block that hands back r_out, what the low-resolution part of the network computed.

    cut `after` takes r_out behind the block's upsampler, `before` in front of it, where the upsampler still runs.
    In a call that reuses, `adaptor` makes r_out from `memory` (a DeepFeatures without r_in and temb); None hands the
    last one back.
    """

    def __init__(self, mode: Mode, block: nn.Module, cut: str, adaptor: nn.Module | None):
        super().__init__(mode)
        self.adaptor = adaptor
        self.upsamplers = list(getattr(block, "upsamplers", None) or ()) if cut == "before" else []
        self.capture = Capture(mode) if self.upsamplers else None
        self._places = {name: i for i, name in enumerate(inspect.signature(block.forward).parameters)}

    def new_forward(self, module: nn.Module, *args, **kwargs):
        r_in = temb = None
        if self.adaptor is not None and {"r_in", "r_in_key"} & self.adaptor.uses:
            r_in = self._argument("res_hidden_states_tuple", args, kwargs)[0]  # of the outermost block that feeds it
        if self.mode.reuse:
            r_out = self.memory.r_key
            if self.adaptor is not None:
                temb = self._argument("temb", args, kwargs) if "temb" in self.adaptor.uses else None
                r_out = self.adaptor(self.memory._replace(r_in=r_in, temb=temb))
                self.fresh = r_out
            if not self.upsamplers:
                r_out = r_out.clone()  # FreeU changes in place what a block is given
            for upsampler in self.upsamplers:
                # IF's upsamplers are ResNets, which take the time embedding; the others take a size.
                second = "temb" if hasattr(upsampler, "time_emb_proj") else "upsample_size"
                r_out = upsampler(r_out, self._argument(second, args, kwargs))
            return r_out
        out = self.run(*args, **kwargs)
        r_out = self.capture.take() if self.capture is not None else out.clone()
        self.fresh = r_out, r_in
        return out

    def _argument(self, name: str, args: tuple, kwargs: dict):
        place = self._places.get(name, len(args))
        return args[place] if place < len(args) else kwargs.get(name)


class Capture(OwnHook):
    """Holds the first argument of a module in a full call until it is taken: what the upsampler was given."""

    def __init__(self, mode: Mode):
        super().__init__()
        self.mode = mode
        self.seen: Tensor | None = None

    def take(self) -> Tensor | None:
        seen, self.seen = self.seen, None
        return seen

    def new_forward(self, module: nn.Module, *args, **kwargs):
        if not self.mode.reuse:
            self.seen = args[0] if args else kwargs["hidden_states"]
        return self.fn_ref.original_forward(*args, **kwargs)


def attach(module: nn.Module, hook: ModelHook, name: str) -> Callable[[], None]:
    """Register `hook` on `module`; the function returned takes it off again and leaves no trace.

    Others may have wrapped `module.forward` since: then their wrapper stays and calls the module's own forward
    through us.
    """
    had_registry, had_forward = hasattr(module, "_diffusers_hook"), "forward" in vars(module)
    registry = HookRegistry.check_if_exists_or_initialize(module)
    if name in registry.hooks:
        raise UserError(f"this {type(module).__name__} is served by a caching policy already; disable() it before "
                        "another one")
    with _beneath_accelerate(module, "_old_forward" in vars(module) and not registry.hooks):
        registry.register_hook(hook, name)
        installed = module.forward

    def detach() -> None:
        reference = hook.fn_ref
        offloaded = vars(module).get("_old_forward") is installed
        with _beneath_accelerate(module, offloaded):
            wrapped = module.forward is not installed and registry._hook_order[-1] == name
            outer = module.forward
            reference.forward = reference.original_forward  # for wrappers that hold on to it
            registry.remove_hook(name, recurse=False)
            if wrapped:
                module.forward = outer
        if not (wrapped or offloaded or had_forward or registry.hooks):
            del module.forward
        if not had_registry and not registry.hooks:
            del module._diffusers_hook

    return detach


@contextmanager
def _beneath_accelerate(module: nn.Module, offloaded: bool) -> Iterator[None]:
    """`module.forward` is what accelerate's hook wraps: offloading takes that hook off and on after every image, and
    a hook around it would be lost.
    """
    if not offloaded:
        yield
        return
    outer, module.forward = module.forward, module._old_forward
    try:
        yield
    finally:
        module._old_forward, module.forward = module.forward, outer


def _fresh_hidden(out: Any) -> Any:
    """Adapters add to the hidden state in place, so what is cached must not be handed out itself."""
    return out.clone() if isinstance(out, Tensor) else (out[0].clone(), *out[1:])

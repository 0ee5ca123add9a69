"""The running policy behind `Clockwork` and `EncoderPropagation`: which calls reuse, and the memory of what."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from absl import logging
from torch import Tensor, nn

from ..adaptors import DeepFeatures
from ..errors import UserError
from .clocks import AnnouncedClock, Position, TimestepsClock
from .control import ControlReplay
from .decoding import Ahead, ParallelDecoding, condition_of
from .full import Full
from .hooks import Deep, Mode, OwnHook, SiteHook, attach, outside, through
from .sites import Sites, sites, unwrap
from .trees import map_beside, own_copy, own_lists, signature

ROOT = "step_cache"  # name of the hook on the network itself


class Settings(Protocol):
    """What a caching policy is made of: a schedule and sites.

    parallel, max_parallel   decode the steps up to the next key step in batches of so many at most
    """

    parallel: bool
    max_parallel: int

    def is_full(self, index: int, total: int | None) -> bool:
        """Whether step `index` of `total` (None: nobody knows) runs the whole network."""

    def after_step(self, x_T: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
        """What happens to the sampler's state between steps, see `Full.after_step`."""

    def hooks(self, net: nn.Module, parts: Sites, mode: Mode) -> list[tuple[nn.Module, SiteHook]]:
        """The modules to hook, each with its hook. Raises UserError for a network that it cannot serve."""


@dataclass
class Branch:
    """Memory of one guidance branch: kept apart, since the branches' features differ.

    buffers      hook -> what it remembers
    signature    shape, dtype and device of the input that they belong to; None while there are none
    last_full    index of the last full step; gap: steps between it and the one before
    ahead        outputs that a decoder batch made ahead of time
    """

    buffers: dict[SiteHook, Any] = field(default_factory=dict)
    signature: tuple | None = None
    last_full: int = 0
    gap: int = 0
    ahead: Ahead = field(default_factory=Ahead)


@dataclass
class Plan:
    """One call of the network: its arguments by name, its place, its memory (None if nobody can tell whose it is)."""

    given: dict[str, Any]
    where: Position
    branch: Branch | None
    reuse: bool
    stored: Any = None  # its output, if a decoder batch made it


class StepCache(Full):
    """Runs `net` in full on some steps and lets it reuse its own features on the others.

    settings   a `Clockwork` or an `EncoderPropagation`
    clock      tells steps and loops apart; by default by what it sees of the timesteps. `start` announces them.

    Memory is forgotten at the start of every denoising loop, and a call runs in full whenever what it would reuse
    is missing or was made for another shape, dtype or device, or when nobody can tell whose it is.
    """

    def __init__(self, net: nn.Module, settings: Settings, clock: TimestepsClock | None = None):
        super().__init__(net)
        self.settings, self.clock = settings, clock or TimestepsClock()
        self.inner = unwrap(net)
        self.names = list(inspect.signature(type(self.inner).forward).parameters)[1:]  # the input, its time, the rest
        if getattr(self.inner, "_step_cache", None) is not None:
            raise UserError(f"this {type(self.inner).__name__} has a caching policy already "
                            f"({self.inner._step_cache.settings}); disable() it before another one")
        self.mode, self.loop = Mode(), 0
        self.branches: dict[int, Branch] = {}
        self.controls: list[ControlReplay] = []
        self.decoding = ParallelDecoding(self.names, settings.is_full, settings.max_parallel, self._warn)
        self.counts = dict.fromkeys(("full_calls", "reuse_calls", "loops"), 0)
        self._ratios: dict[tuple, Tensor] = {}
        self._warned: set[str] = set()
        self._detach: list[Callable[[], None]] = []
        hooks = settings.hooks(self.inner, sites(self.inner), self.mode)  # refuses before anything is hooked
        self.site_hooks = [hook for _, hook in hooks]
        self.deep = next((hook for hook in self.site_hooks if isinstance(hook, Deep)), None)
        try:
            for module, hook in hooks:
                self._detach.append(attach(module, hook, "step_cache_site"))
                if isinstance(hook, Deep) and hook.capture is not None:
                    self._detach.append(attach(hook.upsamplers[0], hook.capture, "step_cache_capture"))
            self._detach.append(attach(self.inner, Root(self), ROOT))
        except BaseException:
            self._take_off()
            raise
        self.inner._step_cache = self
        self.inner._reset_stateful_cache = self.release  # diffusers' pipelines call it when an image is done

    def prepare(self, chain: Any) -> None:
        """Refuse key steps that the chain's loops do not have, before anything is written."""
        self.settings.is_full(0, chain.nfe)

    def start(self, times: Tensor, rows_per_image: int = 1) -> None:
        super().start(times, rows_per_image)
        if not isinstance(self.clock, AnnouncedClock):
            self.clock = AnnouncedClock()
        self.clock.start(times)

    def after_step(self, x_T: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
        return self.settings.after_step(x_T)

    def reset(self) -> None:
        """The next call begins a new loop. Not needed where steps are announced or come from a scheduler."""
        self.release()
        if isinstance(self.clock, TimestepsClock):
            self.clock.restart()

    def release(self) -> None:
        """Forget all features and free their memory."""
        self.branches.clear()
        for hook in self.site_hooks:
            hook.memory = hook.fresh = None
        if self.deep is not None and self.deep.capture is not None:
            self.deep.capture.take()  # left there by a call that broke off
        for control in self.controls:
            control.memory.clear()

    def replay_control(self, module: nn.Module) -> None:
        """Let a ControlNet beside the network run on key steps only and repeat its residuals on the others."""
        # The clock is asked for anew at each call: `start` exchanges it.
        hook = ControlReplay(lambda *args, **kwargs: self.clock.at(*args, **kwargs), self.settings.is_full,
                             self._drop_ahead)
        self._detach.append(attach(module, hook, "step_cache_control"))
        self.controls.append(hook)

    def when_disabled(self, function: Callable[[], None]) -> None:
        """Call `function` when the policy is taken off."""
        self._detach.append(function)

    def stats(self) -> dict:
        """What ran since the policy was made.

        full_calls, reuse_calls: calls of the network that ran in full and that reused, those included whose output a
        decoder batch had made; decoder_batches: passes that decoded several steps at once, decoded_steps: the steps in
        them, whether they were asked for or not; loops: denoising loops begun.
        """
        control = {"control_calls": sum(hook.calls for hook in self.controls)} if self.controls else {}
        return {**super().stats(), **self.counts, **self.decoding.counts, **control}

    def disable(self) -> nn.Module:
        """Take the hooks off. The network is then what it was before, bit for bit."""
        self._take_off()
        if self.inner.__dict__.get("_step_cache") is self:
            del self.inner._step_cache, self.inner._reset_stateful_cache
        self.release()
        return self.net

    def __call__(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, context: Tensor | None = None,
                 **more: Tensor) -> Tensor:
        return self.net(x, timesteps, y=y, context=context, **more)

    def _take_off(self) -> None:
        while self._detach:
            self._detach.pop()()

    @through
    def call(self, forward: Callable, args: tuple, kwargs: dict) -> Any:
        """One call of the network, whose own forward is `forward`."""
        plan = self._plan(args, kwargs)
        if plan.stored is not None:
            return plan.stored
        try:
            self.mode.reuse = plan.reuse
            out = forward(**own_lists(plan.given))
            self._done(plan)
            if self.settings.parallel and not plan.reuse and plan.branch is not None:
                steps = self._steps_ahead(plan)
                self.mode.reuse = True
                while steps:
                    window = steps[:self.decoding.window]
                    try:
                        decoded = forward(**self.decoding.widened(plan.given, plan.where, window))
                    except (RuntimeError, MemoryError) as error:
                        self.decoding.shrink(error, window)
                        continue
                    self.decoding.keep(plan.branch.ahead, window, decoded)
                    steps = steps[len(window):]
        except BaseException:
            self._forget(plan)  # half-made features are none
            raise
        finally:
            self.mode.reuse = False
        return out

    @outside
    def _plan(self, args: tuple, kwargs: dict) -> "Plan":
        """What this call does; where it reuses, the memory is laid out for it."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        sample = given[self.names[0]]
        self.calls += 1
        self.rows += len(sample)
        where = self.clock.at(given[self.names[1]])
        branch = self.branch_at(where, sample)
        full = self.settings.is_full(where.index, where.total)  # refuses key steps that this loop does not have
        plan = Plan(given, where, branch, reuse=not full and branch is not None and branch.signature is not None)
        if plan.reuse:
            if self.settings.parallel:
                plan.stored = self.decoding.take(branch.ahead, where.index, self._condition(given))
            if plan.stored is None:
                self._recall(plan)
            else:
                self.counts["reuse_calls"] += 1
        return plan

    @outside
    def _done(self, plan: "Plan") -> None:
        if plan.reuse:
            self.counts["reuse_calls"] += 1
            self._keep_correction(plan.branch)
            return
        self.counts["full_calls"] += 1
        if plan.branch is None:
            for hook in self.site_hooks:
                hook.fresh = None
        else:
            self._keep_features(plan)
            plan.branch.signature = signature(plan.given[self.names[0]])

    @outside
    def _forget(self, plan: "Plan") -> None:
        self.branches.pop(plan.where.branch, None)

    def branch_at(self, where: Position, sample: Tensor) -> Branch | None:
        """The memory for a call, emptied if it is another loop's or another input's; None if nobody can tell."""
        if where.loop != self.loop:
            self.branches.clear()
            self.loop = where.loop
            self.counts["loops"] += 1
            if self.deep is not None and self.deep.adaptor is not None:
                self.deep.adaptor.to(sample.device, sample.dtype)  # weights may be stored in another dtype than this
        if where.branch is None:
            self._warn("cannot tell the guidance branches of a step from a loop that begins again, so every call runs "
                       "in full; apply_policy(pipe, ...) or start(times) tells them apart")
            return None
        branch = self.branches.setdefault(where.branch, Branch())
        if branch.signature not in (None, signature(sample)):
            branch = self.branches[where.branch] = Branch()
        return branch

    def _keep_features(self, plan: "Plan") -> None:
        """Copy what a full call left in the hooks into the branch's memory."""
        branch, where = plan.branch, plan.where
        known: dict[int, Tensor] = {}  # a block's hidden state is often its last residual too

        def keep(new: Tensor, old: Any) -> Tensor:
            if id(new) not in known:
                known[id(new)] = own_copy(new, old if isinstance(old, Tensor) else None)
            return known[id(new)]

        for hook in self.site_hooks:
            if hook is self.deep:
                self._keep_deep(hook, branch)
            else:
                branch.buffers[hook] = map_beside(keep, hook.fresh, branch.buffers.get(hook))
            hook.fresh = hook.memory = None
        branch.gap = where.index - branch.last_full
        branch.last_full = where.index
        branch.ahead.outputs.clear()

    def _keep_deep(self, hook: Deep, branch: Branch) -> None:
        r_out, r_in = hook.fresh
        uses = hook.adaptor.uses if hook.adaptor is not None else {"r_key"}
        old = branch.buffers.get(hook, DeepFeatures())
        before = None
        if "r_key_before" in uses:
            before = own_copy(r_out if old.r_key is None else old.r_key, old.r_key_before)
        branch.buffers[hook] = DeepFeatures(
            r_key=own_copy(r_out, old.r_key), r_key_before=before,
            r_prev=own_copy(r_out, old.r_prev) if "r_prev" in uses else None,
            r_in_key=own_copy(r_in, old.r_in_key) if "r_in_key" in uses else None)

    def _keep_correction(self, branch: Branch) -> None:
        """What an adaptor made is the r_prev of the next step."""
        if self.deep is not None and self.deep.fresh is not None:
            memory = branch.buffers[self.deep]
            if memory.r_prev is not None:
                memory.r_prev.copy_(self.deep.fresh)
            self.deep.fresh = None

    @outside
    def _recall(self, plan: "Plan") -> None:
        """Lay the branch's memory out in the hooks."""
        for hook in self.site_hooks:
            memory = plan.branch.buffers[hook]
            if hook is self.deep and hook.adaptor is not None and "ratio" in hook.adaptor.uses:
                memory = memory._replace(ratio=self._ratio(plan.branch, plan.where.index, memory.r_key))
            hook.memory = memory

    def _ratio(self, branch: Branch, index: int, like: Tensor) -> Tensor:
        """Steps since the last full one over the steps between the last two, made once for each pair."""
        value = (index - branch.last_full) / branch.gap if branch.gap else 0.0
        key = value, like.device
        if key not in self._ratios:
            self._ratios[key] = torch.tensor([value], dtype=torch.float32, device=like.device)
        return self._ratios[key]

    @outside
    def _steps_ahead(self, plan: "Plan") -> list[int]:
        """The steps to decode after this full call, whose features are laid out for them."""
        steps = self.decoding.steps(plan.where)
        plan.branch.ahead.condition = self._condition(plan.given)
        self._recall(plan)
        return steps

    def _condition(self, given: dict) -> tuple[Any, ...]:
        return condition_of(given, isinstance(self.clock, AnnouncedClock), bool(self.controls))

    def _drop_ahead(self) -> None:
        """Steps that were decoded ahead were so with other residuals."""
        for branch in self.branches.values():
            branch.ahead.outputs.clear()

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            logging.warning("%s: %s", type(self.settings).__name__, text)
            self._warned.add(text)


class Root(OwnHook):
    """Hands every call of the network to its cache."""

    def __init__(self, cache: StepCache):
        super().__init__()
        self.cache = cache

    @through
    def new_forward(self, module: nn.Module, *args, **kwargs):
        return self.cache.call(self.fn_ref.original_forward, args, kwargs)

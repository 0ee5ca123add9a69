"""`apply_policy`: a caching policy on a diffusers pipeline, whose own `__call__` stays as it is."""

from typing import Any

from torch import nn

from ..errors import UserError
from ..policies.clocks import TimestepsClock
from ..policies.clockwork import Clockwork
from ..policies.encoder_propagation import EncoderPropagation
from .prior_noise import PriorNoise


class Handle:
    """A policy at work on a pipeline; leaving a `with` block disables it.

    disable()   the pipeline as it was before, bit for bit
    stats()     what ran since the policy was applied, see `StepCache.stats`
    """

    def __init__(self, pipe: Any, settings: Clockwork | EncoderPropagation):
        if not isinstance(settings, Clockwork | EncoderPropagation):
            raise UserError(f"apply_policy: {settings!r} is no policy; give it a Clockwork(...) or an "
                            "EncoderPropagation(...)")
        unet = unet_of(pipe, type(settings).__name__)
        clock = TimestepsClock(lambda: getattr(getattr(pipe, "scheduler", None), "timesteps", None),
                               lambda: steps_of_part(pipe))
        self.cache = settings.attach(unet, clock)
        try:
            if isinstance(settings, EncoderPropagation):
                controlnet = getattr(pipe, "controlnet", None)
                for each in getattr(controlnet, "nets", [controlnet]):  # MultiControlNetModel holds several
                    if isinstance(each, nn.Module):
                        self.cache.replay_control(each)
                if settings.prior_noise:
                    self.cache.when_disabled(PriorNoise(pipe, settings, clock).remove)
        except BaseException:
            self.cache.disable()
            raise

    def stats(self) -> dict:
        return self.cache.stats()

    def disable(self) -> None:
        self.cache.disable()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *error) -> None:
        self.disable()


def unet_of(pipe: Any, policy: str) -> nn.Module:
    """The UNet of a pipeline. Raises UserError, which names the policy, where there is none."""
    unet = getattr(pipe, "unet", None)
    if isinstance(unet, nn.Module):
        return unet
    if isinstance(pipe, nn.Module):
        raise UserError(f"{type(pipe).__name__} is a network, and {policy} wants the pipeline around it; for a loop of "
                        f"your own there is {policy}(...).attach(net)")
    raise UserError(f"{type(pipe).__name__} has no UNet, so {policy} cannot serve it; what applies to it are few-step "
                    "students (distillation) and fewer steps of its sampler")


def steps_of_part(pipe: Any) -> int | None:
    """The steps of a pipeline that makes only the first part of an image (SDXL's `denoising_end`, for a refiner); None
    of one that goes on to the end of its scheduler's list.
    """
    return None if getattr(pipe, "denoising_end", None) is None else pipe.num_timesteps


def apply_policy(pipe: Any, settings: Clockwork | EncoderPropagation) -> Handle:
    """Put a `Clockwork` or an `EncoderPropagation` to work on a diffusers pipeline with a UNet.

    It starts afresh with every denoising loop (a new `scheduler.timesteps`, also of another scheduler), whatever
    happened in the last one. Raises UserError for what is no such policy, for a pipeline or a UNet that it cannot
    serve, and for a UNet that has a caching policy already; then nothing was changed.
    """
    return Handle(pipe, settings)

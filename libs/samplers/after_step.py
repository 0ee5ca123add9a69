"""What may be done to the state between two steps of a sampler, or seen of it."""

from collections.abc import Callable

from torch import Tensor

AfterStep = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) -> x_t, after each step or singlestep interval
Watch = Callable[[Tensor, Tensor], None]  # (x_t, t), the state to be looked at


def keep(x_t: Tensor, t: Tensor) -> Tensor:
    """Nothing."""
    return x_t


def watched(sampler: Callable, watch: Watch) -> Callable:
    """The same sampler, which shows its state: x_T, then what each step or singlestep interval leaves."""
    def sampler_watched(denoise, x_T: Tensor, ts: Tensor, schedule, noise: Callable | None = None,
                        after_step: AfterStep = keep) -> Tensor:
        def after_step_watched(x_t: Tensor, t: Tensor) -> Tensor:
            x_t = after_step(x_t, t)
            watch(x_t, t)
            return x_t

        watch(x_T, ts[0])
        return sampler(denoise, x_T, ts, schedule, noise=noise, after_step=after_step_watched)

    return sampler_watched

"""Policies on diffusers' pipelines, in one line.

    from libs.pipelines import Clockwork, EncoderPropagation, apply_policy

    handle = apply_policy(pipe, Clockwork(clock=4))
    image = pipe("a photo of a cat").images[0]
    print(handle.stats())
    handle.disable()  # the untouched pipeline

`with apply_policy(pipe, EncoderPropagation(key_steps="paper", parallel=True)):` disables it at the end of the block.
`load_student(pipe, "jasperai/flash-sd")` makes it sample with a distilled student in 4 steps, see student.py.
"""

from ..policies.clockwork import Clockwork
from ..policies.encoder_propagation import EncoderPropagation
from .apply import Handle, apply_policy
from .published_names import (
    ClockworkWrapper,
    register_faster_forward,
    register_normal_pipeline,
    register_parallel_pipeline,
    seed_everything,
)

__all__ = ["Clockwork", "ClockworkWrapper", "EncoderPropagation", "Handle", "apply_policy", "load_student",
           "register_faster_forward", "register_normal_pipeline", "register_parallel_pipeline", "save_student",
           "seed_everything"]


def __getattr__(name: str):
    if name in ("load_student", "save_student"):
        from . import student  # peft takes seconds to import; policies do without

        return getattr(student, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""What an adaptor may look at."""

from typing import NamedTuple

from torch import Tensor


class DeepFeatures(NamedTuple):
    """Features around the deep part of a UNet at a step that does not run it, for the rows of that step.

    Fields that an adaptor does not list in its `uses` may be None. The deep part is what lies below the cut; r_in
    goes into it and r_out comes out of it. A full step is one that ran it.
    """

    r_in: Tensor | None = None  # (b, c_in, h, w) output of the last encoder block that still runs, this step
    r_in_key: Tensor | None = None  # (b, c_in, h, w) r_in at the last full step
    r_prev: Tensor | None = None  # (b, c_out, h, w) r_out one step ago: real, or the adaptor's own
    r_key: Tensor | None = None  # (b, c_out, h, w) r_out at the last full step
    r_key_before: Tensor | None = None  # (b, c_out, h, w) at the full step before that; r_key until there were two
    ratio: Tensor | None = None  # (1,) steps since the last full step / steps between the last two; 0 until two
    temb: Tensor | None = None  # (b, d) the UNet's time embedding of this step

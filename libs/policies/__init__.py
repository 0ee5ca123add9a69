"""Policies: how much of a backbone runs in this call, behind the backbone's own signature.

One life cycle for all: `start(times, rows_per_image)` before the first call of a denoising loop, calls,
`stats()`, `disable()`.
"""

from .full import Full

POLICIES = {"full": Full}

__all__ = ["POLICIES", "Full"]

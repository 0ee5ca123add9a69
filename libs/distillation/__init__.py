"""What a student or an adaptor learns from a teacher.

Here are objectives for the shared training loop. Clockwork's adaptors have a loop of their own: their data come from
the model itself, `clockwork_adaptor`. It is imported by its full name, since it loads diffusers.
"""

from .progressive import TARGETS, WEIGHTINGS, Guidance, Halving, second_estimate, student_sampler, two_step_target

__all__ = ["TARGETS", "WEIGHTINGS", "Guidance", "Halving", "second_estimate", "student_sampler", "two_step_target"]

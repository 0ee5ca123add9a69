"""What a student learns from a teacher: objectives for the shared training loop."""

from .progressive import WEIGHTINGS, Halving, student_sampler, two_step_target

__all__ = ["WEIGHTINGS", "Halving", "student_sampler", "two_step_target"]

"""Which steps of a denoising loop are key steps: a string, so that a config and a command line can hold it.

    paper          Faster Diffusion's published list for 50 steps, stretched to any number (2312.09608, appendix)
    every:4        steps 0, 4, 8, ...
    0,1,2,3,5,10   these steps, counted from 0
    NAME           another published list, see PUBLISHED
"""

from typing import Any

from ..errors import UserError

# Step indices from 0. The paper counts down from T.
PUBLISHED: dict[str, tuple[int, tuple[int, ...]]] = {  # name -> (steps that the list was made for, the list)
    "50ls": (50, (0, 1, 2, 3, 5, 10, 15, 25, 35)),  # Stable Diffusion, ControlNet, text to video: DDIM
    "50ls2": (50, (0, 10, 11, 12, 15, 20, 25, 30, 35, 45)),  # the ablation's other choices
    "50ls3": (50, (0, 20, 25, 30, 35, 45, 46, 47, 48, 49)),
    "50ls4": (50, (0, 9, 13, 14, 15, 28, 29, 32, 36, 45)),
    "personalised": (50, (0, 1, 2, 3, 5, 10, 15, 25, 35, 40)),  # DreamBooth, Custom Diffusion
    "20ls": (20, (0, 1, 2, 3, 5, 10, 15)),  # Stable Diffusion: DPM-Solver, DPM-Solver++
    "75ls": (75, tuple(i for i in range(75) if i < 10 or i > 65 or i % 5 == 0)),
    "100ls": (100, tuple(i for i in range(100) if i < 10 or i > 85 or i % 5 == 0)),  # DeepFloyd IF, stage 1
    "s2": (50, tuple(i for i in range(50) if i < 20 or i > 40 or i % 2 == 0)),  # IF, stage 2
    "pro": (75, (0, 2, 5, 9, 14, 20, 27, 35, 44, 54, 65)),  # IF, stage 3
}
FORMS = f"every:4, a list such as 0,1,2,3,5,10, or one of paper, {', '.join(PUBLISHED)}"


def check_key_steps(text: Any) -> None:
    """Raise a UserError if `text` is no description of key steps, for whatever number of steps."""
    if not isinstance(text, str):
        raise UserError(f"policy.key_steps={text!r} must be a string: {FORMS}")
    key_steps(text, None)


def key_steps(text: str, total: int | None) -> frozenset[int] | range:
    """The key steps among `total` steps; step 0 is always one of them.

    total None: the number of steps is not known, so lists stand as they were published and nothing bounds them.

    >>> sorted(key_steps("paper", 50)) == [0, 1, 2, 3, 5, 10, 15, 25, 35]
    True
    >>> sorted(key_steps("paper", 20)), sorted(key_steps("every:4", 10)), sorted(key_steps("0,2", 5))
    ([0, 1, 2, 3, 5, 10, 15], [0, 4, 8], [0, 2])
    >>> sorted(key_steps("paper", 100))
    [0, 1, 2, 3, 4, 5, 6, 7, 10, 20, 30, 50, 70]
    """
    if text == "paper":
        return _scaled(*PUBLISHED["20ls" if total is not None and total <= 20 else "50ls"], total, dense=4)
    if text in PUBLISHED:
        return _scaled(*PUBLISHED[text], total)
    if text.startswith("every:"):
        every = _number(text.removeprefix("every:"), text)
        if every < 1:
            raise UserError(f"policy.key_steps={text!r}: the interval must be at least 1")
        return range(0, 2**31 if total is None else total, every)
    steps = frozenset(_number(part, text) for part in text.split(","))
    if 0 not in steps:
        raise UserError(f"policy.key_steps={text!r}: step 0 must be a key step: there is nothing to reuse before it")
    if total is not None and max(steps) >= total:
        raise UserError(f"policy.key_steps={text!r}: step {max(steps)} is out of range; the loop has steps 0 to "
                        f"{total - 1}")
    return steps


def _scaled(made_for: int, steps: tuple[int, ...], total: int | None, dense: int = 0) -> frozenset[int]:
    """A list for `made_for` steps, stretched to `total`; the leading run of `dense` adjacent steps stays dense."""
    if total is None or total == made_for:
        return frozenset(steps)
    scale = total / made_for
    lead = range(max(1, round(dense * scale)))
    return frozenset(min(total - 1, i) for i in (*lead, *(round(step * scale) for step in steps if step >= dense), 0))


def _number(part: str, text: str) -> int:
    if not part.strip().isdecimal():
        raise UserError(f"policy.key_steps={text!r} is unknown; write {FORMS}")
    return int(part)

"""Generation: seeds (and labels, texts, or images to make conditions of) -> images, through every link of the chain.

Image i depends on seed i, and its label, prompt or image, alone. Kernels give a row the same bits only at an equal
number of rows, so the network always sees `rows` images at a time, the last group padded, whatever the batch size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .conditioners import Conditioners, GivenFields, Shown
from .contexts import Contexts
from .data import ImageData
from .denoiser import Denoiser, guided, thresholded
from .errors import UserError
from .policies import Full
from .policies.sites import unwrap
from .random import Stream, normal
from .samplers import evaluation_times


@dataclass
class Chain:
    """Backbone -> Policy -> Denoiser -> Guidance -> Sampler -> Codec, built by `build.make_chain`.

    denoiser      a `Denoiser` around `policy`
    sampler       `sampler(denoise, x_T, ts, schedule, noise)` with its options bound
    ts            (steps + 1,) times
    shape         (c, h, w) of x
    null_label    the class that means no class, None for an unconditional network
    num_classes   labels go from 0 to num_classes - 1
    cfg_scale     w of uncond + w (cond - uncond); 1 is no guidance
    takes_scale   the network takes w as an input and is called once, for no pair
    threshold     None, or (`static`, value) or (`dynamic`, quantile)
    rows          images in one call of the network (twice the rows under guidance)
    contexts      what a text model is shown (`show`); its seeds' texts take the place of labels
    conditioners  of a model with some; `shown` are the images and texts that it is shown (`show_inputs`)
    """

    policy: Full
    denoiser: Denoiser
    sampler: Callable
    ts: Tensor
    codec: Any
    shape: tuple[int, int, int]
    device: torch.device
    null_label: int | None = None
    num_classes: int = 0
    cfg_scale: float = 1.0
    takes_scale: bool = False
    threshold: tuple[str, float] | None = None
    rows: int = 16
    contexts: Contexts | None = None
    conditioners: Conditioners | None = None
    shown: Shown | None = None
    times: Tensor = field(init=False)

    def __post_init__(self):
        self.times = evaluation_times(self.sampler, self.ts, self.denoiser.schedule)

    def show(self, contexts: Contexts) -> None:
        """Make images of these texts from now on. Raises UserError where there is none to be guided against."""
        if self.cfg_scale != 1 and not self.takes_scale and contexts.null is None:
            raise UserError(f"sampler.cfg_scale={self.cfg_scale}: there is no empty_context.npy beside the texts' "
                            "features to guide against; use 1.0")
        self.contexts = contexts

    def show_inputs(self, data: ImageData | None, prompts: Sequence[str] | None = None,
                    fields: GivenFields | None = None) -> None:
        """Make the conditions of these images, which have the model's size, and of these texts and fields, from now on.
        Raises UserError for a field that is not there, and for what the network does not take.
        """
        self.shown = Shown(self.conditioners, data, prompts, fields)
        if self.conditioners.fields:
            label = torch.zeros(1, dtype=torch.long, device=self.device) if self.num_classes else None
            self.conditioners.fits(unwrap(self.policy.net), self.shown([0], label), self.shape[1:])

    def texts(self, seeds: Sequence[int]) -> list[str] | None:
        """The texts that the seeds' images are made from, as far as they are known."""
        shown = self.contexts or self.shown
        return None if shown is None else shown.texts(seeds)

    @property
    def nfe(self) -> int:
        """Network evaluations an image (a guided pair counts as one)."""
        return len(self.times)

    @torch.inference_mode()
    def sample(self, seeds: list[int], labels: list[int] | None = None) -> Tensor:
        """x_0 of up to `rows` images: (len(seeds), c, h, w) float32."""
        count = len(seeds)
        assert 0 < count <= self.rows, f"{count} seeds in a group of {self.rows} rows"
        seeds = [*seeds, *[seeds[-1]] * (self.rows - count)]
        keys = torch.tensor(seeds, device=self.device)
        denoise = self.denoiser
        cond = self._cond(seeds, labels)
        pair = bool(cond) and self.cfg_scale != 1 and not self.takes_scale
        if pair:
            denoise = guided(denoise, self.cfg_scale, self._null(cond))
        if self.takes_scale:
            w = torch.full((self.rows,), self.cfg_scale, dtype=torch.float32, device=self.device)
            cond = {**cond, "guidance": w}
        if self.threshold is not None:
            denoise = thresholded(denoise, self.denoiser.schedule, *self.threshold)
        self.policy.start(self.denoiser.time_input(self.times), rows_per_image=2 if pair else 1)

        x_T = normal(keys, 0, self.shape, Stream.START)
        after_step = self.policy.after_step(x_T)
        x_0 = self.sampler(lambda x, t: denoise(x, t, cond), x_T, self.ts, self.denoiser.schedule,
                           noise=lambda k: normal(keys, k, self.shape, Stream.STEP),
                           **({} if after_step is None else {"after_step": after_step}))
        self.policy.finish(count)
        return x_0[:count]

    def _cond(self, seeds: list[int], labels: list[int] | None) -> dict[str, Tensor]:
        """What the network is given for `rows` seeds; the last label stands for those that are missing."""
        if self.contexts is not None:
            return self.contexts.conditions(seeds)
        y = None
        if labels is not None:
            y = torch.tensor([*labels, *[labels[-1]] * (self.rows - len(labels))], device=self.device)
        if self.conditioners is not None:
            if self.shown is None:
                raise UserError("cond.kind='image': there is nothing of which to make the conditions")
            return self.shown(seeds, y)
        return {} if y is None else {"y": y}

    def _null(self, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same of no label, of the empty text, or of no image."""
        if self.contexts is not None:
            return self.contexts.unconditional(cond)
        if self.conditioners is not None:
            return self.conditioners.unconditional(cond)
        return {"y": torch.full_like(cond["y"], self.null_label)}

    def images(self, seeds: list[int], labels: list[int] | None = None,
               batch_size: int | None = None) -> Iterator[tuple[list[int], Tensor]]:
        """Batches (seeds, uint8 images b h w c) of `batch_size` (default: `rows`) in the seeds' order. Pixels that a
        condition makes known are its image's own.
        """
        batch_size = batch_size or self.rows
        for start in range(0, len(seeds), batch_size):
            batch = seeds[start:start + batch_size]
            groups = []
            for i in range(start, start + len(batch), self.rows):
                stop = min(i + self.rows, start + len(batch))
                x_0 = self.sample(seeds[i:stop], None if labels is None else labels[i:stop])
                made = self.codec.decode(x_0)
                groups.append(made if self.shown is None else self.shown.finish(seeds[i:stop], made))
            yield batch, torch.cat(groups)

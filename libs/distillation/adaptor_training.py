"""The loop that fits an adaptor to trajectories: rounds, updates, checkpoints, and what it tells.

A round draws new trajectories, measures the adaptor on them while they are new, then makes some updates on the newest
few rounds. All of it is a function of the seed and the step, so that a run goes on bit for bit.
"""

import contextlib
import math
import time
from collections.abc import Iterator

import torch
from absl import logging
from ml_collections import ConfigDict
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..adaptors import make_adaptor
from ..adaptors.files import save_adaptor
from ..checkpoint import load_weights
from ..data.order import DataOrder
from ..errors import UserError
from ..policies.clockwork import Clockwork
from ..training import Run
from ..training.ema import EMA
from ..training.loop import INTERRUPTED, TIME_IS_UP, StopSignals
from ..training.optimizer import learning_rate, load_optimizer_state, make_optimizer
from ..training.report import Report
from ..training.run import NEVER, refuse_failure
from ..training.state import Saved
from .trajectories import Teacher, Trajectories, deep_part, reuse_runs, unrolled_error

LEARNED = ("resnet", "unet", "unet_light")
FILE = "adaptor.safetensors"


class AdaptorTraining:
    """Fits an adaptor of the config's `distill` section to a teacher's trajectories; nothing else learns.

    config   its `distill`, `train` and `seed` sections are used; the adaptor learns in float32
    run      the folder, its checkpoints and the processes
    """

    def __init__(self, config: ConfigDict, run: Run, teacher: Teacher):
        self.section, self.train_section, self.seed = config.distill, config.train, config.seed
        self.run, self.processes, self.teacher = run, run.processes, teacher
        section = self.section
        clockwork = Clockwork(section.clock, protect_first=section.protect_first, protect_last=section.protect_last)
        self.runs = reuse_runs(clockwork, teacher.steps)
        if not self.runs:
            raise UserError(f"distill.clock={section.clock}: every one of the {teacher.steps} steps runs in full, so "
                            "there is nothing to stand in for")
        depth, sizes, block = deep_part(teacher.net, section.depth)
        self.options = {"width": section.width} if section.adaptor in LEARNED and section.width else {}
        torch.manual_seed(self.seed)
        self.net = make_adaptor(section.adaptor, **sizes, **self.options).to(self.processes.device)
        self.ema = EMA(self.net, self.train_section.ema)
        self.data = Trajectories(teacher, block, section, self.seed, self.processes)
        self.made_for = {"depth": depth, "cut": "before", **sizes, "network": teacher.network,
                         "sampler": teacher.sampler, "steps": teacher.steps, "clock": section.clock,
                         "protect_first": section.protect_first, "protect_last": section.protect_last}
        self.parameters = list(self.net.parameters())
        self.optimizer = make_optimizer(self.net, self.train_section, self.processes.device)
        self.step, self.seconds, self.fresh_ratio = 0, 0.0, 1.0
        self.failed_step = torch.tensor(NEVER, device=self.processes.device)
        # Since the last log line: what `unrolled_error` gives. Nothing in an update waits for the device.
        self.sums, self.elements = torch.zeros(2, device=self.processes.device), 0

    @property
    def finished(self) -> bool:
        return self.step >= self.train_section.steps

    def restore(self, saved: Saved | None) -> None:
        """Go on from a checkpoint. Raises UserError if it learnt from trajectories of another sampler."""
        if saved is None:
            return
        for name, value in self.teacher.sampler.items():
            held = saved.state["sampler"].get(name)
            if held != value:
                raise UserError(f"--workdir={self.run.workdir}: the adaptor there learns from trajectories with {name}="
                                f"{held!r}, not {value!r}; go on with that, or choose another folder")
        load_weights(self.net, saved.weights, "the run's checkpoint")
        load_weights(self.ema.net, saved.ema, "the run's checkpoint")
        load_optimizer_state(self.optimizer, saved.state["optimizer"])
        self.step, self.seconds = saved.step, saved.state["seconds"]
        self.fresh_ratio = saved.state["fresh_ratio"]

    def train(self, began: float) -> int:
        """Run to `train.steps`. Returns the exit status: 0 at the end or at the time limit, 130 after Ctrl-C.

        began: `time.monotonic()` from which `train.max_minutes` counts. A run that goes on draws the kept rounds once
        more before its first update, for which the limit must leave time.
        Raises UserError, naming the step, when a loss is not finite; nothing is saved after that step.
        """
        section, updates = self.train_section, self.section.updates
        self.run.claim()
        self.report = Report(self.run.workdir, self.step) if self.processes.is_main else None
        self.limit = began + 60 * section.max_minutes if section.max_minutes else math.inf
        self.clock = self.window = time.perf_counter()
        self.logged_at, self.saved_at, self.stop = self.step, self.step, 0
        with StopSignals() as self.signals, self._bar() as self.bar, logging_redirect_tqdm():
            if self.section.adaptor == "ridge":
                self._fit_ridge()
            elif self.step % updates:
                self._draw_all(self.step // updates + 1)
            while not self.finished and not self.stop:
                if self.step % updates == 0 and not self._next_round(self.step // updates):
                    break
                self.update()
                self.bar.update()
                self._look_up()
                if self.step % section.log_every == 0 or self.finished or self.stop:
                    self._log()
                if self.step % section.save_every == 0:
                    self._save()
            if self.step > self.saved_at:
                self._save()
        if self.processes.is_main:
            self.report.curve()
            self.report.close()
            self._say_goodbye()
        return 130 if self.stop == INTERRUPTED else 0

    def _look_up(self) -> int:
        """Why to stop, 0 for no reason; all processes agree."""
        wish = INTERRUPTED if self.signals.received else TIME_IS_UP if time.monotonic() > self.limit else 0
        self.stop = self.processes.agree(wish)
        return self.stop

    def _draw(self, number: int) -> bool:
        """Make the trajectories of a round; False if it was broken off."""
        with self._aside():
            for done in self.data.draw(number):
                self.bar.set_description(f"round {number}: {done * self.processes.count} of "
                                         f"{self.section.trajectories} trajectories")
                if self._look_up():
                    return False
        self.bar.set_description(f"round {number}")
        return True

    def _draw_all(self, end: int) -> bool:
        """Make the rounds before round `end` that are still kept then."""
        return all(map(self._draw, range(max(0, end - self.section.rounds_kept), end)))

    def _next_round(self, number: int) -> bool:
        """Draw a round (after a checkpoint, those before it too), and measure the adaptor on it while it is new."""
        if not (self._draw(number) if self.data.count else self._draw_all(number + 1)):
            return False
        self.fresh_ratio = self._measure()
        return True

    @torch.no_grad()
    def _measure(self) -> float:
        """Squared error on the newest round, in units of the identity adaptor's."""
        newest = self.data.newest
        places = torch.arange(newest.start * len(self.runs), newest.stop * len(self.runs))
        sums = torch.zeros_like(self.sums)
        with self._aside():
            for part in places.split(self.train_section.batch_size):
                sums += torch.stack(unrolled_error(self.ema.net, self.data, self.runs, part)[:2])
            learned, identity = self.processes.sum(sums).tolist()
        return learned / identity

    def update(self) -> None:
        """One optimizer update, the round drawn, on one global batch, of which every process takes its share."""
        step, section = self.step, self.train_section
        rate = learning_rate(step, section.steps, section.lr, section.warmup, section.decay_from)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros_like(self.failed_step, dtype=torch.float32)
        for places in self._places():
            learned, identity, elements = unrolled_error(self.net, self.data, self.runs, places)
            (learned / (elements * section.accumulate)).backward()
            total = total + learned.detach()
            self.sums += torch.stack([learned.detach(), identity])
            self.elements += elements
        for each in self.parameters:
            each.grad = self.processes.mean(each.grad)
        self.step = step = step + 1
        if section.clip_norm:
            nn.utils.clip_grad_norm_(self.parameters, section.clip_norm)
        self.optimizer.step()
        self.ema.update()
        self.failed_step = torch.where(total.isfinite(), self.failed_step, self.failed_step.clamp(max=step))

    def _places(self) -> Iterator[Tensor]:
        """This process's share of the next batch, cut into `train.accumulate` parts: a function of (seed, step).

        Within a round every run of steps comes once before any comes again.
        """
        section, updates = self.train_section, self.section.updates
        share = section.batch_size // self.processes.count
        number, offset = self.step // updates, self.step % updates * share
        key = ((self.seed % 2**20) * 2**32 + number) * self.processes.count + self.processes.rank
        order = DataOrder(self.data.count * len(self.runs), key)
        yield from order(torch.arange(offset, offset + share)).chunk(section.accumulate)

    def _fit_ridge(self) -> None:
        """Closed form, from `rounds_kept` rounds at once; one more, that it has not seen, measures it."""
        kept, data, runs = self.section.rounds_kept, self.data, self.runs
        if not self._draw_all(kept):
            return
        steps = [(run.start - 1, t) for run in runs for t in run]  # the last full step, and one that reuses
        self.net.fit((data.r_in[n, t], data.r_in[n, key], data.r_out[n, key], data.r_out[n, t])
                     for n in torch.arange(data.count).split(self.train_section.batch_size) for key, t in steps)
        self.ema.update()
        if self._next_round(kept):
            self.step = self.train_section.steps
            self.report.scalars(self.step, {"fresh_ratio": self.fresh_ratio})
            self.bar.update(self.step)

    def _log(self) -> None:
        self._refuse_failure()
        learned, identity, elements = self.processes.sum(
            torch.cat([self.sums, self.sums.new_tensor([self.elements])])).tolist()
        now = time.perf_counter()
        rate = (self.step - self.logged_at) * self.train_section.batch_size / (now - self.window)
        self.sums, self.elements = torch.zeros_like(self.sums), 0
        self.logged_at, self.window = self.step, now
        if not self.processes.is_main:
            return
        values = {"loss": learned / elements, "identity_loss": identity / elements, "ratio": learned / identity,
                  "fresh_ratio": self.fresh_ratio}
        self.report.scalars(self.step, {**values, "lr": self.optimizer.param_groups[0]["lr"],
                                        "runs_per_second": rate, "seconds": self._seconds()})
        logging.info("step %d  loss %.5f  identity %.5f  ratio %.4f  on new trajectories %.4f  %.0f runs/s", self.step,
                     *values.values(), rate)

    def _save(self) -> None:
        """The adaptor's file, then the checkpoint: whoever goes on from this has made that."""
        self._refuse_failure()
        if self.processes.is_main:
            trained = {"steps": self.step, "batch_size": self.train_section.batch_size}
            save_adaptor(self.run.workdir / FILE, self.ema.net, self.section.adaptor, self.options,
                         self.made_for | {"trained": trained}, stem=self.teacher.net.conv_in.weight)
            state = {"optimizer": self.optimizer.state_dict()["state"], "seconds": self._seconds(),
                     "fresh_ratio": self.fresh_ratio, "sampler": self.teacher.sampler}
            self.run.checkpoints.save(self.step, self.net.state_dict(), self.ema.net.state_dict(),
                                      {"made_for": self.made_for}, state)
        self.saved_at = self.step

    def _refuse_failure(self) -> None:
        refuse_failure(self.run, int(self.failed_step), self.parameters, self.step)

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """What is done inside does not count in runs/s."""
        before = time.perf_counter()
        yield
        self.window += time.perf_counter() - before

    def _seconds(self) -> float:
        """Spent in training, over all pieces of the run."""
        return self.seconds + time.perf_counter() - self.clock

    def _bar(self) -> tqdm:
        return tqdm(total=self.train_section.steps, initial=self.step, unit="step", dynamic_ncols=True,
                    disable=not self.processes.is_main)

    def _say_goodbye(self) -> None:
        where = f"step {self.step} of {self.train_section.steps}, {self._seconds():.0f} s"
        where += f", {self.run.workdir / FILE}" if self.step else ""
        if self.stop:
            minutes = f"train.max_minutes={self.train_section.max_minutes} are over"
            why = "interrupted" if self.stop == INTERRUPTED else minutes
            logging.info("%s at %s; the same command goes on from there", why, where)
        else:
            logging.info("finished: %s; squared error %.4f of the identity adaptor's on the last round, "
                         "before it learned from them", where, self.fresh_ratio)

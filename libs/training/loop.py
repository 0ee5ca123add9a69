"""The training loop that every method shares; what is learnt comes in as `objective`.

Nothing in a step waits for the device: losses add up there, and a loss that is not finite leaves its step's
number there, which is read at every log line and before anything is saved.
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from absl import logging
from ml_collections import ConfigDict
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..backbones.recompute import recompute_activations
from ..build import make_chain, make_denoiser, prepare_backbone
from ..checkpoint import learned_state, load_learned
from ..data import ImageData
from ..errors import UserError
from ..generate import Chain
from ..weights import has_lora
from . import sharding
from .batches import Batches, show_data
from .ema import EMA
from .objective import Objective, beside
from .optimizer import learning_rate, load_optimizer_state, make_optimizer, parameter_groups
from .quality import Quality, is_better
from .report import Report
from .run import NEVER, Run, refuse_failure
from .setup import with_precision
from .sharding import ShardedEMA, gathered, local, optimizer_shards, shards, whole
from .state import Saved

TIME_IS_UP, INTERRUPTED = 1, 2  # why a run stops before its last step


class Trainer:
    """Fits `net` to `objective(denoiser, batch) -> (b,)`, the mean of which over the global batch is the loss.

    config       its `train`, `compute`, `seed`, `sampler` (of previews) and `eval` sections are used
    run          the folder, its checkpoints and the processes
    net          a backbone in float32; it moves to the processes' device
    description  what the checkpoints say of themselves (`build.describe`)
    objective    with what learns beside the network, and with the terms that it tells of, see `objective.py`
    precision    fp32, bf16 or fp16, of the network's passes
    """

    def __init__(self, config: ConfigDict, run: Run, net: nn.Module, description: Mapping[str, Any],
                 objective: Objective, precision: str = "fp32"):
        self.config, self.section, self.run, self.processes = config, config.train, run, run.processes
        self.description, self.objective = description, objective
        device = self.device = run.processes.device
        self.beside = beside(objective).to(device)
        sharded = sharding.asked_for(self.processes.count)
        reshard = sharded and sharding.read_launcher(config, precision, not [*self.beside.parameters()])
        at_first = torch.device("cpu") if sharded else device  # a device need not hold what is to be sharded
        self.net = prepare_backbone(net, {**config.compute, "compile": False}, at_first)
        self._learn()
        if self.section.grad_checkpoint:
            recompute_activations(self.net)
        self.parallel, self.alone = None, contextlib.nullcontext
        if sharded:
            self.ema = ShardedEMA(self.net, self.section.ema, device)
            sharding.shard(self.net, self.processes, reshard)
            self.ema.follow(self.net)
            self.alone = partial(sharding.unsharded, self.net, reshard)
        else:
            self.ema = EMA(self.net, self.section.ema, apart=config.policy.name != "full")
            if self.processes.count > 1:
                self.parallel = DistributedDataParallel(self.net, [device] if device.type == "cuda" else None)
        called = self.parallel or self.net
        called = torch.compile(called) if config.compute.compile else called
        self.denoiser = make_denoiser(called, description, precision, device)
        self.parameters = [each for each in self.net.parameters() if each.requires_grad]
        self.optimizer = make_optimizer(self.net, self.section, device)
        for group in parameter_groups(self.beside, self.section.weight_decay):
            self.optimizer.add_param_group(group | {"factor": getattr(objective, "lr_factor", 1.0)})
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.chain = self._make_chain(with_precision(config, precision))
        self.quality = Quality(config, self.chain, self.processes) if self.section.eval_every else None
        self.step, self.seconds, self.best, self.images = 0, 0.0, None, None
        self.failed_step = torch.tensor(NEVER, device=device)  # of this process
        self.loss_sum = torch.zeros((), dtype=torch.float32, device=device)  # over its images since the last log
        self.terms: dict[str, tuple[Tensor, int]] = {}  # likewise each term that the objective told of, of how many
        self.grad_norm = torch.zeros((), device=device)

    def restore(self, saved: Saved | None) -> None:
        """Go on from a checkpoint; None starts at step 0."""
        if saved is None:
            return
        load_learned(self.net, shards(saved.weights, learned_state(self.net)), "the run's checkpoint")
        self.ema.load(saved.ema, "the run's checkpoint")
        self.beside.load_state_dict(saved.state.get("beside", {}))
        load_optimizer_state(self.optimizer, optimizer_shards(saved.state["optimizer"], self.optimizer))
        if saved.state["scaler"]:  # empty where the precision was not fp16
            self.scaler.load_state_dict(saved.state["scaler"])
        self.step, self.seconds = saved.step, saved.state["seconds"]
        self.best, self.images = saved.state["best"], saved.state["images"]
        logging.info("going on from step %d", self.step)

    def train(self, data: ImageData, began: float) -> int:
        """Run to `train.steps`. Returns the exit status: 0 at the end or at the time limit, 130 after Ctrl-C.

        began: `time.monotonic()` from which `train.max_minutes` counts.
        Raises UserError, naming the step, when a loss is not finite; nothing is saved after that step.
        """
        self._same_data(data)
        self._show(data)
        self.batches = self._make_batches(data)
        self.run.claim()
        section, processes = self.section, self.processes
        if processes.count > 1:
            logging.info("%d processes share each update, %d images each", processes.count, self.batches.share)
        self.report = Report(self.run.workdir, self.step) if processes.is_main else None
        limit = began + 60 * section.max_minutes if section.max_minutes else math.inf
        self.logged_at = self.step
        self.clock = self.window = time.perf_counter()
        stop = 0
        with StopSignals() as signals, self._bar() as bar, logging_redirect_tqdm():
            while self.step < section.steps and not stop:
                self._update()
                bar.update()
                wish = INTERRUPTED if signals.received else TIME_IS_UP if time.monotonic() > limit else 0
                stop = processes.agree(wish)
                self._at_intervals(stop)
        if processes.is_main:
            self.report.curve()
            self.report.close()
            self._say_goodbye(stop)
        return 130 if stop == INTERRUPTED else 0

    def _make_chain(self, config: Mapping[str, Any]) -> Chain:
        """What the averaged weights sample by."""
        return make_chain(config, self.ema.net, self.description, self.device)

    def _show(self, data: ImageData) -> None:
        """Let the chain make images of the texts, or the conditions, of the training set."""
        show_data(self.chain, self.description, data)

    def _make_batches(self, data: ImageData, kind: type[Batches] = Batches, *options) -> Batches:
        section, processes = self.section, self.processes
        return kind(*options, data, self.chain.codec, self.description["cond"], self.config.data.flip, self.config.seed,
                    section.batch_size, section.accumulate, processes.rank, processes.count, self.chain.conditioners)

    def _update(self) -> None:
        """One optimizer update on one global batch."""
        step, section = self.step, self.section
        seed = (self.config.seed * 1_000_003 + step) * 1_000_003 + self.processes.rank
        torch.manual_seed(seed % 2**63)  # for dropout; all else is drawn from positions
        rate = learning_rate(step, section.steps, section.lr, section.warmup, section.decay_from)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("factor", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros_like(self.loss_sum)
        for part, batch in enumerate(self.batches.parts(step), start=1):
            with self._no_sync() if part < section.accumulate else contextlib.nullcontext():
                loss = self.objective(self.denoiser, batch).sum()
                self.scaler.scale(loss / self.batches.share).backward()
            total += loss.detach()
            self._note_terms(len(batch.positions))
        for each in self.beside.parameters():  # the network's are averaged by DistributedDataParallel, or by shards
            if each.grad is not None:
                each.grad = self.processes.mean(each.grad)
        self.step = step = step + 1
        self.scaler.unscale_(self.optimizer)
        if section.clip_norm or self._due("log_every"):
            grads = [each.grad for each in self.parameters if each.grad is not None]
            self.grad_norm = whole(nn.utils.get_total_norm(grads))
        if section.clip_norm:
            nn.utils.clip_grads_with_norm_(self.parameters, section.clip_norm, self.grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.ema.update()
        self.loss_sum += total
        self.failed_step = torch.where(total.isfinite(), self.failed_step, self.failed_step.clamp(max=step))

    def _note_terms(self, images: int) -> None:
        for name, value in getattr(self.objective, "terms", {}).items():
            total, count = self.terms.get(name, (0.0, 0))
            self.terms[name] = total + value, count + images

    def _at_intervals(self, stop: int) -> None:
        last = self.step == self.section.steps
        if self._due("log_every") or last or stop:
            self._log()
        if stop != INTERRUPTED and self.quality is not None and (self._due("eval_every") or last):
            self._refuse_failure()
            self._try("measurement", self._measure)
        if self._due("save_every") or last or stop:
            self._save()  # with the best that was measured
        if stop != INTERRUPTED and (self._due("preview_every") or (last and self.section.preview_every)):
            self._try("preview", self._preview)

    def _try(self, name: str, show: Callable[[], None]) -> None:
        """What these weights cannot show, such as images by a layer ratio out of their heads' reach, later ones may: it
        is no reason to end a training.
        """
        try:
            show()
        except UserError as error:
            logging.warning("step %d: no %s (%s); the training goes on", self.step, name, error)

    def _due(self, interval: str) -> bool:
        every = self.section[interval]
        return every > 0 and self.step % every == 0

    def _log(self) -> None:
        self._refuse_failure()
        steps, now = self.step - self.logged_at, time.perf_counter()
        images = steps * self.section.batch_size
        loss = float(self.processes.sum(self.loss_sum)) / images
        terms = {name: float(self.processes.mean(total)) / count for name, (total, count) in sorted(self.terms.items())}
        self.loss_sum.zero_()
        self.terms.clear()
        rate = images / (now - self.window)
        self.logged_at, self.window = self.step, now
        if not self.processes.is_main:
            return
        lr, norm = self.optimizer.param_groups[0]["lr"], float(self.grad_norm)
        self.report.scalars(self.step, {"loss": loss, **terms, "lr": lr, "grad_norm": norm,
                                        "images_per_second": rate, "seconds": self._seconds()})
        told = "".join(f"{name} {value:.4f}  " for name, value in terms.items())
        logging.info("step %d  loss %.4f  %slr %.2e  %.0f images/s  gradient norm %.3f", self.step, loss, told, lr,
                     rate, norm)

    def _measure(self) -> None:
        with self._sampling():
            values = self.quality.measure()
            if not self.processes.is_main:
                return
            self.report.scalars(self.step, values)
            told = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            logging.info("step %d  EMA, %d images: %s", self.step, self.section.eval_images, told)
            if is_better(values, self.best):
                self.best = next(iter(values.values()))
                self.run.checkpoints.save_best(learned_state(self.ema.net), self._described() | {"quality": values})

    def _preview(self) -> None:
        with self._sampling():
            if self.processes.is_main:
                self.report.picture(self.step, self.chain, self.section.preview_images)

    def _save(self) -> None:
        with self._aside():
            self._refuse_failure()
            main = self.processes.is_main
            weights, average = gathered(learned_state(self.net), main), gathered(self.ema.state(), main)
            moments = gathered(self.optimizer.state_dict()["state"], main)
            if main:
                state = {"optimizer": moments, "scaler": self.scaler.state_dict(), "seconds": self._seconds(),
                         "best": self.best, "images": self.images, "beside": self.beside.state_dict()}
                self.run.checkpoints.save(self.step, weights, average, self._described(), state)

    def _described(self) -> dict[str, Any]:
        return {**self.description, "trained": {"steps": self.step, "batch_size": self.section.batch_size}}

    def _refuse_failure(self) -> None:
        learned = [*map(local, self.parameters), *self.beside.parameters()]
        refuse_failure(self.run, int(self.failed_step), learned, self.step)

    def _same_data(self, data: ImageData) -> None:
        if self.images not in (None, len(data)):
            raise UserError(f"--config.data: the run in --workdir={self.run.workdir} learns from {self.images} images, "
                            f"the data set now has {len(data)}")
        self.images = len(data)

    def _no_sync(self) -> contextlib.AbstractContextManager:
        return self.parallel.no_sync() if self.parallel else contextlib.nullcontext()

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """What is done inside does not count in images/s, and may use the network as it samples."""
        before = time.perf_counter()
        self.net.eval()
        try:
            yield
        finally:
            self._learn()
            self.window += time.perf_counter() - before

    @contextlib.contextmanager
    def _sampling(self) -> Iterator[None]:
        """Likewise, with averaged weights to sample by. All processes come here together, whichever of them samples."""
        with self._aside(), self.ema.whole():
            yield

    def _learn(self) -> None:
        """The network as it learns. Where that is a LoRA alone, the rest stays in eval mode: without its LoRA it is a
        teacher, which must not drop anything at random.
        """
        self.net.train(not has_lora(self.net))

    def _seconds(self) -> float:
        """Spent in the loop, over all pieces of the run."""
        return self.seconds + time.perf_counter() - self.clock

    def _bar(self) -> tqdm:
        return tqdm(total=self.section.steps, initial=self.step, unit="step", disable=not self.processes.is_main,
                    dynamic_ncols=True)

    def _say_goodbye(self, stop: int) -> None:
        where = f"step {self.step} of {self.section.steps}, checkpoint in {self.run.checkpoints.path(self.step)}"
        if stop:
            why = "interrupted" if stop == INTERRUPTED else f"train.max_minutes={self.section.max_minutes} are over"
            logging.info("%s at %s; the same command goes on from there", why, where)
        else:
            logging.info("finished: %s, %.0f s", where, self._seconds())


class StopSignals:
    """Ctrl-C and SIGTERM only set `received`, so that the step that runs ends well; a second one interrupts."""

    def __init__(self):
        self.received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self.received = True
        signal.signal(number, signal.default_int_handler)

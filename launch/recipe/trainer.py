"""The loop that the recipes share: steps, evaluation, checkpoints, and a clean end."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from .checkpoints import Checkpoints, Progress
from .errors import RunError
from .evaluation import share_buffers
from .interruption import Interruption
from .optimization import Schedule
from .report import Report

# Largest time between two looks at the signals, unless a single step takes longer.
_SECONDS = 3.0


@dataclass
class Task:
    """What is trained on what; model, optimizer and loader are prepared by accelerate.

    Attributes:
        model: gives logits.
        loss: of (model, batch), a mean over this rank's rows; it does all forward passes of a step.
        evaluate: of the model without wrappers; returns what one table row says of the test.
        loader: yields the training batches, equally many on all ranks.
        set_epoch: called with the number of the epoch before it begins.
        schedule: moves the learning rate of `optimizer`.
        classes: names of the classes, by their numbers.
        mean: mean of each band with which images were normalized, as a fraction of white.
        std: standard deviation of each band with which images were normalized, likewise.
        images_per_item: images that one item of the loader holds.
        clip_grad: largest norm of all gradients together; None does not clip.
        ema: timm's `ModelEmaV3` of the model, or None.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Any], Tensor]
    evaluate: Callable[[nn.Module], Mapping[str, Any]]
    loader: Any
    set_epoch: Callable[[int], None]
    optimizer: Optimizer
    schedule: Schedule
    classes: Sequence[str]
    mean: Sequence[float]
    std: Sequence[float]
    images_per_item: int = 1
    clip_grad: float | None = None
    ema: Any = None


class Trainer:
    """The training of a task from wherever `progress` stands.

    Args:
        accelerator: which prepared the task.
        task: what to train.
        checkpoints: where the run is saved at the end of each epoch and when interrupted.
        report: what the run tells about itself.
        epochs: number of passes over the training images.
        max_steps: optimizer steps after which the run ends early; None for no such bound.
        log_interval: largest number of optimizer steps between two looks at the losses and at the
            signals; slow steps are looked at more often, every few seconds.
        save_interval: optimizer steps between two checkpoints inside an epoch; None saves none.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        task: Task,
        checkpoints: Checkpoints,
        report: Report,
        *,
        epochs: int,
        max_steps: int | None,
        log_interval: int,
        save_interval: int | None = None,
    ) -> None:
        self.accelerator, self.task = accelerator, task
        self.checkpoints, self.report = checkpoints, report
        self.epochs, self.max_steps = epochs, max_steps
        self.log_interval, self.save_interval = log_interval, save_interval
        self.progress = Progress()
        self._model = accelerator.unwrap_model(task.model)
        self._pending: list[Tensor] = []
        self._started = 0.0
        self._waited, self._logged = 0.0, 0.0
        self._speed = {"images_per_second": 0.0, "loading": 0.0}
        self._interval = 1

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint that `Checkpoints.find` returned."""
        self.progress = self.checkpoints.load(checkpoint)
        # The rate that was saved is another one if the run is extended to more epochs. What a
        # run has not done at its start is not done here.
        if self.progress.epoch:
            self.task.schedule.step(self.progress.epoch)
        if self._steps():
            self.task.schedule.step_update(self._steps())

    def describe(self) -> str:
        """Return where the run stands, in one line."""
        last = self.checkpoints.last or "none"
        return f"{self._steps()} steps done, last checkpoint {last}"

    def run(self, interruption: Interruption) -> bool:
        """Train to the end, and return True, or to an interruption, and return False."""
        self._started = time.monotonic() - self.progress.seconds
        self.report.start(self.progress, len(self.task.loader))
        while not self._is_finished():
            stopped = self._train_epoch(interruption)
            if self.progress.step == len(self.task.loader):
                self._end_epoch()
            self._save()
            if self._agree(stopped or interruption.requested) and not self._is_finished():
                return False
        if self.progress.step:
            # The run ends inside an epoch, whose row is not that of a whole one.
            self.report.epoch([*self.progress.rows, self._evaluate()], self.progress.losses)
        return True

    def _end_epoch(self) -> None:
        """Evaluate, and begin the next epoch."""
        progress = self.progress
        progress.rows.append(self._evaluate())
        progress.epoch, progress.step = progress.epoch + 1, 0
        self.task.schedule.step(progress.epoch)
        self.report.epoch(progress.rows, progress.losses)

    def _is_finished(self) -> bool:
        return self.progress.epoch == self.epochs or self._is_enough()

    def _is_enough(self) -> bool:
        return self.max_steps is not None and self._steps() >= self.max_steps

    def _steps(self) -> int:
        """Return the number of optimizer steps done since the very start."""
        return len(self.progress.losses) + len(self._pending)

    def _agree(self, requested: bool) -> bool:
        """Return whether any rank asks to stop: they must do so together."""
        if requested:
            self.accelerator.set_trigger()
        return bool(self.accelerator.check_trigger())

    def _save(self) -> None:
        self.progress.seconds = time.monotonic() - self._started
        self.checkpoints.save(self.progress)

    def _train_epoch(self, interruption: Interruption) -> bool:
        """Train to the end of the epoch or of the run; return whether to stop before that."""
        progress, total = self.progress, len(self.task.loader)
        self.task.model.train()
        bar = self.report.bar(progress.epoch, progress.step, total)
        began, done, stopped = time.monotonic(), progress.step, False
        self._waited, self._logged = 0.0, began
        for batch in self._batches():
            self._pending.append(self._step(batch))
            progress.step += 1
            bar.update()
            is_last = self._is_enough() or progress.step == total
            is_save = bool(self.save_interval) and self._steps() % self.save_interval == 0
            if is_last or is_save or len(self._pending) >= self._interval:
                self._log(bar)
                stopped = self._agree(interruption.requested)
            if is_last or stopped:
                break
            if is_save:
                self._save()
        bar.close()
        seconds = time.monotonic() - began
        images = (progress.step - done) * self.task.loader.total_batch_size
        images *= self.task.images_per_item
        self._speed = {"images_per_second": images / seconds, "loading": self._waited / seconds}
        return stopped

    def _batches(self) -> Iterator[Any]:
        """Yield the batches that are left of the epoch, and measure the time spent on waiting."""
        progress, batches = self.progress, self.task.loader
        batches.set_epoch(progress.epoch)
        if progress.step:
            batches = skip_first_batches(batches, progress.step)
            # accelerate 1.10 starts this one at epoch 0.
            batches.set_epoch(progress.epoch)
        # accelerate sets the sampler's epoch but not the dataset's when there are several ranks.
        self.task.set_epoch(progress.epoch)
        began = time.monotonic()
        for batch in batches:
            self._waited += time.monotonic() - began
            yield batch
            began = time.monotonic()

    def _step(self, batch: Any) -> Tensor:
        """Take one optimizer step and return this rank's loss."""
        task = self.task
        loss = task.loss(task.model, batch)
        self.accelerator.backward(loss)
        if task.clip_grad is not None:
            self.accelerator.clip_grad_norm_(task.model.parameters(), task.clip_grad)
        task.optimizer.step()
        task.optimizer.zero_grad()
        if task.ema is not None:
            task.ema.update(self._model)
        task.schedule.step_update(self._steps() + 1)
        return loss.detach()

    def _log(self, bar: tqdm) -> None:
        """Average the pending losses over the ranks, and refuse to go on from a broken one."""
        now = time.monotonic()
        seconds = torch.tensor((now - self._logged) / len(self._pending), dtype=torch.float64)
        own = torch.stack([*self._pending, seconds.to(self._pending[0].device)]).double()
        *losses, seconds_per_step = self.accelerator.reduce(own, "mean").tolist()
        # From a number that all ranks have, because they must look at the same steps.
        self._interval = max(1, min(self.log_interval, int(_SECONDS / seconds_per_step)))
        self._logged = now
        for loss in losses:
            self.progress.losses.append(loss)
            step = len(self.progress.losses)
            if not math.isfinite(loss):
                raise RunError(f"loss must stay finite, got {loss} at step {step}; lower --lr")
            self.accelerator.log({"train/loss": loss}, step=step)
        self._pending.clear()
        rate = self._rate()
        self.accelerator.log({"train/lr": rate}, step=len(self.progress.losses))
        bar.set_postfix(loss=f"{losses[-1]:.4f}", lr=f"{rate:.4f}")

    def _rate(self) -> float:
        return float(self.task.optimizer.param_groups[0]["lr"])

    def _evaluate(self) -> dict[str, Any]:
        """Return what one epoch came to."""
        progress = self.progress
        losses = progress.losses[-progress.step :]
        for module in (self._model, self.task.ema):
            if module is not None:
                share_buffers(self.accelerator, module)
        metrics = self.task.evaluate(self._model)
        self.accelerator.log(dict(_flatten(metrics)), step=len(progress.losses))
        return {
            "epoch": progress.epoch + 1,
            "step": len(progress.losses),
            "lr": self._rate(),
            "train_loss": sum(losses) / len(losses),
            **metrics,
            **self._speed,
            "seconds": time.monotonic() - self._started,
        }


def _flatten(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of nested metrics under the names that trackers show."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value

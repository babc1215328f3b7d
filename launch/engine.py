"""The loop that the recipes share: steps, evaluation, checkpoints, and a clean end.

Sizes: B samples of a rank's batch, S splits, W ranks.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import DataLoaderShard
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from sync_splitbn import split_divergence
from sync_splitbn.data import SplitViews, merge_views

from .checkpoints import Checkpoints, Progress
from .interrupt import Interruption
from .report import Report


@dataclass
class Task:
    """What is trained on what; model, optimizer, scheduler and loaders are prepared.

    Args:
        model: gives logits.
        loss: of (model, input laid out split by split, labels likewise), a mean over this rank.
        train_views: what `train_loader` loads.
        train_loader: yields `[B, S, ...]` and labels, equal batches on all ranks.
        test_loader: yields `[B, 1, ...]` and labels.
        split: whether the model has split layers.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    optimizer: Optimizer
    scheduler: LambdaLR
    train_views: SplitViews
    train_loader: DataLoaderShard
    test_loader: DataLoaderShard
    split: bool


class Trainer:
    """The training of a task from wherever `progress` stands.

    Args:
        accelerator: which prepared the task.
        task: what to train.
        checkpoints: where the run is saved at the end of each epoch and when interrupted.
        report: what the run tells about itself.
        epochs: number of passes over the training images.
        max_steps: optimizer steps after which the run ends early; None for no such bound.
        log_interval: optimizer steps between two looks at the losses and at the signals.
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
    ) -> None:
        self.accelerator, self.task = accelerator, task
        self.checkpoints, self.report = checkpoints, report
        self.epochs, self.max_steps, self.log_interval = epochs, max_steps, log_interval
        self.progress = Progress()
        self._pending: list[Tensor] = []
        self._started = 0.0
        self._rate = 0.0

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint that `Checkpoints.find` returned."""
        self.progress = self.checkpoints.load(checkpoint)
        if self._enough() and self.progress.epoch < self.epochs:
            raise ValueError(
                f"--max-steps must exceed the {self._steps()} steps of {checkpoint}, "
                f"got {self.max_steps}"
            )

    def run(self, interruption: Interruption) -> bool:
        """Train to the end, and return True, or to an interruption, and return False."""
        self._started = time.monotonic() - self.progress.seconds
        self.report.start(self.progress, len(self.task.train_loader), self._divergence())
        while not self._finished():
            stopped = self._train_epoch(interruption)
            whole = self.progress.step == len(self.task.train_loader)
            if stopped and not whole and not self._enough():
                self._save()
                return False
            row = self._row()
            if whole:
                self.progress.rows.append(row)
                self.progress.epoch, self.progress.step = self.progress.epoch + 1, 0
            self._save()
            # A run cut short by max_steps shows its last epoch, but would resume inside it.
            rows = self.progress.rows if whole else [*self.progress.rows, row]
            self.report.epoch(rows, self.progress.losses, self._divergence())
            if self._agree(stopped or interruption.requested) and not self._finished():
                return False
        return True

    def _finished(self) -> bool:
        return self.progress.epoch == self.epochs or self._enough()

    def _enough(self) -> bool:
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
        task, progress = self.task, self.progress
        batches = task.train_loader
        batches.set_epoch(progress.epoch)
        if progress.step:
            batches = skip_first_batches(batches, progress.step)
            # accelerate 1.10 starts this one at epoch 0.
            batches.set_epoch(progress.epoch)
        # accelerate sets the sampler's epoch but not the dataset's when there are several ranks.
        task.train_views.set_epoch(progress.epoch)
        task.model.train()
        total, done = len(task.train_loader), progress.step
        bar = self.report.bar(progress.epoch, done, total)
        began, stopped = time.monotonic(), False
        for views, labels in batches:
            self._pending.append(self._step(*merge_views(views, labels)))
            progress.step += 1
            bar.update()
            enough = self._enough()
            if enough or progress.step == total or progress.step % self.log_interval == 0:
                self._log(bar)
                stopped = self._agree(interruption.requested)
            if enough or stopped:
                break
        bar.close()
        images = (progress.step - done) * task.train_loader.total_batch_size
        self._rate = images / (time.monotonic() - began)
        return stopped

    def _step(self, input: Tensor, labels: Tensor) -> Tensor:
        """Take one optimizer step and return this rank's loss."""
        task = self.task
        loss = task.loss(task.model, input, labels)
        self.accelerator.backward(loss)
        task.optimizer.step()
        task.scheduler.step()
        task.optimizer.zero_grad()
        return loss.detach()

    def _log(self, bar: tqdm) -> None:
        """Average the pending losses over the ranks, and refuse to go on from a broken one."""
        losses = self.accelerator.reduce(torch.stack(self._pending).double(), "mean").tolist()
        for loss in losses:
            self.progress.losses.append(loss)
            step = len(self.progress.losses)
            if not math.isfinite(loss):
                raise RuntimeError(f"loss must stay finite, got {loss} at step {step}; lower --lr")
            self.accelerator.log({"train/loss": loss}, step=step)
        self._pending.clear()
        rate = self.task.scheduler.get_last_lr()[0]
        self.accelerator.log({"train/lr": rate}, step=len(self.progress.losses))
        bar.set_postfix(loss=f"{losses[-1]:.4f}", lr=f"{rate:.4f}")

    def _row(self) -> dict[str, float]:
        """Return what one epoch came to."""
        progress = self.progress
        losses = progress.losses[-progress.step :]
        test_loss, test_accuracy = self._evaluate()
        divergence = [value for values in self._divergence().values() for value in values]
        row = {
            "epoch": progress.epoch + 1,
            "step": len(progress.losses),
            "lr": self.task.scheduler.get_last_lr()[0],
            "train_loss": sum(losses) / len(losses),
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "divergence": sum(divergence) / max(1, len(divergence)),
            "images_per_second": self._rate,
            "seconds": time.monotonic() - self._started,
        }
        kept = {f"test/{name}": row[f"test_{name}"] for name in ("loss", "accuracy")}
        self.accelerator.log(kept | {"divergence": row["divergence"]}, step=len(progress.losses))
        return row

    def _divergence(self) -> dict[str, list[float]]:
        """Return the divergence between the splits by layer, in nats; nothing without splits."""
        if not self.task.split:
            return {}
        return split_divergence(self.accelerator.unwrap_model(self.task.model))

    @torch.no_grad()
    def _evaluate(self) -> tuple[float, float]:
        """Return mean loss and accuracy over the test images, each counted once, with split 0."""
        task = self.task
        task.model.eval()
        gathered = []
        for views, labels in task.test_loader:
            images, labels = merge_views(views, labels)
            logits = task.model(images).float()
            losses = F.cross_entropy(logits, labels, reduction="none")
            hits = (logits.argmax(dim=1) == labels).float()
            gathered.append(self.accelerator.gather_for_metrics(torch.stack([losses, hits], dim=1)))
        seen = torch.cat(gathered)  # [test images, 2]
        assert len(seen) == task.test_loader.total_dataset_length, (
            "an image is missing or counted twice"
        )
        loss, accuracy = seen.double().mean(dim=0).tolist()
        return loss, accuracy

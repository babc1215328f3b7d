"""What a run tells: a bar, a table, results.json, a picture, and where everything lies."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import PIL
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from tqdm import tqdm

import sync_splitbn
from sync_splitbn.diagnostics import plot_split_divergence

from .checkpoints import Progress

# Heading, key and format of the printed table.
_COLUMNS = (
    ("epoch", "epoch", "5.0f"),
    ("step", "step", "6.0f"),
    ("lr", "lr", "7.4f"),
    ("train loss", "train_loss", "10.4f"),
    ("test loss", "test_loss", "9.4f"),
    ("test accuracy", "test_accuracy", "13.2%"),
    ("divergence", "divergence", "10.4f"),
    ("images/s", "images_per_second", "8.0f"),
    ("seconds", "seconds", "7.1f"),
)


class Report:
    """The main process's account of a run; on other ranks every method does nothing.

    Args:
        folder: receives `results.json` and `summary.png`.
        main: whether this is the main process.
        header: what `results.json` says of the run before the first step.
    """

    def __init__(self, folder: Path, *, main: bool, header: dict[str, Any]) -> None:
        self.folder, self.main = folder, main
        self.results = {"status": "running", **header, "versions": versions()}
        self.steps_per_epoch = 1

    def print(self, text: str = "") -> None:
        """Print on the main process alone, at once."""
        if self.main:
            print(text, flush=True)

    def start(
        self, progress: Progress, steps_per_epoch: int, divergence: dict[str, list[float]]
    ) -> None:
        """Print the table's heading, and the rows of epochs done before a resumption."""
        self.steps_per_epoch = steps_per_epoch
        self._record(progress.rows, progress.losses, divergence)
        self.print("  ".join(f"{heading:>{_width(form)}}" for heading, _, form in _COLUMNS))
        for row in progress.rows:
            self.print(_line(row))

    def bar(self, epoch: int, step: int, total: int) -> tqdm:
        """Return a bar for one epoch, shown on a terminal and nowhere else."""
        hidden = None if self.main else True
        return tqdm(
            desc=f"epoch {epoch + 1}", initial=step, total=total, disable=hidden, leave=False
        )

    def epoch(
        self,
        rows: list[dict[str, float]],
        losses: list[float],
        divergence: dict[str, list[float]],
    ) -> None:
        """Print the last row and rewrite `results.json`."""
        self.print(_line(rows[-1]))
        self._record(rows, losses, divergence)
        self.write()

    def _record(
        self,
        rows: list[dict[str, float]],
        losses: list[float],
        divergence: dict[str, list[float]],
    ) -> None:
        if rows:
            self.results |= {key: rows[-1][key] for key in ("test_accuracy", "seconds")}
        self.results |= {"epochs": rows, "losses": losses, "divergence": divergence}

    def write(self, status: str | None = None) -> None:
        """Write `results.json`, whole or not at all."""
        if not self.main:
            return
        self.results["status"] = status or self.results["status"]
        partial = self.folder / "results.json.partial"
        partial.write_text(json.dumps(self.results, indent=1) + "\n")
        os.replace(partial, self.folder / "results.json")

    def draw(self) -> None:
        """Draw loss, accuracy and, with split layers, divergence by layer into `summary.png`."""
        if not self.main:
            return
        panels = 3 if self.results["divergence"] else 2
        figure = Figure(figsize=(5 * panels, 4.2), dpi=120, layout="constrained")
        axes = figure.subplots(1, panels)
        self._draw_loss(axes[0])
        self._draw_accuracy(axes[1])
        if panels == 3:
            plot_split_divergence(self.results["divergence"], axes[2])
            axes[2].set_title("divergence between the splits")
        figure.suptitle(self._caption())
        for panel in axes:
            panel.spines[["top", "right"]].set_visible(False)
        figure.savefig(self.folder / "summary.png")

    def _caption(self) -> str:
        options = self.results["arguments"]
        views = f"{options['aug_splits']} views" if options["aug_splits"] else "1 view"
        norms = "split, synchronized" if options["split_bn"] else "plain"
        return (
            f"{views} of each image, {norms} batch norms, "
            f"{self.results['ranks']} x {self.results['device']}: "
            f"test accuracy {self.results['test_accuracy']:.2%}"
        )

    def _draw_loss(self, axes: Any) -> None:
        losses = np.array(self.results["losses"])
        epochs = [row["step"] / self.steps_per_epoch for row in self.results["epochs"]]
        steps = np.arange(1, len(losses) + 1) / self.steps_per_epoch
        axes.plot(steps, losses, color="C0", alpha=0.3, linewidth=0.8, label="train, each step")
        train = [row["train_loss"] for row in self.results["epochs"]]
        axes.plot(epochs, train, color="C0", marker=".", label="train, mean of the epoch")
        test = [row["test_loss"] for row in self.results["epochs"]]
        axes.plot(epochs, test, color="C1", marker=".", label="test, clean images")
        axes.set(title="loss", xlabel="epoch", ylabel="nats", ylim=(0, None))
        axes.legend(frameon=False)

    def _draw_accuracy(self, axes: Any) -> None:
        epochs = [row["step"] / self.steps_per_epoch for row in self.results["epochs"]]
        accuracy = [row["test_accuracy"] for row in self.results["epochs"]]
        axes.plot(epochs, accuracy, color="C1", marker=".")
        axes.annotate(
            f"{accuracy[-1]:.1%}",
            (epochs[-1], accuracy[-1]),
            xytext=(0, -14),
            textcoords="offset points",
            horizontalalignment="right",
        )
        axes.set(title="test accuracy", xlabel="epoch", ylim=(None, 1))
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)


def versions() -> dict[str, str]:
    """Return what the numbers of a run depend on beside its arguments."""
    return {
        "sync_splitbn": sync_splitbn.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }


def _width(form: str) -> int:
    return int(form.partition(".")[0])


def _line(row: dict[str, float]) -> str:
    return "  ".join(f"{row[key]:{form}}" for _, key, form in _COLUMNS)

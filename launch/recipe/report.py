"""What a run tells: a progress bar, a table, results.json, and the panels of its figure."""

import json
import os
import platform
from collections.abc import Sequence
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

# Key, heading and format of a column of the printed table.
Column = tuple[str, str, str]
_FIRST: tuple[Column, ...] = (
    ("epoch", "epoch", "5.0f"),
    ("step", "step", "6.0f"),
    ("lr", "lr", "7.4f"),
    ("train_loss", "train loss", "10.4f"),
)
_LAST: tuple[Column, ...] = (
    ("images_per_second", "images/s", "8.0f"),
    ("loading", "loading", "7.0%"),
    ("seconds", "seconds", "7.1f"),
)


class Report:
    """The main process's account of a run; on other ranks every method does nothing.

    Args:
        folder: receives `results.json` and the figure.
        main: whether this is the main process.
        columns: what the table shows of a recipe's metrics.
        header: what `results.json` says of the run before the first step.
    """

    def __init__(
        self, folder: Path, *, main: bool, columns: Sequence[Column], header: dict[str, Any]
    ) -> None:
        self.folder, self.main = folder, main
        self.columns = (*_FIRST, *columns, *_LAST)
        self.results: dict[str, Any] = {"status": "running", **header, "versions": versions()}

    def print(self, text: str = "") -> None:
        """Print on the main process alone, at once."""
        if self.main:
            print(text, flush=True)

    def start(self, progress: Progress, steps_per_epoch: int) -> None:
        """Print the table's heading, and the rows of epochs done before a resumption."""
        self.results["steps_per_epoch"] = steps_per_epoch
        self._record(progress.rows, progress.losses)
        self.print("  ".join(f"{heading:>{_width(form)}}" for _, heading, form in self.columns))
        for row in progress.rows:
            self.print(self._line(row))

    def bar(self, epoch: int, step: int, total: int) -> tqdm:
        """Return a bar for one epoch, shown on a terminal and nowhere else."""
        hidden = None if self.main else True
        return tqdm(
            desc=f"epoch {epoch + 1}", initial=step, total=total, disable=hidden, leave=False
        )

    def epoch(self, rows: list[dict[str, Any]], losses: list[float]) -> None:
        """Print the last row and rewrite `results.json`."""
        self.print(self._line(rows[-1]))
        self._record(rows, losses)
        self.write()

    def _record(self, rows: list[dict[str, Any]], losses: list[float]) -> None:
        self.results |= {"epochs": rows, "losses": losses}

    def write(self, status: str | None = None, **entries: Any) -> None:
        """Write `results.json`, whole or not at all."""
        if not self.main:
            return
        self.results |= {"status": status or self.results["status"], **entries}
        partial = self.folder / "results.json.partial"
        partial.write_text(json.dumps(self.results, indent=1) + "\n")
        os.replace(partial, self.folder / "results.json")

    def _line(self, row: dict[str, Any]) -> str:
        return "  ".join(f"{row[key]:{form}}" for key, _, form in self.columns)


def new_figure(panels: int, title: str) -> tuple[Figure, Sequence[Any]]:
    """Return a figure with panels side by side, to be saved by `Figure.savefig`."""
    figure = Figure(figsize=(5 * panels, 4.2), dpi=120, layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(1, panels)))
    figure.suptitle(title)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_loss(axes: Any, results: dict[str, Any], tests: dict[str, str]) -> None:
    """Draw the losses of every step and epoch; `tests` has keys of rows and their labels."""
    steps_per_epoch, rows = results["steps_per_epoch"], results["epochs"]
    losses = np.array(results["losses"])
    epochs = [row["step"] / steps_per_epoch for row in rows]
    steps = np.arange(1, len(losses) + 1) / steps_per_epoch
    axes.plot(steps, losses, color="C0", alpha=0.3, linewidth=0.8, label="train, each step")
    train = [row["train_loss"] for row in rows]
    axes.plot(epochs, train, color="C0", marker=".", label="train, mean of the epoch")
    for number, (key, label) in enumerate(tests.items(), start=1):
        axes.plot(epochs, [row[key] for row in rows], color=f"C{number}", marker=".", label=label)
    axes.set(title="loss", xlabel="epoch", ylabel="nats", ylim=(0, None))
    axes.legend(frameon=False)


def draw_accuracy(axes: Any, results: dict[str, Any], tests: dict[str, str]) -> None:
    """Draw accuracies by epoch; `tests` has keys of rows and their labels."""
    epochs = [row["step"] / results["steps_per_epoch"] for row in results["epochs"]]
    for number, (key, label) in enumerate(tests.items(), start=1):
        accuracy = [row[key] for row in results["epochs"]]
        axes.plot(
            epochs, accuracy, color=f"C{number}", marker=".", label=f"{label}: {accuracy[-1]:.1%}"
        )
    axes.set(title="test accuracy", xlabel="epoch", ylim=(None, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def draw_divergence(axes: Any, divergences: dict[str, dict[str, float]]) -> None:
    """Draw the divergence between the splits, by layer and pair, as a table row holds it."""
    by_pair = {
        layer: {tuple(map(int, pair.split("-"))): value for pair, value in pairs.items()}
        for layer, pairs in divergences.items()
    }
    plot_split_divergence(by_pair, axes)
    axes.set_title("divergence between the splits")


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

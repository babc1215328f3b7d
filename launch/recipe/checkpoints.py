"""Checkpoints from which a run goes on at the very step: where they lie, what they hold."""

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import RunError

_PROGRESS = "progress.json"
_EMA = "ema.safetensors"
_PARTIAL = ".partial"


@dataclass
class Progress:
    """How far a run has come, the same on every rank.

    Args:
        epoch: epochs completed.
        step: optimizer steps done in the epoch after those.
        losses: training loss of every step, the mean over all ranks.
        rows: one table row for each completed epoch.
        seconds: wall time so far, interruptions left out.
    """

    epoch: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)
    rows: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0


class Checkpoints:
    """The checkpoints of one run; every method is called on all ranks together.

    A checkpoint is written under another name and renamed when it is whole, so that what bears
    the name of a checkpoint is one. The last two are kept.

    Args:
        accelerator: whose prepared objects are saved.
        folder: where the checkpoints lie; on several nodes a folder that all of them see.
        fingerprint: what must be equal for a run to go on, by the name the user knows it under.

    Attributes:
        ema: the average of the weights, the same on every rank; a checkpoint holds it if set.
        last: the newest checkpoint that this run wrote or loaded.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, fingerprint: dict[str, Any]) -> None:
        self.accelerator, self.folder = accelerator, folder
        self.fingerprint = fingerprint
        self.ema: nn.Module | None = None
        self.last: Path | None = None

    def find(self, resume: str | None) -> Path | None:
        """Return the checkpoint to go on from, decided by the main process for all.

        Args:
            resume: A checkpoint's path, `"auto"` for the newest here if any, or `None`.

        Raises:
            RunError: The choice is missing, would overwrite a run, or belongs to another one.
        """
        decision: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                decision[0] = self._choose(resume)
            except RunError as error:
                decision[1] = str(error)
        self.last, problem = broadcast_object_list(decision)
        if problem is not None:
            raise RunError(problem)
        return self.last

    def _choose(self, resume: str | None) -> Path | None:
        """Do what `find` does, on one process."""
        present = sorted(self.folder.glob("step-????????"))
        if resume == "auto":
            chosen = present[-1] if present else None
        elif resume is None:
            chosen = None
            if present:
                raise RunError(
                    "--output must be a folder without checkpoints, "
                    f"got {self.folder.parent} with {present[-1].name}; "
                    "pass --resume auto to go on from there, or another --output"
                )
        else:
            chosen = Path(resume)
            if not (chosen / _PROGRESS).is_file():
                raise RunError(f"--resume must be 'auto' or the path of a checkpoint, got {resume}")
            if present and chosen.resolve() != present[-1].resolve():
                raise RunError(
                    f"--resume must name the newest checkpoint of --output, {present[-1]}, "
                    f"got {resume}; pass another --output to branch off"
                )
        if chosen is not None:
            self._check(json.loads((chosen / _PROGRESS).read_text())["fingerprint"], chosen)
        return chosen

    def _check(self, saved: dict[str, Any], path: Path) -> None:
        """Refuse a checkpoint of a run that differs in what decides the numbers."""
        differences = [
            f"{name} must be {saved.get(name)!r} as in {path}, got {value!r}"
            for name, value in self.fingerprint.items()
            if saved.get(name) != value
        ]
        if differences:
            raise RunError(
                "; ".join(differences) + "; start as saved, or anew with another --output"
            )

    def save(self, progress: Progress) -> None:
        """Write a checkpoint named after the number of steps done."""
        target = self.folder / f"step-{len(progress.losses):08d}"
        partial = target.with_name(target.name + _PARTIAL)
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state = {"fingerprint": self.fingerprint, "progress": dataclasses.asdict(progress)}
            if self.ema is not None:
                save_file(contiguous_state(self.ema), partial / _EMA)
            (partial / _PROGRESS).write_text(json.dumps(state))
            os.replace(partial, target)
            for old in sorted(self.folder.glob("step-????????"))[:-2]:
                shutil.rmtree(old)
            for stale in self.folder.glob(f"*{_PARTIAL}"):
                shutil.rmtree(stale)
        self.accelerator.wait_for_everyone()
        self.last = target

    def load(self, path: Path) -> Progress:
        """Restore model, optimizer, average and this rank's random states.

        Raises:
            RunError: This rank's random states are missing; accelerate would say nothing.
        """
        states = path / f"random_states_{self.accelerator.process_index}.pkl"
        if not states.is_file():
            raise RunError(f"{path} must hold {states.name}, got none; the checkpoint is not whole")
        self.accelerator.load_state(str(path))
        if self.ema is not None:
            self.ema.load_state_dict(load_file(path / _EMA))
        return Progress(**json.loads((path / _PROGRESS).read_text())["progress"])


def contiguous_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict as safetensors takes it: contiguous, on the CPU, nothing shared."""
    return {name: value.contiguous().cpu().clone() for name, value in model.state_dict().items()}

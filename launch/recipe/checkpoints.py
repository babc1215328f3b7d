"""Checkpoints from which a run goes on at the very step: where they lie, what they hold.

A checkpoint is a folder `step-<number of steps>`. It is written under another name, with a manifest
of all files as the last, brought to the disk, and renamed: what has the name is whole unless the
disk or somebody damages it later, and then the manifest tells.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import RunError

_PROGRESS = "progress.json"
_MANIFEST = "manifest.json"
_EMA = "ema.safetensors"
_PATTERN = "step-????????"
_PARTIAL = ".partial"
_DELETED = ".deleted"
_KEPT = 2
# A run may be extended.
_EXTENDED = "--epochs"


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
    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


class Checkpoints:
    """The checkpoints of one run; every method is called on all ranks together.

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
            resume: A checkpoint's path, `"auto"` for the newest whole one here if any, or `None`.

        Raises:
            RunError: The choice is missing, damaged, would overwrite a run, or is of another one.
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
        present = sorted(self.folder.glob(_PATTERN))
        if resume is None and present:
            raise RunError(
                "--output must be a folder without checkpoints, "
                f"got {self.folder.parent} with {present[-1].name}; "
                "pass --resume auto to go on from there, or another --output"
            )
        if resume == "auto":
            chosen = self._newest_whole(present)
        else:
            chosen = None if resume is None else self._named(Path(resume), present)
        if chosen is not None:
            saved = json.loads((chosen / _PROGRESS).read_text())["fingerprint"]
            refuse_other_run(saved, self.fingerprint, chosen)
            old, new = (each.get(_EXTENDED) for each in (saved, self.fingerprint))
            if old != new:
                print(
                    f"extended from {old} to {new} epochs: from here on the learning rate follows "
                    f"the schedule of {new}",
                    flush=True,
                )
        return chosen

    def _newest_whole(self, present: list[Path]) -> Path | None:
        """Return the newest whole checkpoint; damaged ones are set aside and reported."""
        for path in reversed(present):
            problem = damage(path)
            if problem is None:
                return path
            # Out of the way of the checkpoint that this run will write after the same step.
            aside = _free_name(path, ".damaged")
            path.rename(aside)
            print(f"passed over {path}: {problem}; kept as {aside.name}", flush=True)
        return None

    def _named(self, chosen: Path, present: list[Path]) -> Path:
        """Return a checkpoint that the user named, or raise."""
        if not chosen.is_dir():
            raise RunError(f"--resume must be 'auto' or the path of a checkpoint, got {chosen}")
        problem = damage(chosen)
        if problem is not None:
            raise RunError(f"--resume must name a whole checkpoint, got {chosen}: {problem}")
        if present and chosen.resolve() != present[-1].resolve():
            raise RunError(
                f"--resume must name the newest checkpoint of --output, {present[-1]}, "
                f"got {chosen}; pass another --output to branch off"
            )
        return chosen

    def save(self, progress: Progress) -> None:
        """Write a checkpoint named after the number of steps done.

        Raises:
            RunError: It cannot be written, on all ranks; the one before stays as it is.
        """
        target = self.folder / f"step-{len(progress.losses):08d}"
        partial = target.with_name(target.name + _PARTIAL)
        self._on_main(target, lambda: self._make_room(partial))
        self._together(target, lambda: self.accelerator.save_state(str(partial)))
        self._on_main(target, lambda: self._complete(progress, partial, target))
        self.last = target

    def _on_main(self, target: Path, action: Callable[[], object]) -> None:
        """Do something on the main process, while the others wait."""
        self._together(target, action if self.accelerator.is_main_process else lambda: None)

    def _together(self, target: Path, action: Callable[[], object]) -> None:
        """Do something on every rank; if one fails, all raise, so that no rank waits for it."""
        problem = None
        try:
            action()
        # A full disk is an OSError or, from safetensors and torch.save, an error of their own.
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        problems = [each for each in gather_object([problem]) if each is not None]
        if problems:
            last = f"{self.last} is whole" if self.last else "there is none before it"
            raise RunError(f"{target} must be written, got {problems[0]}; {last}")

    def _make_room(self, partial: Path) -> None:
        """Make an empty folder, after what killed runs left."""
        for suffix in (_PARTIAL, _DELETED):
            for stale in self.folder.glob(f"{_PATTERN}{suffix}*"):
                shutil.rmtree(stale)
        partial.mkdir(parents=True)

    def _complete(self, progress: Progress, partial: Path, target: Path) -> None:
        """Write what the main process alone writes, give the checkpoint its name, drop old ones."""
        if self.ema is not None:
            save_file(contiguous_state(self.ema), partial / _EMA)
        state = {"fingerprint": self.fingerprint, "progress": dataclasses.asdict(progress)}
        (partial / _PROGRESS).write_text(json.dumps(state))
        files = {path.name: _describe(path) for path in sorted(partial.iterdir())}
        (partial / _MANIFEST).write_text(json.dumps(files, indent=1))
        for path in (*partial.iterdir(), partial):
            _sync(path)
        if target.exists():
            _delete(target)
        partial.rename(target)
        _sync(self.folder)
        for old in sorted(self.folder.glob(_PATTERN))[:-_KEPT]:
            _delete(old)

    def load(self, path: Path) -> Progress:
        """Restore model, optimizer, average and this rank's random states.

        Nothing is unpickled but tensors and plain data: accelerate loads with `weights_only=True`.

        Raises:
            RunError: This rank's random states are missing; accelerate would say nothing.
        """
        states = path / f"random_states_{self.accelerator.process_index}.pkl"
        if not states.is_file():
            raise RunError(f"{path} must hold {states.name}, got none; start with as many ranks")
        self.accelerator.load_state(str(path))
        if self.ema is not None:
            self.ema.load_state_dict(load_file(path / _EMA))
        return Progress(**json.loads((path / _PROGRESS).read_text())["progress"])


def refuse_other_run(saved: dict[str, Any], own: dict[str, Any], path: Path) -> None:
    """Raise if a saved run differs from this one in what decides the numbers, but for more epochs.

    Args:
        saved: what decides them, by the name the user knows it under.
        own: the same of this run.
        path: where the saved one lies.
    """
    differences = [
        f"{name} must be {saved.get(name)!r} as in {path}, got {value!r}"
        for name, value in own.items()
        if saved.get(name) != value and not (name == _EXTENDED and value > saved[name])
    ]
    if differences:
        raise RunError("; ".join(differences) + "; start as saved, or anew with another --output")


def damage(checkpoint: Path) -> str | None:
    """Return what is wrong with the files of a checkpoint, or None if they are as written."""
    try:
        files = json.loads((checkpoint / _MANIFEST).read_text())
        for name, expected in files.items():
            if _describe(checkpoint / name) != expected:
                return f"{name} is not as it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"{_MANIFEST} cannot be read: {error}"
    return None


def contiguous_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict as safetensors takes it: contiguous, on the CPU, nothing shared."""
    return {name: value.contiguous().cpu().clone() for name, value in model.state_dict().items()}


def _describe(path: Path) -> dict[str, Any]:
    """Return size and checksum of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete(path: Path) -> None:
    """Delete a checkpoint; killed half-way, what is left does not bear a checkpoint's name."""
    doomed = _free_name(path, _DELETED)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _free_name(path: Path, suffix: str) -> Path:
    """Return the path with a suffix, and a number where that is taken."""
    numbers = itertools.chain([""], itertools.count(1))
    names = (path.with_name(f"{path.name}{suffix}{number}") for number in numbers)
    return next(name for name in names if not name.exists())

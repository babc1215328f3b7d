"""The command line of a recipe: its defaults, its checks, and the folder of its run.

An option can have two defaults: one for the bundled digits, one for images of one's own.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from .failure import EXIT_ERROR, say_once
from .lock import launcher_of

# A run goes on or is repeated with other values of these; all others decide its numbers.
INDECISIVE = (
    "compare",
    "cpu",
    "log_interval",
    "max_steps",
    "output",
    "resume",
    "save_interval",
    "seeds",
    "timeout",
    "tracker",
    "workers",
)

# timm's trainer has these defaults; its learning rate is `timm_lr`.
_TIMM_DEFAULTS: dict[str, Any] = {
    "epochs": 300,
    "batch_size": 128,
    "lr": None,
    "weight_decay": 2e-5,
    "warmup_epochs": 5.0,
    "reprob": 0.0,
    "workers": 4,
}
_DIGITS_DEFAULTS: dict[str, Any] = {
    "epochs": 10,
    "batch_size": 64,
    "lr": 0.05,
    "weight_decay": 5e-4,
    "warmup_epochs": 2.0,
    "reprob": 0.25,
    "workers": 0,
}


def flag_of(name: str) -> str:
    """Return an option as it is written on the command line."""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """A parser for one recipe.

    Args:
        recipe: name of the module in `launch`.
        description: what the recipe does.
        usage: how it is called; None for the way of a training run.
        digits: defaults for the bundled digits that other recipes have not, or have otherwise.
        data: the same for images of one's own.
        ranges: inclusive ranges of the options that are the recipe's own.
    """

    def __init__(
        self,
        recipe: str,
        description: str,
        *,
        digits: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        ranges: Mapping[str, tuple[float, float]] | None = None,
        usage: str | None = None,
    ) -> None:
        super().__init__(
            prog=recipe,
            usage=usage
            or "accelerate launch --config_file launch/configs/two_processes.yaml "
            f"-m {recipe} [DATA] [options]",
            description=description,
            epilog=None if usage else _EPILOG,
            formatter_class=_Formatter,
            # A mistyped option must not pass for another one.
            allow_abbrev=False,
        )
        self.digits = _DIGITS_DEFAULTS | dict(digits or {})
        self.data = _TIMM_DEFAULTS | {"workers": _workers()} | dict(data or {})
        self.ranges = _RANGES | dict(ranges or {})
        self.name = recipe.rpartition(".")[2]

    def error(self, message: str) -> NoReturn:
        """Print one line, on one rank, and exit."""
        say_once(f"{message}; see {self.prog} --help")
        sys.exit(EXIT_ERROR)

    def two_defaults(self, name: str, text: str) -> str:
        """Return a help text with the default of an option, for digits and for DATA."""
        data = "0.1 x global batch / 256" if name == "lr" else self.data[name]
        return f"{text} (default: {self.digits[name]}; with DATA {data})"

    def parse(self, arguments: list[str] | None) -> argparse.Namespace:
        """Read the command line, fill in the defaults and check what all recipes share."""
        options = self.parse_args(arguments)
        defaults = self.digits if options.data is None else self.data
        for name, value in defaults.items():
            if name in options and getattr(options, name) is None:
                setattr(options, name, value)
        self._check(options)
        if "resume" in options:
            self._resume(options)
        return options

    def _resume(self, options: argparse.Namespace) -> None:
        """Find the folder of the run, and let `resume` be None, "auto" or a checkpoint."""
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            # The launcher has started the ranks anew after a failure.
            options.resume = "auto"
            options.output = (
                options.output or _output_of_launcher(self.name) or _output(self.name, None)
            )
        elif options.resume not in (None, "auto"):
            path = Path(options.resume)
            if (path / "checkpoints").is_dir():
                options.resume, folder = "auto", path
            elif path.is_dir():
                folder = path.parent.parent
            else:
                self.refuse(
                    "resume",
                    f"must be 'auto', or the folder of a run or of a checkpoint, got {path}",
                )
            options.output = options.output or folder
        options.output = options.output or _output(self.name, options.resume)

    def _check(self, options: argparse.Namespace) -> None:
        """Exit with a message if a number is out of its range."""
        for name, (low, high) in self.ranges.items():
            value = getattr(options, name, None)
            if value is not None and not low <= value <= high:
                bounds = f"in [{low}, {high}]" if high < _LARGE else f"at least {low}"
                bounds = "positive" if low == _POSITIVE else bounds
                self.refuse(name, f"must be {bounds}, got {value}")
        output = getattr(options, "output", None)
        if output is not None and output.exists() and not output.is_dir():
            self.refuse("output", f"must be a folder, got {output}, which is a file")
        if options.data is not None and not options.data.is_dir():
            self.error(f"DATA must be a folder of images, got {options.data}, which is none")

    def refuse(self, name: str, problem: str) -> None:
        """Exit with a message about one option."""
        self.error(f"{flag_of(name)} {problem}")


_EPILOG = (
    "Ctrl-C and SIGTERM end the run within seconds, with a checkpoint and exit code 75; --resume "
    "auto goes on. The launcher of several processes adds a traceback of its own and makes the "
    "code 1."
)
_LARGE = 2**63
_FINITE = sys.float_info.max
_POSITIVE = sys.float_info.min
# Inclusive ranges of the options that are numbers; a NaN is in none of them.
_RANGES: dict[str, tuple[float, float]] = {
    "batch_size": (1, _LARGE),
    "clip_grad": (_POSITIVE, _FINITE),
    "crop_pct": (1e-3, 10),
    "epochs": (1, _LARGE),
    "img_size": (1, _LARGE),
    "log_interval": (1, _LARGE),
    "lr": (0, _FINITE),
    "max_steps": (1, _LARGE),
    "model_ema_decay": (0, 1),
    "momentum": (0, 1),
    "num_classes": (1, _LARGE),
    "reprob": (0, 1),
    "save_interval": (1, _LARGE),
    "seed": (0, 2**32 - 1),
    "smoothing": (0, 1),
    "timeout": (_POSITIVE, 1e6),
    "warmup_epochs": (0, _FINITE),
    "weight_decay": (0, _FINITE),
    "workers": (0, _LARGE),
}


def _workers() -> int:
    """Return timm's number of workers, but no more than the cores that each rank has."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_TIMM_DEFAULTS["workers"], cores // ranks))


def _output(name: str, resume: str | None) -> Path:
    """Return the folder of the run that is resumed, or one without a run.

    Every rank finds the same one: no checkpoint is written before all ranks have met.
    """
    newest, number = None, 1
    while _holds_run(folder := _numbered(name, number)):
        newest, number = folder, number + 1
    return newest if resume == "auto" and newest else folder


def _output_of_launcher(name: str) -> Path | None:
    """Return the folder in which this rank's launcher began, before it started ranks anew."""
    number = 1
    while (folder := _numbered(name, number)).is_dir():
        if launcher_of(folder) == os.getppid():
            return folder
        number += 1
    return None


def _holds_run(folder: Path) -> bool:
    """Return whether there is a checkpoint of a run, or of one of several runs."""
    names = ("checkpoints/step-????????", "*/checkpoints/step-????????")
    return any(any(folder.glob(name)) for name in names)


def _numbered(name: str, number: int) -> Path:
    return Path(f"runs/{name}" if number == 1 else f"runs/{name}-{number}")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)

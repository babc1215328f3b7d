"""The command line of `launch.benchmark`."""

import argparse
import functools
import os
import re
from pathlib import Path

import torch

from .implementations import NAMES
from .shapes import LAYOUTS, NETWORKS

_DTYPES = ("float32", "bfloat16", "float16")
_WORLDS = [1, 2, 4, 8]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, or exit with a message that says what must hold."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.benchmark",
        description="Measure SyncSplitBatchNorm beside what one would use instead: a table, a JSON "
        "file and a figure. By default layer by layer; --model takes the training step of a "
        "ResNet-50, --scaling the collectives of a step over several processes.",
        epilog="Several ranks: accelerate launch --config_file launch/configs/two_processes.yaml "
        "-m launch.benchmark; --scaling starts its own.",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--model", action="store_true", help="training step of a ResNet-50 with each implementation"
    )
    mode.add_argument(
        "--scaling",
        type=int,
        nargs="*",
        metavar="W",
        help="collectives of a step over W gloo ranks of this machine (default: 1 2 4 8), for the "
        "first of --shapes, and --splits and --repeats alone",
    )
    _add_what(parser)
    _add_how(parser)
    options = parser.parse_args(arguments)
    if options.splits is None:
        options.splits = [3] if options.scaling is None else [1, 2, 3, 4]
    options.scaling = _WORLDS if options.scaling == [] else options.scaling
    problem = _problem(options)
    if problem is not None:
        parser.error(problem)
    return options


def _add_what(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is measured")
    choose = functools.partial(group.add_argument, nargs="+")
    choose(
        "--shapes",
        default=["resnet50", "small"],
        metavar="SHAPE",
        help=f"networks ({', '.join(NETWORKS)}) whose batch norms to take, or sizes such as "
        "64x56x56 (default: resnet50 small)",
    )
    choose("--splits", type=int, metavar="S", help="equal splits (default: 3)")
    choose("--dtype", choices=_DTYPES, default=["float32"], help="of the input (default: float32)")
    layouts = list(LAYOUTS)
    choose("--layout", choices=layouts, default=layouts, help="memory format (default: both)")
    names = ", ".join(NAMES)
    choose("--contenders", choices=NAMES, default=NAMES, metavar="NAME", help=f"some of {names}")
    add = group.add_argument
    add("--batch-size", type=int, default=96, metavar="N", help="rows a rank (default: 96)")
    add("--image-size", type=int, default=224, metavar="PIXELS", help="of --model (default: 224)")


def _add_how(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("how").add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help=f"(default here: {device})")
    add(
        "--repeats",
        type=int,
        default=15,
        metavar="R",
        help="rounds in which every implementation is timed once (default: 15)",
    )
    add("--threads", type=int, metavar="T", help="CPU threads a rank")
    add(
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
            names = ", ".join(NETWORKS)
            return f"--shapes must be among {names} or CxHxW such as 64x56x56, got {shape}"
    if options.scaling is not None and os.environ.get("WORLD_SIZE", "1") != "1":
        return "--scaling must run as one process: python -m launch.benchmark --scaling"
    if options.scaling is not None and options.shapes[0] not in NETWORKS:
        return f"--shapes must begin with a network for --scaling, got {options.shapes[0]}"
    for splits in options.splits if options.scaling is None else ():
        if options.batch_size % splits:
            return f"--batch-size must be divisible by --splits {splits}, got {options.batch_size}"
    return None

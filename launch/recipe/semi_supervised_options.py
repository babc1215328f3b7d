"""The command line of `launch.semi_supervised`."""

import argparse

from .options import (
    add_augmentation_options,
    add_data_options,
    add_optimization_options,
    add_run_options,
    add_weights_options,
    refuse_augmentation,
)
from .parser import Parser

NORMS = {
    "joint": "all rows share statistics",
    "split": "labelled and unlabelled rows have statistics and parameters of their own",
    "split-shared-affine": "statistics of their own, shared parameters",
    "labelled-only-test": "joint, but tested with statistics of the labelled images alone; the "
    "exported weights keep the joint ones",
    "separate-calls": "joint layers, called for labelled and unlabelled rows one after the other",
}
_DIGITS = {"epochs": 6, "batch_size": 16, "warmup_epochs": 1.0, "reprob": 0.0}
_RANGES = {
    "labelled": (1, 10**9),
    "mu": (1, 10**4),
    "seeds": (1, 1000),
    "missing_classes": (0, 10**6),
    "threshold": (0, 1),
    "unlabelled_weight": (0, 1e6),
    "vat_epsilon": (0, 1e6),
    "vat_xi": (1e-12, 1e6),
    "salt_and_pepper": (0, 1),
    "contrast": (0, 1e3),
    "blur": (0, 1e3),
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, or exit with a message that says what must hold."""
    parser = Parser(
        "launch.semi_supervised",
        "Train on a few labelled images and many unlabelled ones from another domain, and compare "
        "ways to normalize the mixed batch.",
        digits=_DIGITS,
        ranges=_RANGES,
    )
    add_data_options(parser)
    add_weights_options(parser)
    _add_method_options(parser)
    _add_shift_options(parser)
    add_optimization_options(
        parser, "--batch-labelled", "labelled images in a batch of each rank; unlabelled: --mu"
    )
    add_run_options(parser)
    # Smoothed labels keep the network from being sure of a pseudo-label.
    parser.set_defaults(smoothing=0.0)
    options = parser.parse(arguments)
    if options.method == "fixmatch" and options.aa is None:
        parser.refuse("method", "must come with --aa for the strong view, got fixmatch without")
    refuse_augmentation(parser, options, "--method fixmatch", options.method == "fixmatch")
    return options


def _add_method_options(parser: Parser) -> None:
    group = parser.add_argument_group("labelled and unlabelled images")
    group.add_argument(
        "--norm",
        nargs="+",
        choices=NORMS,
        default=["joint", "split"],
        metavar="NORM",
        help="one or several to compare: "
        + "; ".join(f"{name} ({what})" for name, what in NORMS.items()),
    )
    group.add_argument(
        "--method",
        choices=("pseudo-label", "fixmatch", "vat"),
        default="pseudo-label",
        help="what unlabelled rows are trained on: their own most likely class, that of a weak "
        "view (with --aa for the strong one), or robustness to a virtual adversary",
    )
    group.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each NORM")
    group.add_argument(
        "--labelled", type=int, default=100, metavar="N", help="labelled images, alike a class"
    )
    group.add_argument(
        "--mu", type=int, default=4, metavar="N", help="unlabelled images for each labelled one"
    )
    group.add_argument(
        "--targets",
        choices=("frozen", "same"),
        default="frozen",
        help="where pseudo-labels come from: a forward pass of the unlabelled rows before, which "
        "running statistics do not remember, or the training pass itself",
    )
    group.add_argument(
        "--threshold", type=float, default=0.95, help="least probability of a pseudo-label"
    )
    group.add_argument(
        "--unlabelled-weight", type=float, default=1.0, metavar="W", help="of the unlabelled loss"
    )
    group.add_argument(
        "--vat-epsilon", type=float, default=2.5, metavar="L", help="length of the adversary's step"
    )
    group.add_argument(
        "--vat-xi", type=float, default=1e-2, metavar="L", help="length of its trial step"
    )
    add_augmentation_options(parser, group, "for the strong view of fixmatch")


def _add_shift_options(parser: Parser) -> None:
    group = parser.add_argument_group("shift of the unlabelled images")
    group.add_argument(
        "--salt-and-pepper",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share of the pixels that become black or white",
    )
    group.add_argument("--invert", action="store_true", help="black becomes white")
    group.add_argument(
        "--contrast", type=float, default=1.0, metavar="FACTOR", help="1 leaves the image"
    )
    group.add_argument(
        "--blur", type=float, default=0.0, metavar="RADIUS", help="of a Gaussian, in pixels"
    )
    group.add_argument(
        "--missing-classes",
        type=int,
        default=0,
        metavar="N",
        help="last classes that the labelled images lack, which are not tested either",
    )

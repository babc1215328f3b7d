"""The command line of `launch.advprop`."""

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

# Grey values of 0 to 255: digits are black and white, and photographs are not.
_DATA = {"epsilon": 4.0, "step_size": 1.0}
_DIGITS = {"epsilon": 38.0, "step_size": 16.0, "epochs": 3, "warmup_epochs": 1.0, "reprob": 0.0}
_RANGES = {
    "epsilon": (0, 255),
    "step_size": (0, 255),
    "attack_steps": (0, 1000),
    "test_attack_steps": (0, 1000),
    "attacked_tests": (1, 10**9),
    "seeds": (1, 1000),
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, or exit with a message that says what must hold."""
    parser = Parser(
        "launch.advprop",
        "Train on clean and adversarial images in one batch, the adversarial ones with batch norms "
        "of their own, and test clean and attacked images through both.",
        digits=_DIGITS,
        data=_DATA,
        ranges=_RANGES,
    )
    add_data_options(parser)
    add_weights_options(parser)
    _add_attack_options(parser)
    add_optimization_options(parser)
    add_run_options(parser)
    parser.set_defaults(norm="auxiliary")
    options = parser.parse(arguments)
    if not 0 < options.adversarial_share <= 1:
        parser.refuse("adversarial_share", f"must be in (0, 1], got {options.adversarial_share}")
    if options.fine_grained and options.aa is None:
        parser.refuse("fine_grained", "must come with --aa, got no policy of augmentation")
    refuse_augmentation(parser, options, "--fine-grained", options.fine_grained)
    return options


def _add_attack_options(parser: Parser) -> None:
    group = parser.add_argument_group("adversarial images (projected gradient descent)")
    group.add_argument(
        "--epsilon",
        type=float,
        metavar="GREY",
        help=parser.two_defaults(
            "epsilon", "largest change of a pixel, in grey values of 0 to 255"
        ),
    )
    group.add_argument(
        "--step-size",
        type=float,
        metavar="GREY",
        help=parser.two_defaults("step_size", "change of a pixel in one step"),
    )
    group.add_argument("--attack-steps", type=int, default=3, metavar="N", help="gradient steps")
    group.add_argument(
        "--random-start", action="store_true", help="start at a random point within --epsilon"
    )
    group.add_argument(
        "--targeted", action="store_true", help="seek a random other class, not any wrong one"
    )
    group.add_argument(
        "--adversarial-share",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="share of the clean images that also come attacked; the fewer, the faster",
    )
    group.add_argument(
        "--fine-grained",
        action="store_true",
        help="a third split, for augmented images (--aa, --reprob)",
    )
    group.add_argument(
        "--test-attack-steps", type=int, default=5, metavar="N", help="gradient steps in the test"
    )
    group.add_argument(
        "--attacked-tests", type=int, default=300, metavar="N", help="test images that are attacked"
    )
    group.add_argument(
        "--compare",
        action="store_true",
        help="also train with joint statistics of clean and adversarial images, and on clean "
        "images alone",
    )
    group.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each variant")
    add_augmentation_options(parser, group, "for the views of --fine-grained")

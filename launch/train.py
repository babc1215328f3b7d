"""Supervised training with augmentation splits: timm's recipe, over all ranks.

Every image becomes S views, the first clean, the others augmented. A batch is laid out
[clean | augmented | ...], and with `--split-bn` each part has batch norms of its own, whose
statistics cover that part on all ranks. `python -m launch.train --help` says how.
"""

import argparse
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from matplotlib.figure import Figure
from torch import Tensor, nn

from sync_splitbn import convert_sync_split_batchnorm
from sync_splitbn.data import SplitViews, merge_views

from .images.sets import load_images
from .recipe.evaluation import divergence_metrics, evaluate
from .recipe.loading import test_loader, training_loader
from .recipe.losses import create_criterion
from .recipe.optimization import create_schedule
from .recipe.options import (
    add_augmentation_options,
    add_data_options,
    add_optimization_options,
    add_run_options,
    add_weights_options,
)
from .recipe.parser import Parser
from .recipe.preparation import memory_format_of, prepare_model
from .recipe.report import draw_accuracy, draw_divergence, draw_loss, new_figure
from .recipe.run import Recipe, leave, run_recipe
from .recipe.trainer import Task


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, or exit with a message that says what must hold."""
    parser = Parser(
        "launch.train",
        "Train a network with augmentation splits (timm's recipe) and batch norms that are split "
        "and synchronized, on a folder of images or on 5,000 bundled MNIST digits.",
    )
    add_data_options(parser)
    add_weights_options(parser)
    _add_split_options(parser)
    add_optimization_options(parser)
    add_run_options(parser)
    options = parser.parse(arguments)
    if options.aug_splits == 1 or options.aug_splits < 0:
        parser.refuse("aug_splits", f"must be 0 or at least 2, got {options.aug_splits}")
    for name in ("split_bn", "resplit", "jsd_loss"):
        if getattr(options, name) and options.aug_splits < 2:
            parser.refuse(
                name, f"must come with --aug-splits of at least 2, got {options.aug_splits}"
            )
    splits = options.aug_splits if options.split_bn else 1
    if not 0 <= options.eval_split < splits:
        parser.refuse("eval_split", f"must be in [0, {splits - 1}], got {options.eval_split}")
    return options


def prepare(options: argparse.Namespace, accelerator: Accelerator) -> Task:
    """Return data, model, optimizer and schedule: build, load, convert, optimizer, prepare."""

    def convert(model: nn.Module) -> nn.Module:
        splits = options.aug_splits
        return convert_sync_split_batchnorm(model, splits) if options.split_bn else model

    model, optimizer, ema = prepare_model(options, accelerator, convert)
    images = load_images(options, model)
    views = SplitViews(
        images.train,
        images.views(max(1, options.aug_splits), resplit=options.resplit),
        seed=options.seed,
    )
    loader = training_loader(options, accelerator, views)
    tests = test_loader(options, accelerator, images.test)
    model, optimizer, loader, tests = accelerator.prepare(model, optimizer, loader, tests)
    schedule = create_schedule(options, optimizer.optimizer, steps=len(loader))
    # Ranks drop different units, as in timm; the weights and the order are the same.
    set_seed(options.seed, device_specific=True)
    criterion, memory_format = create_criterion(options), memory_format_of(options)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        rows, labels = merge_views(*batch)  # [S * B, C, H, W], split by split
        output: Tensor = criterion(model(rows.contiguous(memory_format=memory_format)), labels)
        return output

    split = options.eval_split if options.split_bn else None

    def metrics(model: nn.Module) -> dict[str, Any]:
        tested = {"test": model} if ema is None else {"test": model, "ema": ema.module}
        found: dict[str, Any] = {}
        for name, each in tested.items():
            pair = evaluate(accelerator, each, tests, split=split)
            found[f"{name}_loss"], found[f"{name}_accuracy"] = pair
        return found | divergence_metrics(model)

    return Task(
        model=model,
        loss=loss,
        evaluate=metrics,
        loader=loader,
        set_epoch=views.set_epoch,
        optimizer=optimizer,
        schedule=schedule,
        classes=images.classes,
        mean=images.mean,
        std=images.std,
        clip_grad=options.clip_grad,
        ema=ema,
    )


def draw(results: dict[str, Any]) -> Figure:
    """Draw loss, accuracy and, with split layers, divergence by layer."""
    options, last = results["arguments"], results["epochs"][-1]
    views = f"{options['aug_splits']} views" if options["aug_splits"] else "1 view"
    norms = "split, synchronized" if options["split_bn"] else "plain"
    figure, axes = new_figure(
        3 if "divergences" in last else 2,
        f"{options['model']}, {views} of each image, {norms} batch norms, "
        f"{results['ranks']} x {results['device']}",
    )
    tested = {"test": "test images"} | ({"ema": "averaged weights"} if "ema_loss" in last else {})
    draw_loss(axes[0], results, {f"{name}_loss": label for name, label in tested.items()})
    draw_accuracy(axes[1], results, {f"{name}_accuracy": label for name, label in tested.items()})
    if "divergences" in last:
        draw_divergence(axes[2], last["divergences"])
    return figure


def conclude(results: dict[str, Any]) -> str:
    """Return the test accuracy in a sentence."""
    last = results["epochs"][-1]
    ema = f" ({last['ema_accuracy']:.2%} of the averaged weights)" if "ema_accuracy" in last else ""
    steps = len(results["losses"])
    return f"test accuracy {last['test_accuracy']:.2%}{ema} after {steps} steps"


def main(arguments: list[str] | None = None) -> int:
    """Train as the command line says, and return the exit code."""
    options = parse_arguments(arguments)
    columns = [("test_loss", "test loss", "9.4f"), ("test_accuracy", "test accuracy", "13.2%")]
    if options.model_ema:
        columns.append(("ema_accuracy", "averaged", "9.2%"))
    if options.split_bn:
        columns.append(("divergence", "divergence", "10.4f"))
    return run_recipe(Recipe(columns, prepare, draw, conclude), options)


def _add_split_options(parser: Parser) -> None:
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
        "--eval-split",
        type=int,
        default=0,
        metavar="K",
        help="split whose statistics and parameters the tests use; 0 is that of clean images",
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
    add_augmentation_options(
        parser, group, "without it views are augmented by random erasing alone"
    )


if __name__ == "__main__":
    leave(main())

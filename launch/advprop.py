"""Adversarial examples as training data, with batch norms of their own (AdvProp).

A batch is laid out [clean | adversarial], or [clean | adversarial | augmented]. The attack runs
through the auxiliary split, and clean images are tested with the statistics of clean images alone.
`python -m launch.advprop --help` says how.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset

from sync_splitbn import assign_splits, convert_sync_split_batchnorm, frozen_stats
from sync_splitbn.data import SplitViews

from .images.sets import load_images
from .recipe.advprop_figures import draw_comparison, draw_run
from .recipe.advprop_options import parse_arguments
from .recipe.attack import Attack
from .recipe.comparison import compare
from .recipe.evaluation import divergence_metrics, evaluate
from .recipe.loading import test_loader, training_loader
from .recipe.models import forward_parts
from .recipe.optimization import create_schedule
from .recipe.preparation import prepare_model
from .recipe.run import Recipe, leave, run_safely
from .recipe.trainer import Task

COLUMNS = (
    ("test_accuracy", "clean", "8.2%"),
    ("attacked_accuracy", "attacked", "8.2%"),
    ("auxiliary_accuracy", "clean by aux", "12.2%"),
    ("auxiliary_attacked_accuracy", "attacked by aux", "15.2%"),
)


def loss_of_batch(
    options: argparse.Namespace,
    accelerator: Accelerator,
    attack: Attack,
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
) -> Tensor:
    """Return the cross-entropy over clean, adversarial and augmented rows alike."""
    views, labels = batch  # [B, V, C, H, W]: clean, and augmented with --fine-grained
    clean, parts, targets = views[:, 0], [views[:, 0]], [labels]
    if options.norm != "clean":
        attacked = max(1, round(options.adversarial_share * len(labels)))
        # Not through DDP: the attack's backward pass leaves the parameters alone, and DDP would
        # wait for their gradients.
        inner = accelerator.unwrap_model(model)
        with frozen_stats(inner), assign_splits(inner, only=_auxiliary(options)):
            adversarial = attack(inner, clean[:attacked], labels[:attacked])
        parts.append(adversarial)
        targets.append(labels[:attacked])
    if options.fine_grained:
        parts.append(views[:, 1])
        targets.append(labels)
    logits = forward_parts(model, parts, is_split=options.norm == "auxiliary")
    return F.cross_entropy(logits.float(), torch.cat(targets), label_smoothing=options.smoothing)


def _auxiliary(options: argparse.Namespace) -> int:
    """Return the split of adversarial images."""
    return 1 if options.norm == "auxiliary" else 0


def prepare(options: argparse.Namespace, accelerator: Accelerator) -> Task:
    """Return data, model, optimizer and schedule: build, load, convert, optimizer, prepare."""
    splits = 2 + options.fine_grained if options.norm == "auxiliary" else 1
    model, optimizer, ema = prepare_model(
        options, accelerator, lambda model: convert_sync_split_batchnorm(model, splits)
    )
    images = load_images(options, model)
    transforms = [images.clean, images.augmented] if options.fine_grained else [images.clean]
    views = SplitViews(images.train, transforms, seed=options.seed)
    model, optimizer, loader, tests, few_tests = accelerator.prepare(
        model,
        optimizer,
        training_loader(options, accelerator, views),
        test_loader(options, accelerator, images.test),
        test_loader(options, accelerator, _spread(images.test, options.attacked_tests)),
    )
    schedule = create_schedule(options, optimizer.optimizer, steps=len(loader))
    set_seed(options.seed, device_specific=True)
    make_attack = functools.partial(
        Attack, options.epsilon, options.step_size, mean=images.mean, std=images.std
    )
    attack = make_attack(options.attack_steps, options.random_start, options.targeted)
    # Without random numbers, so that every epoch's network meets the same attack.
    test_attack = make_attack(options.test_attack_steps, False, False)

    def metrics(model: nn.Module) -> dict[str, Any]:
        tested = model if ema is None else ema.module
        attacked = functools.partial(test_attack, tested)
        found = test_both_ways(accelerator, tested, tests, few_tests, attacked, _auxiliary(options))
        return found | divergence_metrics(model)

    return Task(
        model=model,
        loss=functools.partial(loss_of_batch, options, accelerator, attack),
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


def test_both_ways(
    accelerator: Accelerator,
    model: nn.Module,
    tests: Any,
    few_tests: Any,
    attack: Callable[[Tensor, Tensor], Tensor],
    auxiliary: int,
) -> dict[str, Any]:
    """Return loss and accuracy of clean and attacked images by split 0 and by another one.

    Args:
        accelerator: which prepared the loaders.
        model: without wrappers.
        tests: yields the clean images.
        few_tests: yields those that are attacked.
        attack: from images and labels to attacked images.
        auxiliary: the other split; where it is 0 too, one way stands for both.
    """
    by_split = {
        split: (
            evaluate(accelerator, model, tests, split=split),
            evaluate(accelerator, model, few_tests, split=split, make_input=attack),
        )
        for split in {0, auxiliary}
    }
    found: dict[str, Any] = {}
    for clean, attacked, split in (
        ("test", "attacked", 0),
        ("auxiliary", "auxiliary_attacked", auxiliary),
    ):
        (found[f"{clean}_loss"], found[f"{clean}_accuracy"]), under_attack = by_split[split]
        found[f"{attacked}_accuracy"] = under_attack[1]
    return found


def _spread(dataset: Dataset[Any], number: int) -> Dataset[Any]:
    """Return so many images of a set, evenly spread, or all."""
    total: int = len(dataset)  # type: ignore[arg-type]
    number = min(number, total)
    return Subset(dataset, [index * total // number for index in range(number)])


def conclude(results: dict[str, Any]) -> str:
    """Return the accuracies in a sentence."""
    last = results["epochs"][-1]
    return (
        f"test accuracy {last['test_accuracy']:.2%} of clean images, "
        f"{last['attacked_accuracy']:.2%} of attacked ones; through the auxiliary split "
        f"{last['auxiliary_accuracy']:.2%} and {last['auxiliary_attacked_accuracy']:.2%}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Train as the command line says, and return the exit code."""
    options = parse_arguments(arguments)
    norms = ["auxiliary", "joint", "clean"] if options.compare else ["auxiliary"]
    body = functools.partial(
        compare,
        Recipe(COLUMNS, prepare, draw_run, conclude),
        {norm: {"norm": norm, "fine_grained": _fine_grained(options, norm)} for norm in norms},
        options.seeds,
        draw_comparison,
        [key for key, _, _ in COLUMNS],
    )
    return run_safely(body, options)


def _fine_grained(options: argparse.Namespace, norm: str) -> bool:
    """Return whether a variant trains on augmented images too; clean means clean alone."""
    return bool(options.fine_grained) and norm != "clean"


if __name__ == "__main__":
    leave(main())

"""Optimizer, schedule, and averages of the weights: timm's, and without timm torch's own."""

import argparse
import math
from typing import Any, Protocol

import torch
from torch import nn

from .errors import RunError, require_timm
from .options import SMALL_RESNET


class Schedule(Protocol):
    """What the trainer calls; the interface of timm's schedulers.

    The learning rate follows from the numbers alone, and a checkpoint keeps it with the optimizer.
    """

    def step_update(self, num_updates: int) -> None:
        """Set the learning rate after so many optimizer steps."""

    def step(self, epoch: int) -> None:
        """Set the learning rate after so many epochs."""


def needs_timm(options: argparse.Namespace) -> bool:
    """Return whether timm computes: with images or a model of one's own, or its optimizers."""
    is_small = options.data is None and options.model == SMALL_RESNET
    return not is_small or (options.opt, options.sched) != ("sgd", "cosine")


def create_optimizer(options: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of a model that is converted already.

    Args:
        options: of `recipe.options.add_optimization_options`.
        model: all its parameters are trained; biases and batch norms are not decayed.
    """
    if not needs_timm(options):
        return sgd(
            model, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay
        )
    timm = require_timm("timm.optim", "--opt")
    try:
        optimizer: torch.optim.Optimizer = timm.create_optimizer_v2(
            model,
            opt=options.opt,
            lr=options.lr,
            weight_decay=options.weight_decay,
            momentum=options.momentum,
        )
    except (AssertionError, ValueError) as error:
        raise RunError(f"--opt must be sgd or one of timm, got {options.opt}: {error}") from error
    if getattr(optimizer, "is_second_order", False):
        raise RunError(f"--opt must need first derivatives alone, got {options.opt}")
    return optimizer


def create_schedule(
    options: argparse.Namespace, optimizer: torch.optim.Optimizer, *, steps: int
) -> Schedule:
    """Return the schedule of the learning rate.

    Args:
        options: of `recipe.options.add_optimization_options`.
        optimizer: whose learning rate is the highest.
        steps: optimizer steps of an epoch.
    """
    if not needs_timm(options):
        warmup, total = options.warmup_epochs * steps, options.epochs * steps
        return WarmupCosine(optimizer, warmup=warmup, total=total)
    # timm has none for "none", and "plateau" asks for a metric.
    if options.sched in ("none", "plateau"):
        raise RunError(f"--sched must follow from the step alone, got {options.sched}")
    timm = require_timm("timm.scheduler", "--sched")
    try:
        schedule, _ = timm.create_scheduler_v2(
            optimizer,
            sched=options.sched,
            num_epochs=options.epochs,
            warmup_epochs=options.warmup_epochs,
            step_on_epochs=not options.sched_on_updates,
            updates_per_epoch=steps,
        )
    except (AssertionError, ValueError) as error:
        raise RunError(f"--sched must be one of timm, got {options.sched}: {error}") from error
    typed: Schedule = schedule
    return typed


def create_ema(options: argparse.Namespace, model: nn.Module) -> Any:
    """Return timm's `ModelEmaV3` of the model, every split averaged, or None."""
    if not options.model_ema:
        return None
    timm = require_timm("timm.utils", "--model-ema")
    return timm.ModelEmaV3(model, decay=options.model_ema_decay)


def sgd(model: nn.Module, *, lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """Return SGD with Nesterov momentum; biases and batch norms are spared from weight decay.

    Args:
        model: converted already, so that the parameters of all splits are known.
        lr: highest learning rate.
        momentum: share of the last update that is kept, 0 to 1.
        weight_decay: L2 factor.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)


class WarmupCosine:
    """A learning rate that rises linearly and falls along half a cosine to 0, step by step.

    Args:
        optimizer: whose learning rate is the highest.
        warmup: optimizer steps of the rise.
        total: optimizer steps of the whole run.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, warmup: float, total: int) -> None:
        self.optimizer, self.warmup, self.total = optimizer, warmup, total
        self.highest = [group["lr"] for group in optimizer.param_groups]
        self.step_update(0)

    def step_update(self, num_updates: int) -> None:
        """Set the learning rate after so many optimizer steps."""
        share = _share(num_updates, warmup=self.warmup, total=self.total)
        for group, highest in zip(self.optimizer.param_groups, self.highest, strict=True):
            group["lr"] = highest * share

    def step(self, epoch: int) -> None:
        """Do nothing."""


def _share(step: int, *, warmup: float, total: int) -> float:
    """Return the share of the highest learning rate, 0 to 1."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, total - warmup))))

"""The optimizer and the schedule that the recipes share."""

import functools
import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


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


def warmup_cosine(optimizer: torch.optim.Optimizer, *, warmup: float, total: int) -> LambdaLR:
    """Return a schedule that rises linearly and falls along half a cosine to 0.

    Args:
        optimizer: whose learning rate is the highest.
        warmup: optimizer steps of the rise.
        total: optimizer steps of the whole run.
    """
    return LambdaLR(optimizer, functools.partial(_share, warmup=warmup, total=total))


def _share(step: int, *, warmup: float, total: int) -> float:
    """Return the share of the highest learning rate, 0 to 1."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, total - warmup))))

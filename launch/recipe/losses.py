"""What a batch of splits is trained on: cross-entropy, and agreement between the splits."""

import argparse
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import require_timm
from .optimization import needs_timm


def create_criterion(options: argparse.Namespace) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss of logits [S * B, classes] and labels [S * B], split by split."""
    if not options.jsd_loss:
        return functools.partial(split_cross_entropy, smoothing=options.smoothing)
    splits, smoothing = options.aug_splits, options.smoothing
    if needs_timm(options):
        timm = require_timm("timm.loss", "--jsd-loss")
        criterion: Callable[[Tensor, Tensor], Tensor] = timm.JsdCrossEntropy(
            num_splits=splits, smoothing=smoothing
        )
        return criterion
    return functools.partial(jsd_cross_entropy, num_splits=splits, smoothing=smoothing)


def split_cross_entropy(logits: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy over the views of all splits alike.

    Args:
        logits: `[S * B, classes]`, split by split.
        labels: `[S * B]`, class numbers.
        smoothing: share of the target spread over all classes, 0 to 1.
    """
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def jsd_cross_entropy(
    logits: Tensor, labels: Tensor, *, num_splits: int, alpha: float = 12.0, smoothing: float = 0.0
) -> Tensor:
    """Return the clean split's cross-entropy plus the Jensen-Shannon divergence of all splits.

    Args:
        logits: `[S * B, classes]`, split by split, the clean one first.
        labels: `[S * B]`, class numbers.
        num_splits: S, at least 2.
        alpha: weight of the divergence, which is in nats.
        smoothing: share of the target spread over all classes, 0 to 1.

    Source:
        Hendrycks et al. 2020, arXiv 1912.02781; the weight and the clean split are timm's.
    """
    log_probs = F.log_softmax(logits.float(), dim=1).unflatten(0, (num_splits, -1))  # [S, B, K]
    log_mixture = torch.logsumexp(log_probs, dim=0) - math.log(num_splits)  # [B, K]
    divergence = (log_probs.exp() * (log_probs - log_mixture)).sum(dim=-1).mean()
    batch = log_mixture.shape[0]
    clean = split_cross_entropy(logits[:batch], labels[:batch], smoothing=smoothing)
    return clean + alpha * divergence

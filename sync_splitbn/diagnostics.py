"""How far apart the splits of a trained model are, as numbers and as a picture."""

from typing import Any

import torch
from torch import nn

from .layer import SyncSplitBatchNorm


@torch.no_grad()
def split_divergence(model: nn.Module) -> dict[str, list[float]]:
    """Return how far each split's running statistics are from those of split 0, layer by layer.

    The measure is the symmetric Kullback-Leibler divergence of two normal distributions, the
    sum of both directions, averaged over channels: 0 where the statistics agree. Splits whose
    divergence stays small in all layers would do with one batch norm. The variances count with
    the layer's `eps` added, as they do in the normalization.

    Args:
        model: a model with `SyncSplitBatchNorm` layers, also a wrapped one.

    Returns:
        For each layer's path, in the order of the model's modules, S - 1 numbers in nats: split 1
        against split 0, split 2 against split 0, and so on.

    Raises:
        ValueError: no layer of `model` keeps running statistics of several splits.

    Communication:
        None; the statistics are the same on all ranks. It waits for the device.

    Example:
        >>> layer = SyncSplitBatchNorm(2)
        >>> layer.aux_bn[0].running_mean += 1.0
        >>> [round(value, 3) for value in split_divergence(layer)[""]]
        [1.0]
    """
    found = {
        path: [_divergence(layer, aux) for aux in layer.aux_bn]
        for path, layer in model.named_modules()
        if isinstance(layer, SyncSplitBatchNorm)
        and layer.num_splits > 1
        and layer.running_mean is not None
    }
    if not found:
        raise ValueError(
            "model must contain a SyncSplitBatchNorm with 2 or more splits and running "
            f"statistics, got {type(model).__name__} without one; convert it first"
        )
    return found


def plot_split_divergence(divergence: dict[str, list[float]], axes: Any) -> None:
    """Draw the result of `split_divergence` on matplotlib axes, a line a split, by depth.

    Args:
        divergence: what `split_divergence` returned.
        axes: a `matplotlib.axes.Axes`.
    """
    layers = list(enumerate(divergence.values(), start=1))
    for i in range(max(len(values) for values in divergence.values())):
        points = [(depth, values[i]) for depth, values in layers if i < len(values)]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"split {i + 1}")
    if any(value > 0 for values in divergence.values() for value in values):
        axes.set_yscale("log")
    axes.set_xlabel("batch norm layer, input to output")
    axes.set_ylabel("symmetric KL divergence from split 0 (nats)")
    axes.legend()


def _divergence(layer: Any, aux: Any) -> float:
    """Return the symmetric divergence of two splits' normal distributions."""
    mean_p, mean_q = layer.running_mean.double(), aux.running_mean.double()
    var_p, var_q = layer.running_var.double() + layer.eps, aux.running_var.double() + layer.eps
    apart = (mean_p - mean_q).square()
    both = 0.5 * ((var_p + apart) / var_q + (var_q + apart) / var_p) - 1
    return float(both.mean())

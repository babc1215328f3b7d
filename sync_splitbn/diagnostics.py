"""How far apart the splits are, by layer, as numbers and as a picture."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ._moments import check_storage
from ._state import BUFFERS
from .functional import sync_split_batch_norm
from .layer import SyncSplitBatchNorm

Divergence: TypeAlias = dict[str, dict[tuple[int, int], float]]


@torch.no_grad()
def split_divergence(
    model: nn.Module,
    input: Tensor | None = None,
    *,
    sizes: Sequence[int] | None = None,
    index: Tensor | None = None,
) -> Divergence:
    r"""Return how far apart the statistics of every two splits are, layer by layer.

    The measure is the symmetric Kullback-Leibler divergence of two normal distributions, the sum
    of both directions, averaged over channels. For splits i and j of one channel it is

    .. math::
        \frac{1}{2} \left( \frac{\sigma_i^2 + d^2}{\sigma_j^2}
        + \frac{\sigma_j^2 + d^2}{\sigma_i^2} \right) - 1, \qquad d = \mu_i - \mu_j

    with variances that have the layer's `eps` added, as in the normalization. It is 0 where the
    statistics agree; splits whose divergence stays small in all layers would do with one batch
    norm.

    Args:
        model: a model with batch norms, also a wrapped one.
        input: None compares the running statistics of the splits. A batch [N, ...] is sent through
            the model once, in the mode that the model is in, and the statistics of its parts are
            compared where they enter each batch norm, plain ones too. Parameters, buffers and
            random states stay as they are.
        sizes: rows of each contiguous part of `input`; with `index`, by default, the parts are
            the splits of each `SyncSplitBatchNorm`.
        index: the part of each row of `input`, integers from 0, shape [N].

    Returns:
        For each layer's path, in the order of the model's modules, the divergence in nats of every
        pair of splits (i, j), i < j. A pair with a part without rows is left out. A layer that runs
        several times has the last.

    Raises:
        TypeError: `model` is no module, `input` or `index` no tensor, or `sizes` no sequence.
        ValueError: `model` or `input` is on meta, no layer of `model` has several splits to
            compare, or `sizes` or `index` does not fit the rows that a layer receives.

    Communication:
        None of its own: running statistics are the same on all ranks, and a batch is compared on
        the rank that has it. The forward pass communicates as always: where layers synchronize in
        training, or DDP wraps the model, all ranks must call it. It waits for the device.

    Source:
        Kullback and Leibler 1951, On Information and Sufficiency, with their symmetric sum.

    Example:
        >>> layer = SyncSplitBatchNorm(2)
        >>> layer.aux_bn[0].running_mean += 1.0
        >>> {pair: round(value, 3) for pair, value in split_divergence(layer)[""].items()}
        {(0, 1): 1.0}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if input is None:
        if sizes is not None or index is not None:
            raise ValueError("sizes and index must come with input, got input=None")
        statistics = _running_statistics(model)
    else:
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a tensor [N, ...], got {type(input).__name__}")
        statistics = _batch_statistics(model, input, sizes, index)
    found = {
        path: _divergence_by_pair(*of_layer)
        for path, _ in model.named_modules()
        if (of_layer := statistics.get(path)) is not None
    }
    if found and not any(found.values()):
        raise ValueError(_TOO_FEW_PARTS)
    if not found:
        raise ValueError(
            "model must contain a SyncSplitBatchNorm with 2 or more splits and running statistics, "
            f"got {type(model).__name__} without one; convert it first, or pass input and sizes"
        )
    return found


def plot_split_divergence(divergence: Divergence, axes: Any) -> None:
    """Draw the result of `split_divergence` on matplotlib axes, a line a pair, by depth.

    Args:
        divergence: what `split_divergence` returned.
        axes: a `matplotlib.axes.Axes`.
    """
    layers = list(enumerate(divergence.values(), start=1))
    for pair in sorted({pair for pairs in divergence.values() for pair in pairs}):
        points = [(depth, pairs[pair]) for depth, pairs in layers if pair in pairs]
        label = f"splits {pair[0]} and {pair[1]}"
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    if any(value > 0 for pairs in divergence.values() for value in pairs.values()):
        axes.set_yscale("log")
    axes.set_xlabel("batch norm layer, input to output")
    axes.set_ylabel("symmetric KL divergence (nats)")
    axes.legend(frameon=False)


_TOO_FEW_PARTS = "sizes or index must give rows to 2 parts or more, got fewer"
# Mean and variance with eps, [S, C] each, and which splits have any values.
_Statistics: TypeAlias = tuple[Tensor, Tensor, list[bool]]


def _running_statistics(model: nn.Module) -> dict[str, _Statistics]:
    """Return the running statistics of every layer with several splits, by path."""
    found = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, SyncSplitBatchNorm) or layer.num_splits == 1:
            continue
        means, variances = layer._buffers_by_split(*BUFFERS[:2])
        for tensor in means + variances:
            _check_values(path, tensor)
        if means:
            mean, var = torch.stack(means).double(), torch.stack(variances).double()
            found[path] = mean, var + layer.eps, [True] * layer.num_splits
    return found


def _batch_statistics(
    model: nn.Module, input: Tensor, sizes: Sequence[int] | None, index: Tensor | None
) -> dict[str, _Statistics]:
    """Return the statistics of the parts of a batch at every batch norm, by path."""
    found: dict[str, _Statistics] = {}
    parts = _number_of_parts(sizes, index)

    def observe(path: str, layer: Any, x: Tensor) -> None:
        own_sizes, own_index, num_splits = sizes, index, parts
        if num_splits is None:
            num_splits = getattr(layer, "num_splits", 1)
            assignment = getattr(layer, "_assignment", None)
            if assignment is not None:
                own_sizes, own_index = assignment.rows(x, num_splits)
        if num_splits > 1:
            _check_values(path, x)
            _, moments = sync_split_batch_norm(
                x.double(), num_splits, sizes=own_sizes, index=own_index, sync=False
            )
            found[path] = moments.mean, moments.var + layer.eps, (moments.count > 0).tolist()

    with contextlib.ExitStack() as stack:
        stack.enter_context(_state_kept(model))
        for path, layer in model.named_modules():
            if isinstance(layer, _BatchNorm):
                hook = functools.partial(_pass_input_to, functools.partial(observe, path))
                handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
        model(input)
    return found


def _number_of_parts(sizes: Sequence[int] | None, index: Tensor | None) -> int | None:
    """Return how many parts a batch has, or None where each layer has its own splits."""
    if index is None:
        if sizes is None:
            return None
        if not isinstance(sizes, Sequence):
            raise TypeError(f"sizes must be a sequence of ints, got {sizes!r}")
        number = len(sizes)
    else:
        if not isinstance(index, Tensor) or index.is_floating_point() or index.is_complex():
            got = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"index must be an integer tensor [N], got {got}")
        number = int(index.max()) + 1 if index.numel() and not index.is_meta else 0
    if number < 2:
        raise ValueError(_TOO_FEW_PARTS)
    return number


def _check_values(path: str, tensor: Tensor) -> None:
    """Raise if there is nothing to compare at the layer `path`."""
    if tensor.is_meta:
        raise ValueError(
            f"model must hold values at {path or 'its layer'}, got tensors on meta; "
            "materialize it by to_empty() and load a state, and give an input with values"
        )
    check_storage(f"each tensor at {path or 'the layer'}", tensor)


def _pass_input_to(
    observe: Callable[[nn.Module, Tensor], None],
    layer: nn.Module,
    args: tuple[Tensor, ...],
    kwargs: dict[str, Tensor],
) -> None:
    """Give `observe` what a layer is called with."""
    observe(layer, next(iter((*args, *kwargs.values()))))


@contextlib.contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """Put all buffers of a model and the random states back afterwards."""
    before = [
        (module, name, buffer, _clone(name, buffer))
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {buffer.device for _, _, buffer, _ in before if buffer.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            for module, name, buffer, value in before:
                # The model may have put another tensor there.
                module._buffers[name] = buffer
                buffer.copy_(value)


def _clone(name: str, buffer: Tensor) -> Tensor:
    check_storage(name, buffer)
    return buffer.clone()


def _divergence_by_pair(
    mean: Tensor, var: Tensor, has_values: list[bool]
) -> dict[tuple[int, int], float]:
    """Return the mean over channels of the symmetric divergence of each two splits."""
    pairs = {}
    for i, j in itertools.combinations(range(len(mean)), 2):
        if has_values[i] and has_values[j]:
            square = (mean[i] - mean[j]).square()
            both = 0.5 * ((var[i] + square) / var[j] + (var[j] + square) / var[i]) - 1
            pairs[i, j] = float(both.mean())
    return pairs

"""What the caller says about the rows of a batch, and which layers hear it."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._moments import check_sizes


@dataclass(frozen=True)
class Assignment:
    """One way to tell the splits of a batch apart: sizes, only, or index.

    `ends` holds the row behind each sub-batch, as compiled graphs take sizes.
    """

    sizes: tuple[int, ...] | None = None
    ends: Tensor | None = None
    only: int | None = None
    index: Tensor | None = None

    def rows(self, input: Tensor, num_splits: int) -> tuple[tuple[int, ...] | None, Tensor | None]:
        """Return the `sizes` or the `index` that describe the rows of `input`."""
        if self.only is not None:
            return tuple(input.shape[0] * (i == self.only) for i in range(num_splits)), None
        if self.ends is not None and torch.compiler.is_compiling():
            # A compiled graph would hold the sizes as constants, and be another for each.
            torch._assert_async(
                self.ends[-1] == input.shape[0], "sizes must sum to input.shape[0], got another sum"
            )
            rows = torch.arange(input.shape[0], device=input.device)
            return None, torch.bucketize(rows, self.ends, right=True)
        return self.sizes, self.index


class Assignable(nn.Module):
    """A layer that `assign_splits` and `frozen_stats` speak to."""

    num_splits: int
    _assignment: Assignment | None = None
    _stats_frozen: bool = False
    # Set while a compiled graph is traced: from then on sizes come as a tensor too.
    _is_compiled: bool = False


@contextmanager
def assign_splits(
    model: nn.Module,
    *,
    sizes: Sequence[int] | None = None,
    only: int | None = None,
    index: Tensor | None = None,
) -> Iterator[None]:
    """Say which rows belong to which split, for every `SyncSplitBatchNorm` in `model`.

    Without it, training takes equal contiguous chunks and evaluation takes split 0. Contexts
    nest, the innermost wins, and the outer one is back afterwards, also when the body raises.
    Ranks need not agree: each tells of its own rows.

    Args:
        model: the model, also one wrapped by DDP, FSDP or `accelerator.prepare`.
        sizes: rows of each contiguous sub-batch, one number a split, zeros allowed, with the
            number of rows of the batch as their sum.
        only: the split that the whole batch belongs to.
        index: the split of each row, integers of shape [N], on the device of the batch.

    Raises:
        TypeError: `model`, `sizes`, `only` or `index` is of the wrong kind.
        ValueError: not exactly one of the three is given, it does not fit the layers' number of
            splits, or there is no such layer. What depends on the batch is checked in `forward`.

    Note:
        The assignment belongs to the layers, not to the thread: another thread's forward sees it.
        Activation checkpointing runs `forward` once more during backward: call `backward()`
        inside the context then.

    Example:
        >>> import sync_splitbn, torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), sync_splitbn.SyncSplitBatchNorm(8))
        >>> with assign_splits(model, sizes=(2, 6)):
        ...     output = model(torch.randn(8, 3, 16, 16))
        >>> with assign_splits(model.eval(), only=1):
        ...     output = model(torch.randn(1, 3, 16, 16))
    """
    layers = _layers(model, "assign_splits")
    if sizes is not None:
        sizes = check_sizes(sizes, layers[0].num_splits)
    assignment = _assignment(sizes, only, index, layers)
    for layer in layers:
        _check_fit(assignment, layer.num_splits)
    with _set_on(layers, "_assignment", assignment):
        yield


@contextmanager
def frozen_stats(model: nn.Module) -> Iterator[None]:
    """Normalize by batch statistics without updating the running ones.

    For the extra forward passes of semi-supervised and adversarial training, whose batches are
    not to be remembered. It changes training alone; the batch statistics still cover all ranks.

    Args:
        model: the model, also a wrapped one; every `SyncSplitBatchNorm` in it is meant.

    Raises:
        ValueError: `model` has no such layer.

    Example:
        >>> import sync_splitbn, torch
        >>> layer = sync_splitbn.SyncSplitBatchNorm(4)
        >>> with frozen_stats(layer):
        ...     output = layer(torch.randn(6, 4))
        >>> layer.num_batches_tracked.item()
        0
    """
    with _set_on(_layers(model, "frozen_stats"), "_stats_frozen", True):
        yield


def _assignment(
    sizes: tuple[int, ...] | None,
    only: int | None,
    index: Tensor | None,
    layers: list[Assignable],
) -> Assignment:
    """Return the one that is given, or raise."""
    choices = {"sizes": sizes, "only": only, "index": index}
    given = [name for name, value in choices.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"exactly one of sizes, only and index must be given, got {', '.join(given) or 'none'}"
        )
    if only is not None and (isinstance(only, bool) or not isinstance(only, int)):
        raise TypeError(f"only must be an int, got {type(only).__name__}")
    is_compiled = any(layer._is_compiled for layer in layers)
    ends = _ends(sizes, layers[0]) if sizes is not None and is_compiled else None
    return Assignment(sizes, ends, only, index)


def _ends(sizes: tuple[int, ...], layer: nn.Module) -> Tensor:
    """Return the row behind each sub-batch, on the device of `layer`, without waiting for it."""
    state = next(itertools.chain(layer.parameters(), layer.buffers()), None)
    device = torch.device("cpu") if state is None else state.device
    ends = torch.tensor(tuple(itertools.accumulate(sizes)), pin_memory=device.type == "cuda")
    return ends.to(device, non_blocking=True)


def _check_fit(assignment: Assignment, num_splits: int) -> None:
    """Raise if `assignment` cannot suit a layer with `num_splits`, whatever the batch."""
    sizes, only = assignment.sizes, assignment.only
    if only is not None and not 0 <= only < num_splits:
        raise ValueError(
            f"only must be a split from 0 to num_splits - 1 = {num_splits - 1}, got {only}"
        )
    if sizes is not None:
        check_sizes(sizes, num_splits)


def _layers(model: nn.Module, caller: str) -> list[Assignable]:
    """Return the layers of `model` that listen, or raise."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers = [module for module in model.modules() if isinstance(module, Assignable)]
    if not layers:
        raise ValueError(
            f"model must contain a SyncSplitBatchNorm for {caller}, got {type(model).__name__} "
            "without one; convert it by convert_sync_split_batchnorm first"
        )
    return layers


@contextmanager
def _set_on(layers: list[Assignable], name: str, value: Any) -> Iterator[None]:
    """Set an attribute on all `layers`, and put each one's own value back."""
    before = [getattr(layer, name) for layer in layers]
    try:
        for layer in layers:
            setattr(layer, name, value)
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            setattr(layer, name, own)

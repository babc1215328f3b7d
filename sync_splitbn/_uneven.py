"""Epochs in which ranks have different numbers of batches.

Sizes used below: W ranks.
"""

import copy
import itertools
from collections.abc import Iterable, Iterator, MutableMapping, Sized
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.data import IterableDataset

from ._collectives import (
    check_group,
    ends_may_differ,
    gather_objects,
    ranks_of,
    resolve_group,
)

T = TypeVar("T")
_DONE: Any = object()


def until_all_done(loader: Iterable[T], process_group: Any = None) -> Iterator[T]:
    """Yield the batches of `loader`, then batches without rows until all ranks are done.

    Where ranks have different numbers of batches, those that finish first would leave the others
    waiting in a collective. This way all take the same number of steps, and no sample is dropped
    or repeated: `for images, labels in until_all_done(loader):`. It takes the place of accelerate's
    `join_uneven_inputs`, which does not know the collectives of the layers, and needs no
    `even_batches=True`, which repeats samples.

    The mean of a loss over no rows is NaN, so divide a sum by the rows of all ranks instead. DDP
    averages gradients over W ranks, hence the factor::

        rows = torch.tensor(float(len(images)))
        dist.all_reduce(rows)
        loss = W * F.cross_entropy(model(images), labels, reduction="sum") / rows

    accelerate's gradient accumulation averages gradients whenever a rank's loader ends: give it
    `GradientAccumulationPlugin(steps, sync_with_dataloader=False)`.

    Args:
        loader: yields batches with rows in dimension 0: tensors, or dicts, lists and tuples of
            them. Sequences of strings hold a row each; other values stay as they are. Every rank
            needs one batch at least, or none of them any.
        process_group: the ranks that wait for one another; None is all ranks.

    Yields:
        The batches, then copies of the first one with 0 rows.

    Raises:
        RuntimeError: `loader` yields more batches than `len(loader)` and than any rank, or none.
        TypeError: a batch is of another kind.
        ValueError: some ranks have no batch, and others have.

    Communication:
        One all_gather_object of `len(loader)` at the start, if all ranks know theirs and no dataset
        is an `IterableDataset`, whose length is a guess. Else one of a bool before every step,
        which waits for the device under NCCL. None in a group of one.

    Example:
        >>> import torch
        >>> [batch.tolist() for batch in until_all_done([torch.ones(2), torch.ones(1)])]
        [[1.0, 1.0], [1.0]]
    """
    check_group(process_group)
    with ends_may_differ():
        yield from _until_all_done(loader, resolve_group(process_group))


def _until_all_done(loader: Iterable[T], group: Any) -> Iterator[T]:
    """Do what `until_all_done` does; a group of None is this rank alone."""
    length = _length(loader)
    lengths = gather_objects(length, group)
    first: Any = None
    for step, batch in enumerate(itertools.chain(loader, itertools.repeat(_DONE))):
        is_done = batch is _DONE
        if None in lengths:
            having = gather_objects(not is_done, group)
        else:
            having = [step < number for number in lengths if number is not None]
            if length is not None and is_done == (step < length):
                raise RuntimeError(
                    f"loader must yield len(loader)={length} batches, got "
                    f"{step if is_done else 'more'}; pass iter(loader), which has no length"
                )
        if not any(having):
            return
        if step == 0:
            if not all(having):
                idle = [rank for rank, has in zip(ranks_of(group), having, strict=True) if not has]
                raise ValueError(
                    f"loader must yield a batch on every rank, got none on ranks {idle}; "
                    "use fewer ranks or smaller batches"
                )
            first = _without_rows(batch)
        yield _without_rows(first) if is_done else batch


def _length(loader: Iterable[Any]) -> int | None:
    """Return the number of batches, or None where it is not known for sure."""
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        return None
    return len(loader) if isinstance(loader, Sized) else None


def _without_rows(batch: Any) -> Any:
    """Return a batch of the same structure and 0 rows, without its memory."""
    if isinstance(batch, Tensor):
        return batch[:0].clone() if batch.dim() else batch
    if isinstance(batch, MutableMapping):
        twin = copy.copy(batch)
        twin.update({key: _without_rows(value) for key, value in batch.items()})
        return twin
    if isinstance(batch, (tuple, list)):
        if hasattr(batch, "_fields"):
            return type(batch)(*map(_without_rows, batch))
        # Collation leaves strings alone: a sequence of them is a column.
        is_column = all(isinstance(each, str) for each in batch)
        return type(batch)(() if is_column else map(_without_rows, batch))
    if batch is None or isinstance(batch, (bool, int, float, str)):
        return batch
    raise TypeError(
        "loader must yield tensors, or dicts, lists and tuples of them, "
        f"got {type(batch).__name__}; collate the samples into tensors"
    )

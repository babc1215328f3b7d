"""Views of one image, laid out split by split, and epochs in which ranks have unequal batches.

Sizes used below: B samples of the local batch, S views (one for each split), W ranks.
"""

import contextlib
import copy
import hashlib
import itertools
import operator
import random
import sys
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence, Sized
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ._collectives import (
    check_group,
    ends_may_differ,
    gather_objects,
    ranks_of,
    resolve_group,
)

__all__ = ["SplitViews", "merge_views", "until_all_done"]

T = TypeVar("T")
_DONE: Any = object()


class SplitViews(Dataset[tuple[Tensor, Any]]):
    """A dataset whose item is all S views of one image, stacked, and its label.

    The default collation turns such items into a batch `[B, S, ...]`, and `merge_views` orders
    it split by split on the device. The views are *not* concatenated in a collate function,
    `[S * B, ...]`, because loaders own dimension 0: accelerate slices it between the ranks
    (`split_batches`, `dispatch_batches`), fills a short last batch with rows of the first
    (`even_batches`) and cuts the surplus off again. A batch that is already laid out by splits
    is cut through by all of these, still divides by S, and trains on mixed splits in silence. With
    one sample a row, a rank gets whole samples whatever happens to dimension 0.

    With a `seed`, the views of an item depend on `(seed, epoch, index)` alone: on neither the
    number of workers or ranks, nor the order of the items, nor the point a run resumes at. Python's
    and torch's CPU generators (and NumPy's, where NumPy is loaded) are seeded for the item, its own
    loading included, and put back afterwards.

    Args:
        dataset: map-style dataset of `(image, label)` pairs.
        transforms: one function for each split, from image to tensor, all giving one shape and
            dtype. They are called in order and must not modify the image.
        seed: any integer; None leaves the randomness to the global generators.

    Raises:
        TypeError: `dataset` is not map-style, an item is no pair, or a view is no tensor.
        ValueError: `transforms` is empty, or the views differ in shape or dtype.

    Example:
        >>> clean, inverted = torch.tensor, lambda image: -torch.tensor(image)
        >>> views, label = SplitViews([([1.0, 2.0], 7)], [clean, inverted])[0]
        >>> views.tolist(), label
        ([[1.0, 2.0], [-1.0, -2.0]], 7)
    """

    def __init__(
        self,
        dataset: Dataset[Any] | Sequence[Any],
        transforms: Sequence[Callable[[Any], Tensor]],
        *,
        seed: int | None = None,
    ) -> None:
        map_style = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        if isinstance(dataset, IterableDataset) or not map_style:
            raise TypeError(
                "dataset must be map-style, with __getitem__ and __len__, "
                f"got {type(dataset).__name__}; stack the views inside its __iter__ instead"
            )
        if not transforms:
            raise ValueError("transforms must hold one function for each split, got none")
        self.dataset = dataset
        self.transforms = tuple(transforms)
        # NumPy's integers are others in the text from which generators are seeded.
        self.seed = None if seed is None else operator.index(seed)
        # In shared memory, so that workers that outlive an epoch see the next one.
        self._epoch: Tensor = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw new views from here on; without a `seed` it changes nothing.

        Call it before each epoch: accelerate passes the epoch on to its sampler and, on several
        ranks with a seedable sampler, to that alone.

        Args:
            epoch: number of the epoch, from 0.
        """
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # the constructor checked

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        size, index = len(self), operator.index(index)
        if not -size <= index < size:
            raise IndexError(f"index must be in [{-size}, {size}), got {index}")
        index %= size  # -1 shows the same views as size - 1
        with self._drawn_for(index):
            image, label = self._pair(index)
            views = [transform(image) for transform in self.transforms]
        for number, view in enumerate(views):
            if not isinstance(view, Tensor):
                raise TypeError(
                    f"transforms[{number}] must return a tensor, got {type(view).__name__}; "
                    "end it with the conversion to a tensor"
                )
            if (view.shape, view.dtype) != (views[0].shape, views[0].dtype):
                raise ValueError(
                    f"transforms[{number}] must return shape {tuple(views[0].shape)} and "
                    f"{views[0].dtype} like transforms[0], got {tuple(view.shape)} and {view.dtype}"
                )
        return torch.stack(views), label

    def _pair(self, index: int) -> tuple[Any, Any]:
        """Return the image and the label of one item."""
        item = self.dataset[index]
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            got = type(item).__name__
            got += f" of length {len(item)}" if isinstance(item, (tuple, list)) else ""
            raise TypeError(f"dataset[{index}] must be an (image, label) pair, got {got}")
        return item[0], item[1]

    def _drawn_for(self, index: int) -> contextlib.AbstractContextManager[None]:
        """Return the scope in which one item's randomness is its own."""
        if self.seed is None:
            return contextlib.nullcontext()
        return _seeded(self.seed, int(self._epoch), index)


@contextlib.contextmanager
def _seeded(*key: int) -> Iterator[None]:
    """Seed the CPU generators from the integers of `key`, and put them back on leaving."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little")
    # Looked up, not imported: torch works without NumPy, and so does this module.
    numpy: Any = sys.modules.get("numpy")
    python_state, torch_state = random.getstate(), torch.default_generator.get_state()
    numpy_state = numpy.random.get_state() if numpy else None
    try:
        random.seed(number)
        # torch.manual_seed() would reseed every accelerator too.
        torch.default_generator.manual_seed(number)
        if numpy:
            numpy.random.seed(number % 2**32)
        yield
    finally:
        random.setstate(python_state)
        torch.default_generator.set_state(torch_state)
        if numpy:
            numpy.random.set_state(numpy_state)


def merge_views(views: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Lay a batch of stacked views out split by split, as the split layers expect it.

    Row `s * B + b` of the result is view `s` of sample `b`. Call it on the device, just
    before the model: one copy of the views there, none where S or B is 1.

    Args:
        views: `[B, S, ...]`, as a loader over `SplitViews` yields it.
        labels: `[B, ...]`, one for each sample.

    Returns:
        The input `[S * B, ...]` and the labels, repeated for each split, `[S * B, ...]`.

    Raises:
        ValueError: `views` has no dimension S, or `labels` does not hold B entries.

    Example:
        >>> views = torch.tensor([[1, -1], [2, -2]])
        >>> merge_views(views, torch.tensor([10, 20]))
        (tensor([ 1,  2, -1, -2]), tensor([10, 20, 10, 20]))
    """
    if views.dim() < 2 or views.shape[1] == 0:
        raise ValueError(f"views must have shape [B, S, ...] with S >= 1, got {tuple(views.shape)}")
    batch, splits = views.shape[:2]
    if labels.dim() == 0 or labels.shape[0] != batch:
        raise ValueError(
            f"labels must hold one entry for each of the {batch} samples, "
            f"got shape {tuple(labels.shape)}; merge_views repeats them for the splits"
        )
    merged = views.transpose(0, 1).flatten(0, 1)
    return merged, labels.expand(splits, *labels.shape).flatten(0, 1)


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

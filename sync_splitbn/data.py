"""Views of one image, laid out split by split, and epochs in which ranks have unequal batches.

Sizes used below: B samples of the local batch, S views (one for each split).
"""

import contextlib
import hashlib
import operator
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ._uneven import until_all_done

__all__ = ["SplitViews", "merge_views", "until_all_done"]


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

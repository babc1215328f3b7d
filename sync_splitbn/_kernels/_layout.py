"""How the eager CPU kernels see a tensor: splits of rows, in blocks; and memory to work in.

N rows, S splits, C features, L positions per row. A tensor is seen as [N, C, L], or, where its
channels are innermost, as [N * L, C].
"""

import itertools
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .._moments import Splits

# Elements of a block of one thread: 2 MiB of float32, about what its own caches hold.
BLOCK = 2**19


def block() -> int:
    """Return the elements of a block that all threads work on."""
    return BLOCK * torch.get_num_threads()


class Scratch(threading.local):
    """Memory of a thread that outlives a call, up to a block; what it holds does not.

    Memory that is new costs more than what is done with it: the system clears it page by page.
    """

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}

    def like(self, piece: Tensor, dtype: torch.dtype, slot: int = 0) -> Tensor:
        """Return a contiguous tensor shaped like `piece`, apart from those of other slots."""
        size = piece.numel() * dtype.itemsize
        if piece.numel() > block():
            return torch.empty_like(piece, dtype=dtype)
        memory = self.kept.get(slot)
        if memory is None or memory.numel() < size:
            memory = self.kept[slot] = torch.empty(size, dtype=torch.uint8)
        return memory[:size].view(dtype).view(piece.shape)


scratch = Scratch()


class Layout:
    """How the rows of a tensor lie in memory, and which of them make a split."""

    def __init__(self, x: Tensor, splits: Splits, num_splits: int) -> None:
        self.features, self.length = x.shape[1], x.shape[2:].numel()
        self.last = x.dim() == 2 or (x.stride(1) == 1 and x.movedim(1, -1).is_contiguous())
        self.order: Tensor | None = None
        if isinstance(splits, Tensor):
            self.order = splits.argsort(stable=True)
            splits = tuple(splits.bincount(minlength=num_splits).tolist())
        self.sizes = splits
        self.rows = [size * self.length for size in splits] if self.last else list(splits)
        self.elements = x.numel()
        self.dims = 1 if self.last else (1, 3)
        self.equal = self.elements > 0 and min(splits) == max(splits)

    def flat(self, tensor: Tensor, *, ordered: bool = True) -> Tensor:
        """Return a tensor as [N, C, L] or [N * L, C], its rows in the order of their splits."""
        if self.order is not None and ordered:
            tensor = tensor[self.order]
        if not self.last:
            return tensor.contiguous().view(tensor.shape[0], self.features, self.length)
        if tensor.dim() > 2:
            tensor = tensor.movedim(1, -1).flatten(0, -2)
        return tensor.contiguous()

    def by_split(
        self, function: Callable[..., Tensor], flats: list[Tensor], *values: Tensor
    ) -> Tensor:
        """Return [S, ...] of a function of the splits' parts, called once if these are equal."""
        arguments = [flat.split(self.rows) for flat in flats]
        if self.equal:
            return function(*arguments, *values)
        arguments += [value.split(1) for value in values]
        found = []
        for of in zip(*arguments, strict=True):
            parts, mine = of[: len(flats)], of[len(flats) :]
            found.append(function(*([part] for part in parts), *mine))
        return torch.cat(found)

    def blocks(self, *flats: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
        """Yield pieces of tensors, [s, n, C, L] or [s, n, C], and whose they are, from the end.

        They hold all s = S splits where these are equal and in one block together, else s = 1.
        """
        if not self.elements:
            return
        if self.equal and self.elements <= block():
            shape = (len(self.rows), self.rows[0], *flats[0].shape[1:])
            yield slice(None), [flat.view(shape) for flat in flats]
            return
        few = max(block() * sum(self.rows) // self.elements, 1)
        stops = list(itertools.accumulate(self.rows))
        spans = [
            (slice(i, i + 1), slice(at, min(at + few, stop)))
            for i, (stop, rows) in enumerate(zip(stops, self.rows, strict=True))
            for at in range(stop - rows, stop, few)
        ]
        # There the pass before this one left off: that is in the cache still.
        for split, span in reversed(spans):
            yield split, [flat[span].unsqueeze(0) for flat in flats]

    def over(self, values: Tensor) -> Tensor:
        """Return values [..., C] so that they broadcast over what `blocks` yields."""
        return values.unsqueeze(-2) if self.last else values.unsqueeze(-2).unsqueeze(-1)

    def output(self, x: Tensor) -> Tensor:
        """Return a new tensor like `x`, of which `flat` is a view."""
        if (self.last and x.dim() > 2) or x.is_contiguous():
            return torch.empty_like(x)
        return torch.empty_like(x, memory_format=torch.contiguous_format)

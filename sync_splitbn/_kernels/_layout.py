"""How the eager CPU kernels see a tensor: splits of rows, in blocks; and memory to work in.

N rows, S splits, C features, L positions per row. A tensor is seen as [N, C, L], or, where its
channels are innermost, as [N * L, C].
"""

import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .._moments import Splits

# Elements of a block: what is read and written of it, 4 MiB of float32 each, stays in the cache.
BLOCK = 2**20


class Scratch(threading.local):
    """Memory of a thread that outlives a call, up to a block; what it holds does not.

    Memory that is new costs more than what is done with it: the system clears it page by page.
    """

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}

    def like(self, piece: Tensor, dtype: torch.dtype, slot: int = 0) -> Tensor:
        """Return a contiguous tensor shaped like `piece`, apart from those of other slots."""
        size = piece.numel() * dtype.itemsize
        if piece.numel() > BLOCK:
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
        # Either way, a tensor like x has the same memory in the same order.
        innermost = not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
        self.dense = innermost or x.is_contiguous()
        self.last = self.length == 1 or innermost
        self.order: Tensor | None = None
        if isinstance(splits, Tensor):
            self.order = splits.argsort(stable=True)
            splits = tuple(splits.bincount(minlength=num_splits).tolist())
        self.sizes = splits
        self.rows = [size * self.length for size in splits] if self.last else list(splits)
        self.equal = min(splits) == max(splits)

    def flat(self, tensor: Tensor, *, ordered: bool = True) -> Tensor:
        """Return a tensor as [N, C, L] or [N * L, C], its rows in the order of their splits."""
        if self.order is not None and ordered:
            tensor = tensor[self.order]
        if self.last:
            return tensor.movedim(1, -1).flatten(0, -2).contiguous()
        return tensor.contiguous().view(tensor.shape[0], self.features, self.length)

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

    def blocks(self) -> Iterator[tuple[int, slice]]:
        """Yield rows of a flat tensor in blocks, and whose they are, from the end."""
        per_row = self.features * (1 if self.last else self.length)
        few = max(BLOCK // max(per_row, 1), 1)
        stop = sum(self.rows)
        # There the pass before this one left off: that is in the cache still.
        for split in reversed(range(len(self.rows))):
            start = stop - self.rows[split]
            for at in reversed(range(start, stop, few)):
                yield split, slice(at, min(at + few, stop))
            stop = start

    def over(self, values: Tensor) -> Tensor:
        """Return values [..., C] so that they broadcast over a flat tensor."""
        return values if self.last else values.unsqueeze(-1)

    def output(self, x: Tensor) -> Tensor:
        """Return a new tensor like `x`, of which `flat` is a view."""
        if self.dense:
            return torch.empty_like(x)
        return torch.empty_like(x, memory_format=torch.contiguous_format)

"""The four kernels for eager CPU: few passes over memory, few calls of operators.

N rows, S splits, C features, L positions per row. A tensor is seen as [N, C, L], or, where its
channels are innermost, as [N * L, C]. ATen's own batch norm has the fastest pass over the data
that there is, for two pairs of sums per channel: its update of statistics (channels innermost) for
values and squares, its backward for `dy` and `dy * (x - mean)`. What is written between two
operators stays in one scratch, because memory that is new costs more than what is done with it.
"""

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._moments import Affine, Moments, Splits, accumulation_dtype

# Elements of a block of one thread: 4 MiB of float32, about what a core's own caches hold.
BLOCK = 2**20
# Elements that stay there while one channel after the other is picked from them.
PIECE = 2**17
# Elements up to which what an operator costs to call counts more than what it does.
SMALL = 2**16
# Features that a row should have to be added to others at full speed, and positions at most.
WIDTH = 2**9
# Up to this |mean| / std, float32 holds the mean of a block well enough.
NEAR = 8.0
# Up to this |mean| / std, x * scale + shift is as good as (x - mean) * scale.
CLOSE = 64.0


class _Scratch(threading.local):
    """Memory of a thread that outlives a call; what it holds does not."""

    # Bytes that are kept of each.
    LIMIT = 2**24

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}

    def like(self, piece: Tensor, dtype: torch.dtype, slot: int = 0) -> Tensor:
        """Return a contiguous tensor shaped like `piece`, apart from those of other slots."""
        size = piece.numel() * dtype.itemsize
        if size > self.LIMIT:
            return torch.empty_like(piece, dtype=dtype)
        memory = self.kept.get(slot)
        if memory is None or memory.numel() < size:
            with torch.inference_mode(False):
                memory = self.kept[slot] = torch.empty(size, dtype=torch.uint8)
        return memory[:size].view(dtype).view(piece.shape)


_scratch = _Scratch()


class _Layout:
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
        self.block = BLOCK * torch.get_num_threads()
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

    def blocks(
        self, *flats: Tensor, reverse: bool = False
    ) -> Iterator[tuple[slice, list[Tensor]]]:
        """Yield pieces of tensors, [s, n, C, L] or [s, n, C], and whose they are.

        They hold all s = S splits where these are equal and in one block together, else s = 1.
        """
        if not self.elements:
            return
        if self.equal and self.elements <= self.block:
            shape = (len(self.rows), self.rows[0], *flats[0].shape[1:])
            yield slice(None), [flat.view(shape) for flat in flats]
            return
        few = max(self.block * sum(self.rows) // self.elements, 1)
        stops = list(itertools.accumulate(self.rows))
        spans = [
            (slice(i, i + 1), slice(at, min(at + few, stop)))
            for i, (stop, rows) in enumerate(zip(stops, self.rows, strict=True))
            for at in range(stop - rows, stop, few)
        ]
        for split, span in reversed(spans) if reverse else spans:
            yield split, [flat[span].unsqueeze(0) for flat in flats]

    def over(self, values: Tensor) -> Tensor:
        """Return values [..., C] so that they broadcast over what `blocks` yields."""
        return values.unsqueeze(-2) if self.last else values.unsqueeze(-2).unsqueeze(-1)

    def output(self, x: Tensor) -> Tensor:
        """Return a new tensor like `x`, of which `flat` is a view."""
        if (self.last and x.dim() > 2) or x.is_contiguous():
            return torch.empty_like(x)
        return torch.empty_like(x, memory_format=torch.contiguous_format)


def moments(x: Tensor, splits: Splits, num_splits: int) -> Tensor:
    """Return the packed local moments of `x`, [S, 2C + 1], float64."""
    layout = _Layout(x, splits, num_splits)
    flat = layout.flat(x)
    counts = [[float(size * layout.length)] for size in layout.sizes]
    count = torch.tensor(counts, dtype=torch.float64)
    if layout.elements <= SMALL and layout.equal:
        # In float64 no digit is lost; on so few, that costs less than to find out.
        piece = flat.view(num_splits, -1, *flat.shape[1:])
        wide = _scratch.like(piece, torch.float64).copy_(piece)
        return torch.cat([wide.sum(layout.dims), wide.square_().sum(layout.dims), count], dim=1)
    near = False
    if layout.last:
        sums = layout.by_split(_row_moments, [flat])
        means, squares = (sums / count.clamp(min=1)).chunk(2, dim=1)
        near = not bool((squares < means.square_() * (1 + NEAR**-2)).any())
    if not near:
        # Any shift to among the values will do, and a mean of an eighth of them is: where these
        # are far from the others, the variance is so large that the rest is little beside it.
        dtype, dims = accumulation_dtype(x.dtype), 0 if layout.last else (0, 2)
        some = [part[::8].mean(dims, dtype=dtype) for part in flat.split(layout.rows)]
        shift = torch.stack(some).nan_to_num_(0, 0, 0)
        rest, squares = layout.by_split(_centred_sums, [flat], shift).chunk(2, dim=1)
        # To about the origin, where float64 keeps the digits.
        shift = shift.double()
        around = shift * count
        sums = torch.cat([around + rest, squares + shift * (rest + rest + around)], dim=1)
    return torch.cat([sums, count], dim=1)


def _row_moments(parts: Sequence[Tensor]) -> Tensor:
    """Return the sums of values and of their squares of each [n, C], [s, 2C], float64."""
    rows, features = parts[0].shape
    if not rows:
        return parts[0].new_zeros(len(parts), 2 * features, dtype=torch.float64)
    # ATen adds row to row in float32. The error grows with the rows of one sum and shrinks with
    # the number of sums: so it is a few roundings, however many rows there are.
    fold, depth = _fold(rows, features), 8 * math.isqrt(rows) + 1
    dtype, given = accumulation_dtype(parts[0].dtype), (None, None)
    if dtype != parts[0].dtype:
        # Running statistics, moved by nothing: ATen returns new ones of their type.
        given = torch.zeros(2, fold * features, dtype=dtype).unbind()
    pieces = [piece for part in parts for piece in part.view(-1, fold * features).split(depth)]
    found = [torch.ops.aten.batch_norm_update_stats(piece, *given, 0.0) for piece in pieces]
    stats = torch.stack(list(itertools.chain(*found))).double().view(-1, 2, fold, features)
    means, squares = stats.unbind(1)
    squares.addcmul_(means, means)
    stats *= torch.tensor([float(len(piece)) for piece in pieces]).view(-1, 1, 1, 1)
    return stats.view(len(parts), -1, 2, fold, features).sum((1, 3)).flatten(1)


def normalize(x: Tensor, splits: Splits, moments: Moments, affine: Affine) -> Tensor:
    """Return `(x - mean) * invstd * weight + bias` with each row's split's values, like `x`."""
    scale = affine.scale(moments)
    origin, beyond = _origin(x, moments, affine)
    shift = beyond * scale
    if affine.bias is not None:
        shift += affine.bias
    y = _map_rows(x, splits, _Map(scale, shift, origin))
    return y.relu_() if affine.relu else y


def grad_sums(dy: Tensor, x: Tensor, splits: Splits, moments: Moments, affine: Affine) -> Tensor:
    """Return the local `[sum of dy | sum of dy * (x - mean)]`, [S, 2C], accumulation type."""
    dy = affine.through_relu(dy, lambda: normalize(x, splits, moments, affine))
    layout = _Layout(x, splits, len(moments.count))
    mean = moments.mean
    high = mean.to(accumulation_dtype(x.dtype))
    flats = [layout.flat(dy), layout.flat(x)]
    if layout.elements <= SMALL and layout.equal:
        upstream, piece = (flat.view(len(high), -1, *flat.shape[1:]) for flat in flats)
        products = torch.sub(piece, layout.over(high), out=_scratch.like(piece, high.dtype))
        pair = upstream, products.mul_(upstream)
        sums = torch.cat([t.sum(layout.dims, dtype=high.dtype) for t in pair], dim=1).double()
    else:
        sums = layout.by_split(_backward_sums, flats, high)
    sum_dy, sum_dy_xmu = sums.chunk(2, dim=1)
    sum_dy_xmu += (high - mean) * sum_dy
    return sums.to(high.dtype)


def grad_input(
    dy: Tensor, x: Tensor, splits: Splits, moments: Moments, affine: Affine, sums: Tensor
) -> Tensor:
    """Return the gradient of `x` from the global `sums` of `grad_sums`, like `x`."""
    dy = affine.through_relu(dy, lambda: normalize(x, splits, moments, affine))
    scale = affine.scale(moments)
    mean_dy, mean_dy_xmu = moments.per_element(sums.double()).chunk(2, dim=1)
    slope = mean_dy_xmu * moments.invstd(affine.eps).square() * -scale
    origin, beyond = _origin(x, moments, affine)
    values = _Map(slope, slope * beyond - scale * mean_dy, origin, scale)
    return _map_rows(x, splits, values, dy)


class _Map(NamedTuple):
    """The map `(x - origin) * scale + shift + dy * dy_scale`, values per split and channel."""

    scale: Tensor
    shift: Tensor
    origin: Tensor | None
    dy_scale: Tensor | None = None

    def write(self, output: Tensor, x: Tensor, dy: Tensor | None, last: bool) -> None:
        """Write what becomes of `x` and `dy` into `output`."""
        if self.origin is not None:
            x = torch.sub(x, self.origin, out=output)
        if last:
            torch.addcmul(self.shift, x, self.scale, out=output)
        else:
            # Where two values stay the same along the rows, addcmul is not vectorized.
            torch.mul(x, self.scale, out=output)
        if dy is not None:
            output.addcmul_(dy, self.dy_scale)
        if not last:
            output += self.shift


def _map_rows(x: Tensor, splits: Splits, values: _Map, dy: Tensor | None = None) -> Tensor:
    """Return what `values` make of `x`, and of `dy` where it is given, like `x`."""
    layout = _Layout(x, splits, len(values.scale))
    dtype = accumulation_dtype(x.dtype)
    given = [value is not None for value in values]
    packed = torch.stack([value for value in values if value is not None]).to(dtype)
    output = layout.output(x)
    flats = [layout.flat(output, ordered=False), layout.flat(x)]
    if dy is not None:
        flats.append(layout.flat(dy))
    # From the end, where the pass before this one left off: that is in the cache still.
    for split, (result, *wide) in layout.blocks(*flats, reverse=True):
        here = iter(layout.over(packed if split == slice(None) else packed[:, split]).unbind())
        target = result
        if x.dtype != dtype:
            wide = [_scratch.like(t, dtype, slot).copy_(t) for slot, t in enumerate(wide)]
            target = wide[0]
        here = _Map(*(next(here) if there else None for there in given))
        here.write(target, wide[0], None if dy is None else wide[1], layout.last)
        if target is not result:
            result.copy_(target)
    if layout.order is None:
        return output
    # Rows were written in the order of their splits.
    placed = torch.empty_like(output)
    placed[layout.order] = output
    return placed


def _centred_sums(xs: Sequence[Tensor], means: Tensor) -> Tensor:
    """Return the sums per channel of each `x - mean` and of its square, [s, 2C], float64."""
    return _backward_sums(None, xs, means)


def _backward_sums(
    dys: Sequence[Tensor] | None, xs: Sequence[Tensor], means: Tensor
) -> Tensor:
    """Return the sums per channel of each `dy` and `dy * (x - mean)`, [s, 2C], float64.

    With None for dys, `x - mean` serves as `dy`.
    """
    x = xs[0]
    features, fold, over = x.shape[1], 1, 3
    if not x.numel():
        return means.new_zeros(len(xs), 2 * features, dtype=torch.float64)
    if x.dim() == 2:
        fold, depth = _fold(*x.shape), (2 if dys is None else 16) * math.isqrt(len(x)) + 1
        view, channels, column = (-1, fold * features), (fold, features), (1, -1)
        means = means.repeat(1, fold) if fold > 1 else means
    else:
        # ATen goes through all rows channel by channel: few rows, so that they are in the cache
        # when the next channel comes. A long row is added up in float32, and so it is cut.
        length, over = x.shape[2], 4
        depth = max((4 * PIECE if dys is None else PIECE) // (features * length), 1)
        least = -(-length // WIDTH)
        fold = next((fold for fold in range(least, 4 * least) if length % fold == 0), 1)
        view, channels = (-1, fold * features, length // fold), (features, fold)
        column = (1, -1, 1)
        means = means.repeat_interleave(fold, dim=1) if fold > 1 else means
    one, mask, found = torch.ones_like(means[0]), [False, True, True], []
    zero = torch.zeros_like(one)
    for dy, x, mean in zip(xs if dys is None else dys, xs, means.unbind(), strict=True):
        for up, piece in zip(dy.view(view).split(depth), x.view(view).split(depth), strict=True):
            if dys is None:
                out = _scratch.like(piece, mean.dtype)
                up = piece = torch.sub(piece, mean.view(column), out=out)
            _, products, plain = torch.ops.aten.native_batch_norm_backward(
                up, piece, one, None, None, zero if dys is None else mean, one, True, 0.0, mask
            )
            found += [plain, products]
    sums = torch.stack(found).view(len(xs), -1, 2, *channels)
    return sums.sum((1, over), dtype=torch.float64).flatten(1)


def _fold(rows: int, features: int) -> int:
    """Return how many short rows to see as one long one."""
    fold = min(max(WIDTH // features, 1), rows)
    while rows % fold:
        fold -= 1
    return fold


def _origin(x: Tensor, moments: Moments, affine: Affine) -> tuple[Tensor | None, Tensor]:
    """Return what to subtract from x first, None where zero will do, and it less the mean."""
    mean = moments.mean
    if x.numel() > SMALL and bool(((mean * moments.invstd(affine.eps)).abs() <= CLOSE).all()):
        return None, -mean
    high = mean.to(accumulation_dtype(x.dtype)).double()
    return high, high - mean

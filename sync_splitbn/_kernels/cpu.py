"""The four kernels for eager CPU: few passes over memory, few calls of operators.

N rows, S splits, C features, L positions per row. ATen's own batch norm has the fastest pass over
the data that there is, for two pairs of sums per channel: its update of statistics (where the
channels are innermost) for values and squares, its backward for `dy` and `dy * (x - mean)`.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._moments import Affine, Moments, Splits, accumulation_dtype
from ._layout import Layout, scratch

# Elements that stay in the cache while one channel after the other is picked from them.
PIECE = 2**17
# Elements up to which what an operator costs to call counts more than what it does.
SMALL = 2**16
# Features that a row should have to be added to others at full speed, and positions at most.
WIDTH = 2**9
# Up to this |mean| / std, float32 holds the mean of a block well enough.
NEAR = 3.0
# Up to this |mean| / std, x * scale + shift is as good as (x - mean) * scale.
CLOSE = 64.0


def moments(x: Tensor, splits: Splits, num_splits: int) -> Tensor:
    """Return the packed local moments of `x`, [S, 2C + 1], float64."""
    layout = Layout(x, splits, num_splits)
    flat = layout.flat(x)
    counts = [[float(size * layout.length)] for size in layout.sizes]
    count = torch.tensor(counts, dtype=torch.float64)
    if layout.elements <= SMALL and layout.equal:
        # In float64 no digit is lost; on so few, that costs less than to find out.
        piece = flat.view(num_splits, -1, *flat.shape[1:])
        wide = scratch.like(piece, torch.float64).copy_(piece)
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


def normalize(x: Tensor, splits: Splits, moments: Moments, affine: Affine) -> Tensor:
    """Return `(x - mean) * invstd * weight + bias` with each row's split's values, like `x`."""
    scale = affine.scale(moments)
    origin, beyond = _origin(x, moments, affine)
    shift = beyond * scale
    if affine.bias is not None:
        shift += affine.bias
    y = _map_rows(x, splits, origin, [scale, shift])
    return y.relu_() if affine.relu else y


def grad_sums(dy: Tensor, x: Tensor, splits: Splits, moments: Moments, affine: Affine) -> Tensor:
    """Return the local `[sum of dy | sum of dy * (x - mean)]`, [S, 2C], accumulation type."""
    dy = affine.through_relu(dy, lambda: normalize(x, splits, moments, affine))
    layout = Layout(x, splits, len(moments.count))
    mean = moments.mean
    high = mean.to(accumulation_dtype(x.dtype))
    flats = [layout.flat(dy), layout.flat(x)]
    if layout.elements <= SMALL and layout.equal:
        upstream, piece = (flat.view(len(high), -1, *flat.shape[1:]) for flat in flats)
        products = torch.sub(piece, layout.over(high), out=scratch.like(piece, high.dtype))
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
    return _map_rows(x, splits, origin, [slope, slope * beyond - scale * mean_dy, scale], dy)


def _map_rows(
    x: Tensor,
    splits: Splits,
    origin: Tensor | None,
    values: list[Tensor],
    dy: Tensor | None = None,
) -> Tensor:
    """Return `(x - origin) * values[0] + values[1] + dy * values[2]`, like `x`; values [S, C]."""
    layout = Layout(x, splits, len(values[0]))
    dtype = accumulation_dtype(x.dtype)
    packed = torch.stack(values if origin is None else [*values, origin]).to(dtype)
    output = layout.output(x)
    flats = [layout.flat(output, ordered=False), layout.flat(x)]
    if dy is not None:
        flats.append(layout.flat(dy))
    for split, (result, *sources) in layout.blocks(*flats):
        mine = layout.over(packed if split == slice(None) else packed[:, split]).unbind()
        if x.dtype == dtype:
            _write(result, sources, mine, layout.last)
        elif len(mine) == 2:
            for of in zip(sources[0], *(value.flatten(1) for value in mine), result, strict=True):
                _native_map(*of)
        else:
            wide = [scratch.like(t, dtype, slot).copy_(t) for slot, t in enumerate(sources)]
            _write(wide[0], wide, mine, layout.last)
            result.copy_(wide[0])
    if layout.order is None:
        return output
    # Rows were written in the order of their splits.
    placed = torch.empty_like(output)
    placed[layout.order] = output
    return placed


def _write(target: Tensor, sources: list[Tensor], values: Sequence[Tensor], last: bool) -> None:
    """Write what `_map_rows` returns of x, and dy, into `target`, which may be x."""
    source, *upstream = sources
    scale, shift, *more = values
    if len(more) > len(upstream):
        source = torch.sub(source, more[-1], out=target)
    # With two values that stay the same along the positions, addcmul is not vectorized.
    if last:
        torch.addcmul(shift, source, scale, out=target)
    else:
        torch.mul(source, scale, out=target)
    if upstream:
        target.addcmul_(upstream[0], more[0])
    if not last:
        target += shift


def _native_map(x: Tensor, scale: Tensor, shift: Tensor, output: Tensor) -> None:
    """Write `x * scale + shift` per channel of [n, C, L] or [n, C]: half precision in one pass."""
    none, zero, one = scale.new_empty(0), torch.zeros_like(scale), torch.ones_like(scale)
    torch.ops.aten.native_batch_norm.out(
        x, scale, shift, zero, one, False, 0.0, 0.0, out=output, save_mean=none, save_invstd=none
    )


def _row_moments(parts: Sequence[Tensor]) -> Tensor:
    """Return the sums of values and of their squares of each [n, C], [s, 2C], float64."""
    rows, features = parts[0].shape
    if not rows:
        return parts[0].new_zeros(len(parts), 2 * features, dtype=torch.float64)
    # ATen adds row to row in float32. The error grows with the rows of one sum and shrinks with
    # the number of sums: so it is a few roundings, however many rows there are.
    fold, depth = _fold(rows, features), 8 * math.isqrt(rows) + 1
    dtype = accumulation_dtype(parts[0].dtype)
    given: list[Tensor | None] = [None, None]
    if dtype != parts[0].dtype:
        # Running statistics, moved by nothing: ATen returns new ones of their type.
        given = list(torch.zeros(2, fold * features, dtype=dtype))
    pieces = [piece for part in parts for piece in part.view(-1, fold * features).split(depth)]
    found = [torch.ops.aten.batch_norm_update_stats(piece, *given, 0.0) for piece in pieces]
    stats = torch.stack(list(itertools.chain(*found))).double().view(-1, 2, fold, features)
    means, squares = stats.unbind(1)
    squares.addcmul_(means, means)
    stats *= torch.tensor([float(len(piece)) for piece in pieces]).view(-1, 1, 1, 1)
    # One dimension after the other: over several at once, such a sum is slow.
    return stats.view(len(parts), -1, 2, fold, features).sum(1).sum(2).flatten(1)


def _centred_sums(xs: Sequence[Tensor], means: Tensor) -> Tensor:
    """Return the sums per channel of each `x - mean` and of its square, [s, 2C], float64."""
    return _backward_sums(None, xs, means)


def _backward_sums(dys: Sequence[Tensor] | None, xs: Sequence[Tensor], means: Tensor) -> Tensor:
    """Return the sums per channel of each `dy` and `dy * (x - mean)`, [s, 2C], float64.

    With None for dys, `x - mean` serves as `dy`.
    """
    if not xs[0].numel():
        return means.new_zeros(len(xs), 2 * means.shape[1], dtype=torch.float64)
    rows, features, *length = xs[0].shape
    view: tuple[int, ...]
    if not length:
        fold, depth = _fold(rows, features), (2 if dys is None else 16) * math.isqrt(rows) + 1
        view, channels = (-1, fold * features), (fold, features)
        means = means.repeat(1, fold)
    else:
        # ATen goes through all rows channel by channel: few rows, so that they are in the cache
        # when the next channel comes. A long row is added up in float32, and so it is cut.
        depth = max((4 * PIECE if dys is None else PIECE) // (features * length[0]), 1)
        least = -(-length[0] // WIDTH)
        fold = next((fold for fold in range(least, 8 * least) if length[0] % fold == 0), 1)
        view, channels = (-1, features * fold, length[0] // fold), (features, fold)
        means = means.repeat_interleave(fold, dim=1)
    one, found = torch.ones_like(means[0]), []
    for i, mean in enumerate(means.unbind()):
        pieces = xs[i].view(view).split(depth)
        ups = [None] * len(pieces) if dys is None else dys[i].view(view).split(depth)
        for up, piece in zip(ups, pieces, strict=True):
            dy, x, at = _pair(up, piece, mean)
            _, products, plain = torch.ops.aten.native_batch_norm_backward(
                dy, x, one, None, None, at, one, True, 0.0, [False, True, True]
            )
            found += [plain, products]
    sums = torch.stack(found).double().view(len(xs), -1, 2, *channels)
    return sums.sum(1).sum(3 if length else 2).flatten(1)


def _pair(dy: Tensor | None, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return dy, x and the mean as ATen sums them best; for None, `x - mean` twice and zero."""
    if dy is None:
        out = scratch.like(x, mean.dtype)
        # Of two types, an operator makes one in memory of its own first.
        wide = x if x.dtype == mean.dtype else out.copy_(x)
        centred = torch.sub(wide, mean if x.dim() == 2 else mean.unsqueeze(1), out=out)
        return centred, centred, torch.zeros_like(mean)
    if x.dim() > 2 and x.dtype != mean.dtype:
        # Short rows of half precision take ATen several times as long.
        wide = scratch.like(x, mean.dtype).copy_(x)
        return scratch.like(dy, mean.dtype, slot=1).copy_(dy), wide, mean
    return dy, x, mean


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

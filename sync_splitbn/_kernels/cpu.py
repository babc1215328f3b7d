"""The four kernels for eager CPU: ATen's own batch norm in pieces, by the statistics of all ranks.

N rows, S splits, C features, L positions per row. ATen has the fastest passes over the data that
there are, each of them for more than is asked of it here: its update of statistics (where the
channels are innermost) and its backward for two sums per channel, its evaluation for an affine map
of each channel. Their sums are float32 inside: hence pieces, that keep the digits.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._moments import Affine, Moments, Splits, accumulation_dtype
from ._layout import Layout, scratch

# Their type stubs know neither the missing tensors nor the several results.
native_batch_norm: Any = torch.native_batch_norm
batch_norm_update_stats: Any = torch.batch_norm_update_stats

# Elements that stay in the cache while one channel after the other is picked from them.
PIECE = 2**19
# Features that a row should have to be added to others at full speed, and positions at most.
WIDTH = 2**9
# Rows of half precision at most: these ATen adds to one another in float32, others in float64.
ROWS_HALF = 4
# Up to this |mean| / std, sums about the origin keep a variance's digits: of values and squares,
# and of the means and variances of pieces.
NEAR, NEAR_ROWS = 1.5, 3.0


def moments(x: Tensor, splits: Splits, num_splits: int) -> Tensor:
    """Return the packed local moments of `x`, [S, 2C + 1], float64."""
    layout = Layout(x, splits, num_splits)
    flat = layout.flat(x)
    counts = [[float(size * layout.length)] for size in layout.sizes]
    count = torch.tensor(counts, dtype=torch.float64)
    if layout.last:
        sums, near = layout.by_split(_row_sums, [flat]), NEAR_ROWS
    else:
        sums, near = layout.by_split(_square_sums, [flat]), NEAR
    values, squares = sums.chunk(2, dim=1)
    far = squares * count < values.square() * (1 + near**-2)
    if far.any():
        channels = far.any(0).nonzero().flatten()
        exact = [_exact_sums(part, channels) for part in flat.split(layout.rows)]
        sums.unflatten(1, (2, -1))[:, :, channels] = torch.stack(exact)
    return torch.cat([sums, count], dim=1)


def normalize(x: Tensor, splits: Splits, moments: Moments, affine: Affine) -> Tensor:
    """Return `(x - mean) * invstd * weight + bias` with each row's split's values, like `x`."""
    y = _map_rows(x, splits, moments, affine.eps, affine.weights, affine.biases)
    return y.relu_() if affine.relu else y


def grad_sums(dy: Tensor, x: Tensor, splits: Splits, moments: Moments, affine: Affine) -> Tensor:
    """Return the local `[sum of dy | sum of dy * (x - mean)]`, [S, 2C], accumulation type."""
    dy = affine.through_relu(dy, lambda: normalize(x, splits, moments, affine))
    mean = moments.mean
    layout, high = Layout(x, splits, len(mean)), mean.to(accumulation_dtype(x.dtype))
    sums = layout.by_split(_sums, [layout.flat(dy), layout.flat(x)], high)
    sum_dy, sum_dy_xmu = sums.chunk(2, dim=1)
    sum_dy_xmu.addcmul_(high - mean, sum_dy)
    return sums.to(high.dtype)


def grad_input(
    dy: Tensor, x: Tensor, splits: Splits, moments: Moments, affine: Affine, sums: Tensor
) -> Tensor:
    """Return the gradient of `x` from the global `sums` of `grad_sums`, like `x`."""
    dy = affine.through_relu(dy, lambda: normalize(x, splits, moments, affine))
    scale = affine.scale(moments)
    mean_dy, mean_dy_xmu = moments.per_element(sums).chunk(2, dim=1)
    # As a batch norm of x, with dy * scale added.
    minus = -scale
    weight = mean_dy_xmu * moments.invstd(affine.eps) * minus
    packed = torch.stack([weight, mean_dy * minus, scale]).to(sums.dtype)
    weight, bias, scale = packed.unbind()
    return _map_rows(x, splits, moments, affine.eps, weight, bias, (dy, scale))


def _map_rows(
    x: Tensor,
    splits: Splits,
    moments: Moments,
    eps: float,
    weights: Tensor | Sequence[Tensor] | None,
    biases: Tensor | Sequence[Tensor] | None,
    more: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return `(x - mean) * invstd * weight + bias`, like `x`, with `dy * scale` of more added."""
    layout = Layout(x, splits, len(moments.packed))
    dtype = accumulation_dtype(x.dtype)
    mean, var = moments.mean.to(dtype), moments.var.to(dtype)
    origin = None
    if x.dtype == torch.float32 and moments.is_far:
        origin, mean = layout.over(mean).unbind(), (moments.mean - mean).to(dtype)
    maps = list(zip(*(_of_splits(t, len(mean)) for t in (weights, biases, mean, var)), strict=True))
    output, none = layout.output(x), mean.new_empty(0)
    source, result = layout.flat(x), layout.flat(output, ordered=False)
    if more is not None:
        dy, scales = layout.flat(more[0]), layout.over(more[1]).unbind()
    # A sum is rounded to half precision once.
    wide = more is not None and x.dtype != dtype
    for split, rows in layout.blocks():
        piece, target = source[rows], result[rows]
        if wide:
            piece = target = scratch.like(piece, dtype).copy_(piece)
        if origin is not None:
            piece = torch.sub(piece, origin[split], out=target)
        native_batch_norm(piece, *maps[split], False, 0.0, eps, out=(target, none, none))
        if more is not None:
            upstream = dy[rows]
            if wide:
                # Of two types, an operator makes one in memory of its own first.
                upstream = scratch.like(upstream, dtype, slot=1).copy_(upstream)
            target.addcmul_(upstream, scales[split])
        if wide:
            result[rows].copy_(target)
    if layout.order is None:
        return output
    # Rows were written in the order of their splits.
    placed = torch.empty_like(output)
    placed[layout.order] = output
    return placed


def _row_sums(parts: Sequence[Tensor]) -> Tensor:
    """Return the sums of values and of their squares of each [n, C], [s, 2C], float64."""
    rows, features = parts[0].shape
    if not parts[0].numel():
        return parts[0].new_zeros(len(parts), 2 * features, dtype=torch.float64)
    # ATen adds row to row in float32. The error grows with the rows of one sum and shrinks with
    # the number of sums: so it is a few roundings, however many rows there are.
    fold, depth = _fold(rows, features, 8)
    dtype = accumulation_dtype(parts[0].dtype)
    given: list[Tensor | None] = [None, None]
    if dtype != parts[0].dtype:
        # Running statistics, moved by nothing: ATen returns new ones of their type.
        given = list(torch.zeros(2, fold * features, dtype=dtype))
    pieces = [piece for part in parts for piece in part.view(-1, fold * features).split(depth)]
    found = [batch_norm_update_stats(piece, *given, 0.0) for piece in pieces]
    stats = torch.stack(list(itertools.chain(*found))).double().view(-1, 2, fold, features)
    means, squares = stats.unbind(1)
    squares.addcmul_(means, means)
    lengths = [float(len(piece)) for piece in pieces]
    equal = min(lengths) == depth
    stats *= depth if equal else torch.tensor(lengths, dtype=torch.float64).view(-1, 1, 1, 1)
    # One dimension after the other: over several at once, such a sum is slow.
    return stats.view(len(parts), -1, 2, fold, features).sum(1).sum(2).flatten(1)


def _square_sums(parts: Sequence[Tensor]) -> Tensor:
    """Return the sums of values and of their squares of each [n, C, L], [s, 2C], float64."""
    dtype = accumulation_dtype(parts[0].dtype)
    return _sums(None, parts, parts[0].new_zeros(len(parts), parts[0].shape[1], dtype=dtype))


def _sums(dys: Sequence[Tensor] | None, xs: Sequence[Tensor], means: Tensor) -> Tensor:
    """Return the sums per channel of each `dy` and `dy * (x - mean)`, [s, 2C], float64.

    With None for dys, x serves as dy.
    """
    if not xs[0].numel():
        return means.new_zeros(len(xs), 2 * means.shape[1], dtype=torch.float64)
    rows, features, *length = xs[0].shape
    view: tuple[int, ...]
    if not length:
        fold, depth = _fold(rows, features, 16)
        view, channels = (-1, fold * features), (fold, features)
        means = torch.cat([means] * fold, dim=1)
    else:
        # ATen goes through all rows channel by channel: few rows, so that they are in the cache
        # when the next channel comes. A long row is added up in float32, and so it is cut.
        depth = max(PIECE // (features * length[0] * (1 if dys is None else 2)), 1)
        depth = depth if xs[0].dtype == means.dtype else min(depth, ROWS_HALF)
        least = -(-length[0] // WIDTH)
        fold = next((fold for fold in range(least, 8 * least) if length[0] % fold == 0), 1)
        view, channels = (-1, features * fold, length[0] // fold), (features, fold)
        means = means.repeat_interleave(fold, dim=1)
    one, found = torch.ones_like(means[0]), []
    for x, dy, mean in zip(xs, dys or xs, means.unbind(), strict=True):
        for of in zip(dy.view(view).split(depth), x.view(view).split(depth), strict=True):
            _, products, plain = torch.ops.aten.native_batch_norm_backward(
                *of, one, None, None, mean, one, True, 0.0, [False, True, True]
            )
            found += [plain, products]
    sums = torch.stack(found).double().view(len(xs), -1, 2, *channels)
    return sums.sum(1).sum(3 if length else 2).flatten(1)


def _exact_sums(part: Tensor, channels: Tensor) -> Tensor:
    """Return the sums of some channels' values and squares, [2, c], taken in float64."""
    dims = [0, 2][: part.dim() - 1]
    total = torch.zeros(2, len(channels), dtype=torch.float64)
    per_row = part[:1].numel() or 1
    for piece in part.split(max(PIECE // per_row, 1)):
        wide = piece[:, channels].double()
        total += torch.stack([wide.sum(dims), wide.square_().sum(dims)])
    return total


def _fold(rows: int, features: int, depth: int) -> tuple[int, int]:
    """Return how many short rows to see as one long one, and how many of these to add up.

    At most `depth` times the square root of the rows, for each thread.
    """
    fold = min(max(WIDTH // features, 1), rows)
    while rows % fold:
        fold -= 1
    most = depth * torch.get_num_threads() * math.isqrt(rows) + 1
    pieces = -(-rows // (fold * most))
    return fold, -(-rows // (fold * pieces))


def _of_splits(
    values: Tensor | Sequence[Tensor] | None, num_splits: int
) -> Sequence[Tensor | None]:
    """Return the values of each split, [C], or None for each."""
    if values is None:
        return [None] * num_splits
    return values.unbind() if isinstance(values, Tensor) else values

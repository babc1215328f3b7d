"""The four kernels for eager CPU: few passes over memory, in blocks that stay in the cache.

N rows, S splits, C features, L positions per row. A tensor is seen as [s, n, C, L], or, where its
channels are innermost, as [s, n * L, C], in pieces: all s = S equal splits at once where that is
small, else a block of rows of s = 1 split at a time. For one split, ATen's own batch norm serves:
with given statistics it is the fastest map `x * scale + shift` per channel that there is, and its
backward the fastest pair of sums `dy`, `dy * (x - mean)`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .._moments import Affine, Moments, Splits, accumulation_dtype

# Elements of a block: 1 MiB of float32, about what a core's own cache holds.
BLOCK = 2**18
# With the channels innermost, ATen's backward adds in float32, one position after the other.
POSITIONS = 2**12
# Up to this |mean| / std, x * scale + shift is as good as (x - mean) * scale.
NEAR = 64.0


class _Layout:
    """How the rows of a tensor lie in memory, and which of them make a split."""

    def __init__(self, x: Tensor, splits: Splits, num_splits: int) -> None:
        self.features, self.length = x.shape[1], x.shape[2:].numel()
        self.last = x.dim() == 2 or x.movedim(1, -1).is_contiguous()
        self.order: Tensor | None = None
        if isinstance(splits, Tensor):
            self.order = splits.argsort(stable=True)
            splits = tuple(splits.bincount(minlength=num_splits).tolist())
        self.sizes = splits
        self.small = 0 < x.numel() <= BLOCK and min(splits) == max(splits)

    def flat(self, tensor: Tensor) -> Tensor:
        """Return a tensor as [N, C, L] or [N * L, C], rows in the order of their splits."""
        if self.order is not None:
            tensor = tensor[self.order]
        if self.last:
            tensor = tensor.movedim(1, -1).contiguous()
            return tensor.view(sum(self.sizes) * self.length, self.features)
        return tensor.contiguous().view(sum(self.sizes), self.features, self.length)

    def parts(
        self, *flats: Tensor, elements: int = BLOCK
    ) -> Iterator[tuple[slice, list[list[Tensor]]]]:
        """Yield which splits a part holds, and its blocks: a piece of each tensor."""
        rows = [size * self.length for size in self.sizes] if self.last else list(self.sizes)
        if self.small:
            inner = flats[0].shape[1:]
            yield slice(None), [[flat.view(len(rows), rows[0], *inner) for flat in flats]]
            return
        step = max(elements // max(self.features * (1 if self.last else self.length), 1), 1)
        for i, of in enumerate(zip(*(flat.split(rows) for flat in flats), strict=True)):
            if of[0].numel():
                pieces = zip(*(part.unsqueeze(0).split(step, dim=1) for part in of), strict=True)
                yield slice(i, i + 1), list(map(list, pieces))

    def over(self, values: Tensor) -> Tensor:
        """Return values per split and channel, [s, C], so that they broadcast over a piece."""
        return values.unsqueeze(1) if self.last else values.unsqueeze(1).unsqueeze(3)


def moments(x: Tensor, splits: Splits, num_splits: int) -> Tensor:
    """Return the packed local moments of `x`, [S, 2C + 1], float64."""
    layout = _Layout(x, splits, num_splits)
    dtype = accumulation_dtype(x.dtype)
    dims = 1 if layout.last else (1, 3)
    sums = torch.zeros(3, num_splits, layout.features, dtype=torch.float64)
    for split, blocks in layout.parts(layout.flat(x)):
        # Any shift will do; one near the mean keeps the digits.
        shift = blocks[0][0][:, :16].mean(dims, dtype=dtype)
        column, pairs = layout.over(shift), []
        # One buffer for all blocks: memory that is new costs more than what is done with it.
        buffer = torch.empty_like(blocks[0][0], dtype=dtype)
        for (piece,) in blocks:
            centred = torch.sub(piece, column, out=buffer[:, : piece.shape[1]])
            if layout.last or layout.small:
                pairs.append([centred.sum(dims), centred.square_().sum(dims)])
            else:
                pairs.append(_native_sums(centred, centred, torch.zeros_like(shift)))
        sums[:, split] = torch.stack([shift.double(), *_added(pairs)])
    shift, rest, squares = sums
    counts = [[float(size * layout.length)] for size in layout.sizes]
    count = torch.tensor(counts, dtype=torch.float64)
    around = shift * count
    return torch.cat([around + rest, squares + shift * (rest + rest + around), count], dim=1)


def normalize(x: Tensor, splits: Splits, moments: Moments, affine: Affine) -> Tensor:
    """Return `(x - mean) * invstd * weight + bias` with each row's split's values, like `x`."""
    invstd = moments.invstd(affine.eps)
    scale = invstd if affine.weight is None else invstd * affine.weight
    origin, beyond = _origin(x, moments.mean, invstd)
    shift = beyond * scale
    if affine.bias is not None:
        shift += affine.bias
    return _map_rows(x, splits, origin, scale, shift)


def grad_sums(dy: Tensor, x: Tensor, splits: Splits, moments: Moments) -> Tensor:
    """Return the local `[sum of dy | sum of dy * (x - mean)]`, [S, 2C], accumulation type."""
    num_splits = len(moments.count)
    layout = _Layout(x, splits, num_splits)
    dims = 1 if layout.last else (1, 3)
    high = moments.mean.to(accumulation_dtype(x.dtype))
    elements = POSITIONS * layout.features if layout.last else x.numel()
    sums = torch.zeros(num_splits, 2 * layout.features, dtype=torch.float64)
    flats = layout.flat(dy), layout.flat(x)
    for split, blocks in layout.parts(*flats, elements=elements):
        if layout.small:
            ((dy_piece, piece),) = blocks
            products = (piece - layout.over(high)).mul_(dy_piece)
            pairs = [[dy_piece.sum(dims, dtype=high.dtype), products.sum(dims)]]
        else:
            pairs = [_native_sums(dy_piece, piece, high[split]) for dy_piece, piece in blocks]
        sums[split] = torch.cat(_added(pairs), dim=1)
    sum_dy, sum_dy_xmu = sums.chunk(2, dim=1)
    sum_dy_xmu += (high - moments.mean) * sum_dy
    return sums.to(high.dtype)


def grad_input(
    dy: Tensor, x: Tensor, splits: Splits, moments: Moments, affine: Affine, sums: Tensor
) -> Tensor:
    """Return the gradient of `x` from the global `sums` of `grad_sums`, like `x`."""
    invstd = moments.invstd(affine.eps)
    scale = invstd if affine.weight is None else invstd * affine.weight
    per_element = sums / moments.count.clamp(min=1).unsqueeze(1)
    mean_dy, mean_dy_xmu = per_element.chunk(2, dim=1)
    slope = mean_dy_xmu * invstd.square() * -scale
    origin, beyond = _origin(x, moments.mean, invstd)
    return _map_rows(x, splits, origin, slope, slope * beyond - scale * mean_dy, dy, scale)


def _map_rows(
    x: Tensor,
    splits: Splits,
    origin: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    dy: Tensor | None = None,
    dy_scale: Tensor | None = None,
) -> Tensor:
    """Return `(x - origin) * scale + shift`, plus `dy * dy_scale` where given, like `x`."""
    layout = _Layout(x, splits, scale.shape[0])
    dtype = accumulation_dtype(x.dtype)
    scale, shift = scale.to(dtype), shift.to(dtype)
    dy_scale = scale if dy_scale is None else dy_scale.to(dtype)
    output = torch.empty_like(x) if layout.last else torch.empty(x.shape, dtype=x.dtype)
    # Rows are written in the order of their splits, and put where they belong at the end.
    order, layout.order = layout.order, None
    target = layout.flat(output)
    layout.order = order
    # Half precision, and what is far from the origin, is worked on in a buffer.
    copied = x.dtype != dtype or origin is not None
    flats = [target, layout.flat(x)] + ([] if dy is None else [layout.flat(dy)])
    for split, blocks in layout.parts(*flats):
        columns = [layout.over(value[split]) for value in (scale, shift, dy_scale)]
        buffer = torch.empty_like(blocks[0][1], dtype=dtype) if copied else None
        for result, piece, *upstream in blocks:
            wide, source = result, piece
            if buffer is not None:
                source = buffer[:, : piece.shape[1]]
                if origin is None:
                    source.copy_(piece)
                else:
                    torch.sub(piece, layout.over(origin[split]), out=source)
                wide = source if x.dtype != dtype else result
            if layout.last or layout.small:
                torch.addcmul(columns[1], source, columns[0], out=wide)
            else:
                _native_map(source[0], scale[split][0], shift[split][0], wide[0])
            if upstream:
                wide.addcmul_(upstream[0], columns[2])
            if wide is not result:
                result.copy_(wide)
    if order is None:
        return output
    placed = torch.empty_like(output)
    placed[order] = output
    return placed


def _native_map(x: Tensor, scale: Tensor, shift: Tensor, output: Tensor) -> None:
    """Write `x * scale + shift` per channel of [n, C, L] into `output`."""
    none, zero, one = x.new_empty(0), torch.zeros_like(scale), torch.ones_like(scale)
    torch.ops.aten.native_batch_norm.out(
        x, scale, shift, zero, one, False, 0.0, 0.0, out=output, save_mean=none, save_invstd=none
    )


def _native_sums(dy: Tensor, x: Tensor, mean: Tensor) -> list[Tensor]:
    """Return the sums per channel, [1, C], of `dy` and of `dy * (x - mean)` for a split's piece."""
    one = torch.ones_like(mean[0])
    _, products, plain = torch.ops.aten.native_batch_norm_backward(
        dy[0], x[0], one, None, None, mean[0], one, True, 0.0, [False, True, True]
    )
    return [plain.unsqueeze(0), products.unsqueeze(0)]


def _added(pairs: list[list[Tensor]]) -> list[Tensor]:
    """Add the pairs of several blocks in float64."""
    if len(pairs) == 1:
        return pairs[0]
    return [torch.stack(sums).sum(0, dtype=torch.float64) for sums in zip(*pairs, strict=True)]


def _origin(x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return what to subtract from x first, None where zero will do, and it less the mean."""
    if bool((mean * invstd).abs().max() <= NEAR):
        return None, -mean
    high = mean.to(accumulation_dtype(x.dtype))
    return high, high - mean

"""The four kernels for eager CPU: few passes over memory, in blocks that stay in the cache.

N rows, S splits, C features, L positions per row. A tensor is seen as [s, n, C, L], or, where its
channels are innermost, as [s, n * L, C], in parts: all s = S equal splits at once where that is
small, else s = 1 split at a time, in blocks. For one split, ATen's own batch norm serves:
with given statistics it is the fastest map `x * scale + shift` per channel that there is, and its
backward the fastest pair of sums `dy`, `dy * (x - mean)`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._moments import Affine, Moments, Splits, accumulation_dtype

# Elements of a block: 1 MiB of float32, about what a core's own cache holds.
BLOCK = 2**18
# Positions whose values are added in float32, with the channels innermost.
POSITIONS = 2**12
# Rows, or positions, of a split that tell where its values are.
SAMPLE = 16
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
        self.dims = 1 if self.last else (1, 3)
        self.small = 0 < x.numel() <= BLOCK and min(splits) == max(splits)

    def flat(self, tensor: Tensor) -> Tensor:
        """Return a tensor as [N, C, L] or [N * L, C], rows in the order of their splits."""
        if self.order is not None:
            tensor = tensor[self.order]
        if self.last:
            tensor = tensor.movedim(1, -1).contiguous()
            return tensor.view(sum(self.sizes) * self.length, self.features)
        return tensor.contiguous().view(sum(self.sizes), self.features, self.length)

    def parts(self, *flats: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
        """Yield which splits a part holds, and the part of each tensor."""
        rows = [size * self.length for size in self.sizes] if self.last else list(self.sizes)
        if self.small:
            shape = (len(rows), rows[0], *flats[0].shape[1:])
            yield slice(None), [flat.view(shape) for flat in flats]
            return
        for i, of in enumerate(zip(*(flat.split(rows) for flat in flats), strict=True)):
            if of[0].numel():
                yield slice(i, i + 1), [part.unsqueeze(0) for part in of]

    def blocks(self, *parts: Tensor, elements: int = BLOCK) -> Iterator[tuple[Tensor, ...]]:
        """Yield the parts piece by piece, each of about so many elements."""
        row = self.features * (1 if self.last else self.length)
        rows = parts[0].shape[1] if self.small else max(elements // row, 1)
        return zip(*(part.split(rows, dim=1) for part in parts), strict=True)

    def over(self, values: Tensor) -> Tensor:
        """Return values per split and channel, [s, C], so that they broadcast over a part."""
        return values.unsqueeze(1) if self.last else values.unsqueeze(1).unsqueeze(3)

    def output(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return a new tensor in the memory format of `x`, and the same one flat."""
        shape = (x.shape[0], *x.shape[2:], x.shape[1]) if self.last else x.shape
        tensor = torch.empty(shape, dtype=x.dtype)
        inner = (self.features,) if self.last else (self.features, self.length)
        flat = tensor.view(x.shape[0] * (self.length if self.last else 1), *inner)
        return tensor.movedim(-1, 1) if self.last else tensor, flat


def moments(x: Tensor, splits: Splits, num_splits: int) -> Tensor:
    """Return the packed local moments of `x`, [S, 2C + 1], float64."""
    layout = _Layout(x, splits, num_splits)
    dtype = accumulation_dtype(x.dtype)
    sums = torch.zeros(3, num_splits, layout.features, dtype=torch.float64)
    for split, (part,) in layout.parts(layout.flat(x)):
        # Any shift will do; one near most values keeps the digits. A median of rows from all over
        # the part is, be some of them padding.
        few = part[:, :: max(part.shape[1] // SAMPLE, 1)].to(dtype)
        shift = (few if layout.last else few.mean(3)).median(1).values
        pairs = []
        column, buffer = layout.over(shift), None
        elements = min(BLOCK, POSITIONS * layout.features) if layout.last else BLOCK
        for (piece,) in layout.blocks(part, elements=elements):
            # One buffer for all: memory that is new costs more than what is done with it.
            buffer = torch.empty_like(piece, dtype=dtype) if buffer is None else buffer
            centred = torch.sub(piece, column, out=buffer[:, : piece.shape[1]])
            if layout.last or layout.small:
                pairs.append([centred.sum(layout.dims), centred.square_().sum(layout.dims)])
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
    scale = affine.scale(moments)
    origin, beyond = _origin(x, moments, affine)
    shift = beyond * scale
    if affine.bias is not None:
        shift += affine.bias
    y = _map_rows(x, splits, _Map(origin, scale, shift))
    return y.relu_() if affine.relu else y


def grad_sums(dy: Tensor, x: Tensor, splits: Splits, moments: Moments, affine: Affine) -> Tensor:
    """Return the local `[sum of dy | sum of dy * (x - mean)]`, [S, 2C], accumulation type."""
    dy = affine.through_relu(dy, lambda: normalize(x, splits, moments, affine))
    num_splits = len(moments.count)
    layout = _Layout(x, splits, num_splits)
    high = moments.mean.to(accumulation_dtype(x.dtype))
    elements = POSITIONS * layout.features if layout.last else max(x.numel(), 1)
    sums = torch.zeros(num_splits, 2 * layout.features, dtype=torch.float64)
    for split, parts in layout.parts(layout.flat(dy), layout.flat(x)):
        if layout.small:
            products = (parts[1] - layout.over(high)).mul_(parts[0])
            pairs = [[parts[0].sum(layout.dims, dtype=high.dtype), products.sum(layout.dims)]]
        else:
            blocks = layout.blocks(*parts, elements=elements)
            pairs = [_native_sums(dy_piece, piece, high[split]) for dy_piece, piece in blocks]
        sums[split] = torch.cat(_added(pairs), dim=1)
    sum_dy, sum_dy_xmu = sums.chunk(2, dim=1)
    sum_dy_xmu += (high - moments.mean) * sum_dy
    return sums.to(high.dtype)


def grad_input(
    dy: Tensor, x: Tensor, splits: Splits, moments: Moments, affine: Affine, sums: Tensor
) -> Tensor:
    """Return the gradient of `x` from the global `sums` of `grad_sums`, like `x`."""
    dy = affine.through_relu(dy, lambda: normalize(x, splits, moments, affine))
    scale = affine.scale(moments)
    per_element = sums / moments.count.clamp(min=1).unsqueeze(1)
    mean_dy, mean_dy_xmu = per_element.chunk(2, dim=1)
    slope = mean_dy_xmu / (moments.var + affine.eps) * -scale
    origin, beyond = _origin(x, moments, affine)
    return _map_rows(x, splits, _Map(origin, slope, slope * beyond - scale * mean_dy, scale), dy)


class _Map(NamedTuple):
    """The map `(x - origin) * scale + shift + dy * dy_scale`, values per split and channel."""

    origin: Tensor | None
    scale: Tensor
    shift: Tensor
    dy_scale: Tensor | None = None

    def of(self, split: slice, dtype: torch.dtype) -> "_Map":
        """Return the values of some splits."""
        origin, dy_scale = (None if v is None else v[split].to(dtype) for v in self[::3])
        return _Map(origin, self.scale[split].to(dtype), self.shift[split].to(dtype), dy_scale)


def _map_rows(x: Tensor, splits: Splits, values: _Map, dy: Tensor | None = None) -> Tensor:
    """Return what `values` make of `x`, and of `dy` where it is given, like `x`."""
    layout = _Layout(x, splits, len(values.scale))
    dtype = accumulation_dtype(x.dtype)
    output, target = layout.output(x)
    flats = [target, layout.flat(x)] + ([] if dy is None else [layout.flat(dy)])
    for split, parts in layout.parts(*flats):
        here = values.of(split, dtype)
        buffer = None
        for result, piece, *upstream in layout.blocks(*parts):
            source = piece
            # Half precision, and what is far from the origin, is worked on in a buffer.
            if x.dtype != dtype or here.origin is not None:
                buffer = torch.empty_like(piece, dtype=dtype) if buffer is None else buffer
                source = buffer[:, : piece.shape[1]].copy_(piece)
                if here.origin is not None:
                    source -= layout.over(here.origin)
            wide = result if x.dtype == dtype else source
            if layout.last or layout.small:
                torch.addcmul(layout.over(here.shift), source, layout.over(here.scale), out=wide)
            else:
                _native_map(source[0], here.scale[0], here.shift[0], wide[0])
            if here.dy_scale is not None:
                wide.addcmul_(upstream[0], layout.over(here.dy_scale))
            if wide is not result:
                result.copy_(wide)
    if layout.order is None:
        return output
    # Rows were written in the order of their splits.
    placed = torch.empty_like(output)
    placed[layout.order] = output
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


def _origin(x: Tensor, moments: Moments, affine: Affine) -> tuple[Tensor | None, Tensor]:
    """Return what to subtract from x first, None where zero will do, and it less the mean."""
    mean = moments.mean
    if bool((mean.square() <= NEAR**2 * (moments.var + affine.eps)).all()):
        return None, -mean
    high = mean.to(accumulation_dtype(x.dtype))
    return high, high - mean

"""The four kernels as ATen operators: any device with float64, traceable, differentiable.

N rows, S splits, C features, L positions per row. The mean is used as a high part in the
accumulation type, and the rest that the type cannot hold goes into the offset: `x - high` is
exact near the mean, so no digit is lost however large mean / std is.
"""

import torch
from torch import Tensor

from .._moments import Affine, Moments, Splits, accumulation_dtype


def moments(x: Tensor, splits: Splits, num_splits: int) -> Tensor:
    """Return the packed local moments of `x`, [S, 2C + 1], float64."""
    x = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)  # [N, C, L]
    x = x.to(accumulation_dtype(x.dtype))
    length = x.shape[2]
    # Each row is summed about its own mean, then carried to the origin in float64, where a large
    # mean leaves the digits of a small deviation standing. The shift cancels: no gradient is due.
    shift = x.detach().sum(2, keepdim=True) / max(length, 1)
    centred = x - shift
    rest = centred.sum(2).double()
    squares = centred.square().sum(2).double()
    shift = shift.squeeze(2).double()  # [N, C]
    around = shift * length
    count = shift.new_full((x.shape[0], 1), length)
    by_row = torch.cat([around + rest, squares + shift * (2 * rest + around), count], dim=1)
    return _sum_by_split(by_row, splits, num_splits)


def normalize(x: Tensor, splits: Splits, moments: Moments, affine: Affine) -> Tensor:
    """Return `(x - mean) * invstd * weight + bias` with each row's split's values, like `x`."""
    dtype = accumulation_dtype(x.dtype)
    mean, scale = moments.mean, affine.scale(moments)
    high = mean.to(dtype)
    shift = (high - mean) * scale
    bias = affine.bias
    if bias is not None:
        shift = shift + bias
    high, scale, shift = _by_row(x, splits, high, scale, shift)
    y = torch.addcmul(shift, x.to(dtype) - high, scale).to(x.dtype)
    return y.relu() if affine.relu else y


def grad_sums(dy: Tensor, x: Tensor, splits: Splits, moments: Moments, affine: Affine) -> Tensor:
    """Return the local `[sum of dy | sum of dy * (x - mean)]`, [S, 2C], accumulation type."""
    dy = affine.through_relu(dy, lambda: normalize(x, splits, moments, affine))
    dtype = accumulation_dtype(x.dtype)
    mean = moments.mean
    high = mean.to(dtype)
    dims = tuple(range(2, x.dim()))
    centred = x.to(dtype) - _by_row(x, splits, high)[0]
    dy = dy.to(dtype)
    products = dy * centred
    if dims:
        dy, products = dy.sum(dims), products.sum(dims)
    sums = _sum_by_split(torch.cat([dy, products], dim=1).double(), splits, mean.shape[0])
    sum_dy, sum_dy_xmu = sums.chunk(2, dim=1)
    return torch.cat([sum_dy, sum_dy_xmu + (high - mean) * sum_dy], dim=1).to(dtype)


def grad_input(
    dy: Tensor, x: Tensor, splits: Splits, moments: Moments, affine: Affine, sums: Tensor
) -> Tensor:
    """Return the gradient of `x` from the global `sums` of `grad_sums`, like `x`."""
    dy = affine.through_relu(dy, lambda: normalize(x, splits, moments, affine))
    dtype = accumulation_dtype(x.dtype)
    mean, scale = moments.mean, affine.scale(moments)
    per_element = sums.double() / moments.count.clamp(min=1).unsqueeze(1)
    mean_dy, mean_dy_xmu = per_element.chunk(2, dim=1)
    slope = -scale * mean_dy_xmu / (moments.var + affine.eps)
    high = mean.to(dtype)
    offset = slope * (high - mean) - scale * mean_dy
    high, scale, slope, offset = _by_row(x, splits, high, scale, slope, offset)
    dx = torch.addcmul(offset, x.to(dtype) - high, slope)
    return torch.addcmul(dx, dy.to(dtype), scale).to(x.dtype)


def _sum_by_split(by_row: Tensor, splits: Splits, num_splits: int) -> Tensor:
    """Sum [N, K] over the rows of each split, [S, K]."""
    if isinstance(splits, Tensor):
        # A mask, not a product with zeros: a NaN stays in its own split.
        owned = [torch.where((splits == i).unsqueeze(1), by_row, 0) for i in range(num_splits)]
    else:
        owned = list(by_row.split(splits))
    return torch.stack([rows.sum(0) for rows in owned])


def _by_row(x: Tensor, splits: Splits, *by_split: Tensor) -> list[Tensor]:
    """Give each row of `x` its split's values [S, C] in the accumulation type, [N, C, 1, ...]."""
    packed = torch.cat([value.to(accumulation_dtype(x.dtype)) for value in by_split], dim=1)
    if isinstance(splits, Tensor):
        by_row = packed[splits]
    else:
        by_row = torch.cat([row.expand(n, -1) for row, n in zip(packed, splits, strict=True)])
    shape = (x.shape[0], x.shape[1], *(1 for _ in range(x.dim() - 2)))
    return [value.reshape(shape) for value in by_row.chunk(len(by_split), dim=1)]

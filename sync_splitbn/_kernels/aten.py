"""The kernels as ATen operators: any device with float64, traceable, differentiable.

N rows, S splits, C features, L positions per row. The mean is used as a high part in the
accumulation type, and the rest that the type cannot hold goes into the offset: `x - high` is
exact near the mean, so no digit is lost however large mean / std is.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from .._moments import Index, Moments, Sizes, Tensors, accumulation_dtype, check_tensors


def unavailable(x: Tensor) -> str | None:
    """Return why ATen cannot serve tensors like `x`, or None."""
    return "no float64 on this device" if x.device.type == "mps" else None


def sums(x: Tensor, index: Index, sizes: Sizes, num_splits: int) -> Tensor:
    """Return the local [sum of x | sum of x^2 | count], [S, 2C + 1], float64."""
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
    return _sum_by_split(by_row, index, sizes, num_splits)


def moments(sums: Tensor) -> Tensor:
    """Return the moments that follow from the sums of x."""
    values, squares = sums[:, :-1].chunk(2, dim=1)
    count = sums[:, -1:]
    divisor = count.clamp(min=1)
    mean = values / divisor
    var = torch.addcmul(squares / divisor, mean, mean, value=-1).clamp(min=0)
    return torch.cat([mean, var, count], dim=1)


def normalize(
    x: Tensor,
    index: Index,
    sizes: Sizes,
    moments: Tensor,
    weights: Tensors,
    biases: Tensors,
    eps: float,
) -> Tensor:
    """Return `(x - mean) * invstd * weight + bias` with each row's split's values, like `x`."""
    dtype, of = accumulation_dtype(x.dtype), Moments(moments)
    scale, high = _scale(of, weights, eps), of.mean.to(dtype)
    shift = (high - of.mean) * scale
    if biases:
        shift = shift + torch.stack(list(biases))
    high, scale, shift = _by_row(x, index, sizes, high, scale, shift)
    return torch.addcmul(shift, x.to(dtype) - high, scale).to(x.dtype)


def grad_sums(
    dy: Tensor, x: Tensor, index: Index, sizes: Sizes, moments: Tensor, eps: float
) -> Tensor:
    """Return the local `[sum of dy | sum of dy * xhat]`, [S, 2C], accumulation type."""
    dtype, of = accumulation_dtype(x.dtype), Moments(moments)
    high = of.mean.to(dtype)
    dims = tuple(range(2, x.dim()))
    centred = x.to(dtype) - _by_row(x, index, sizes, high)[0]
    dy = dy.to(dtype)
    products = dy * centred
    if dims:
        dy, products = dy.sum(dims), products.sum(dims)
    by_row = torch.cat([dy, products], dim=1).double()
    sum_dy, sum_dy_xmu = _sum_by_split(by_row, index, sizes, len(moments)).chunk(2, dim=1)
    sum_dy_xhat = (sum_dy_xmu + (high - of.mean) * sum_dy) * of.invstd(eps)
    return torch.cat([sum_dy, sum_dy_xhat], dim=1).to(dtype)


def grad_input(
    dy: Tensor,
    x: Tensor,
    index: Index,
    sizes: Sizes,
    moments: Tensor,
    weights: Tensors,
    eps: float,
    sums: Tensor,
) -> Tensor:
    """Return the gradient of `x` from the global `sums` of `grad_sums`, like `x`."""
    dtype, of = accumulation_dtype(x.dtype), Moments(moments)
    scale, high = _scale(of, weights, eps), of.mean.to(dtype)
    per_element = sums.double() / of.count.clamp(min=1).unsqueeze(1)
    mean_dy, mean_dy_xhat = per_element.chunk(2, dim=1)
    slope = -scale * mean_dy_xhat * of.invstd(eps)
    offset = slope * (high - of.mean) - scale * mean_dy
    high, scale, slope, offset = _by_row(x, index, sizes, high, scale, slope, offset)
    dx = torch.addcmul(offset, x.to(dtype) - high, slope)
    return torch.addcmul(dx, dy.to(dtype), scale).to(x.dtype)


def normalize_batch(
    x: Tensor,
    index: Index,
    sizes: Sizes,
    num_splits: int,
    weights: Tensors,
    biases: Tensors,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return y by the moments of `x` itself, and these."""
    found = moments(sums(x, index, sizes, num_splits))
    if x.dtype == torch.float64:
        # Squares about 0 lose the digits of a deviation far from it; those about the mean do not.
        mean = Moments(found).mean.detach()
        centred = x - _by_row(x, index, sizes, mean)[0]
        about_mean = moments(sums(centred, index, sizes, num_splits))
        found = torch.cat([mean + Moments(about_mean).mean, about_mean[:, mean.shape[1] :]], dim=1)
    return normalize(x, index, sizes, found, weights, biases, eps), found


def grad_batch(
    dy: Tensor,
    x: Tensor,
    index: Index,
    sizes: Sizes,
    moments: Tensor,
    weights: Tensors,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of `x` by the sums of `dy` itself, and these."""
    local = grad_sums(dy, x, index, sizes, moments, eps)
    return grad_input(dy, x, index, sizes, moments, weights, eps, local), local


def update_running_stats(
    means: Tensors, vars: Tensors, counters: Tensors, momentum: float | None, moments: Tensor
) -> None:
    """Update running statistics and counters in place, on the device."""
    of = Moments(moments)
    shape = of.mean.shape[1:]
    check_tensors("running_mean", means, shape, moments.device)
    check_tensors("running_var", vars, shape, moments.device)
    check_tensors("num_batches_tracked", counters, (), moments.device)
    values = [*means, *vars]
    for tensor in values:
        if not tensor.is_floating_point():
            raise TypeError(f"running statistics must be floating point, got {tensor.dtype}")
    for counter in counters:
        if counter.dtype == torch.bool or counter.is_complex():
            raise TypeError(f"num_batches_tracked must be an integer, got {counter.dtype}")
    has_value, has_variance = of.count >= 1, of.count >= 2
    if counters:
        torch._foreach_add_(list(counters), list(has_value.long().unbind()))
    # Without a counter there is no average to take.
    step: Tensor | float = momentum or 0.0
    if momentum is None and counters:
        counted = torch.stack(list(counters)).double()
        step = torch.cat([counted, counted]).reciprocal().unsqueeze(1)
    before = torch.stack(values).double()
    # Not lerp: infinity would become NaN.
    after = (1 - step) * before + step * torch.cat([of.mean, of.unbiased_var])
    moved = torch.cat([has_value, has_variance]).unsqueeze(1)
    torch._foreach_copy_(values, list(torch.where(moved, after, before).unbind()))


def _scale(moments: Moments, weights: Tensors, eps: float) -> Tensor:
    """Return the factor of each split and channel, [S, C], float64."""
    invstd = moments.invstd(eps)
    return invstd * torch.stack(list(weights)) if weights else invstd


def _sum_by_split(by_row: Tensor, index: Index, sizes: Sizes, num_splits: int) -> Tensor:
    """Sum [N, K] over the rows of each split, [S, K]."""
    if index is None:
        owned = list(by_row.split(sizes))
    else:
        # A mask, not a product with zeros: a NaN stays in its own split.
        owned = [torch.where((index == i).unsqueeze(1), by_row, 0) for i in range(num_splits)]
    return torch.stack([rows.sum(0) for rows in owned])


def _by_row(x: Tensor, index: Index, sizes: Sizes, *by_split: Tensor) -> list[Tensor]:
    """Give each row of `x` its split's values [S, C] in the accumulation type, [N, C, 1, ...]."""
    packed = torch.cat([value.to(accumulation_dtype(x.dtype)) for value in by_split], dim=1)
    if index is None:
        rows = zip(packed, cast(Sequence[int], sizes), strict=True)
        by_row = torch.cat([row.expand(n, -1) for row, n in rows])
    else:
        by_row = packed[index]
    shape = (x.shape[0], x.shape[1], *(1 for _ in range(x.dim() - 2)))
    return [value.reshape(shape) for value in by_row.chunk(len(by_split), dim=1)]

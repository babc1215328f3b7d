"""The kernels as ATen operators: any device with float64, traceable, differentiable.

N rows, S splits, C features, L positions per row. The mean is used as a high part in the
accumulation type, and the rest that the type cannot hold goes into the offset: `x - high` is
exact near the mean, so no digit is lost however large mean / std is.
"""

import torch
from torch import Tensor

from .._moments import Affine, Moments, RunningStats, Splits, accumulation_dtype, check_tensors


def unavailable(x: Tensor) -> str | None:
    """Return why ATen cannot serve tensors like `x`, or None."""
    return "no float64 on this device" if x.device.type == "mps" else None


def sums(x: Tensor, splits: Splits, num_splits: int) -> Tensor:
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
    return _sum_by_split(by_row, splits, num_splits)


def moments(sums: Tensor) -> Moments:
    """Return the moments that follow from the sums of x."""
    values, squares = sums[:, :-1].chunk(2, dim=1)
    count = sums[:, -1:]
    divisor = count.clamp(min=1)
    mean = values / divisor
    var = torch.addcmul(squares / divisor, mean, mean, value=-1).clamp(min=0)
    return Moments(torch.cat([mean, var, count], dim=1))


def normalize(x: Tensor, splits: Splits, moments: Moments, affine: Affine) -> Tensor:
    """Return `(x - mean) * invstd * weight + bias` with each row's split's values, like `x`."""
    dtype = accumulation_dtype(x.dtype)
    mean, scale = moments.mean, _scale(moments, affine)
    high = mean.to(dtype)
    shift = (high - mean) * scale
    if affine.biases is not None:
        shift = shift + torch.stack(list(affine.biases))
    high, scale, shift = _by_row(x, splits, high, scale, shift)
    return torch.addcmul(shift, x.to(dtype) - high, scale).to(x.dtype)


def grad_sums(dy: Tensor, x: Tensor, splits: Splits, moments: Moments, affine: Affine) -> Tensor:
    """Return the local `[sum of dy | sum of dy * xhat]`, [S, 2C], accumulation type."""
    dtype = accumulation_dtype(x.dtype)
    mean = moments.mean
    high = mean.to(dtype)
    dims = tuple(range(2, x.dim()))
    centred = x.to(dtype) - _by_row(x, splits, high)[0]
    dy = dy.to(dtype)
    products = dy * centred
    if dims:
        dy, products = dy.sum(dims), products.sum(dims)
    local = _sum_by_split(torch.cat([dy, products], dim=1).double(), splits, mean.shape[0])
    sum_dy, sum_dy_xmu = local.chunk(2, dim=1)
    sum_dy_xhat = (sum_dy_xmu + (high - mean) * sum_dy) * moments.invstd(affine.eps)
    return torch.cat([sum_dy, sum_dy_xhat], dim=1).to(dtype)


def grad_input(
    dy: Tensor, x: Tensor, splits: Splits, moments: Moments, affine: Affine, sums: Tensor
) -> Tensor:
    """Return the gradient of `x` from the global `sums` of `grad_sums`, like `x`."""
    dtype = accumulation_dtype(x.dtype)
    mean, scale = moments.mean, _scale(moments, affine)
    per_element = sums.double() / moments.count.clamp(min=1).unsqueeze(1)
    mean_dy, mean_dy_xhat = per_element.chunk(2, dim=1)
    slope = -scale * mean_dy_xhat * moments.invstd(affine.eps)
    high = mean.to(dtype)
    offset = slope * (high - mean) - scale * mean_dy
    high, scale, slope, offset = _by_row(x, splits, high, scale, slope, offset)
    dx = torch.addcmul(offset, x.to(dtype) - high, slope)
    return torch.addcmul(dx, dy.to(dtype), scale).to(x.dtype)


def normalize_batch(
    x: Tensor, splits: Splits, num_splits: int, affine: Affine
) -> tuple[Tensor, Moments]:
    """Return y by the moments of `x` itself, and these."""
    found = moments(sums(x, splits, num_splits))
    if x.dtype == torch.float64:
        # Squares about 0 lose the digits of a deviation far from it; those about the mean do not.
        (mean,) = _by_row(x, splits, found.mean.detach())
        about_mean = moments(sums(x - mean, splits, num_splits))
        found = about_mean.shifted(found.mean.detach())
    return normalize(x, splits, found, affine), found


def grad_batch(
    dy: Tensor, x: Tensor, splits: Splits, moments: Moments, affine: Affine
) -> tuple[Tensor, Tensor]:
    """Return the gradient of `x` by the sums of `dy` itself, and these."""
    local = grad_sums(dy, x, splits, moments, affine)
    return grad_input(dy, x, splits, moments, affine, local), local


def update_running_stats(running: RunningStats, moments: Moments) -> None:
    """Update running statistics and counters in place, on the device."""
    means, variances, counters, momentum = running
    shape, device = (moments.values.shape[1] // 2,), moments.values.device
    check_tensors("running_mean", means, shape, device)
    check_tensors("running_var", variances, shape, device)
    check_tensors("num_batches_tracked", counters, (), device)
    for tensor in (*means, *variances):
        if not tensor.is_floating_point():
            raise TypeError(f"running statistics must be floating point, got {tensor.dtype}")
    for counter in counters:
        if counter.dtype == torch.bool or counter.is_complex():
            raise TypeError(f"num_batches_tracked must be an integer, got {counter.dtype}")
    has_value, has_variance = moments.count >= 1, moments.count >= 2
    if counters:
        torch._foreach_add_(list(counters), list(has_value.long().unbind()))
    # Without a counter there is no average to take.
    step: Tensor | float = momentum or 0.0
    if momentum is None and counters:
        counted = torch.stack(list(counters)).double()
        step = torch.cat([counted, counted]).reciprocal().unsqueeze(1)
    values = [*means, *variances]
    before = torch.stack(values).double()
    after = torch.lerp(before, torch.cat([moments.mean, moments.unbiased_var]), step)
    moved = torch.cat([has_value, has_variance]).unsqueeze(1)
    torch._foreach_copy_(values, list(torch.where(moved, after, before).unbind()))


def _scale(moments: Moments, affine: Affine) -> Tensor:
    """Return the factor of each split and channel, [S, C], float64."""
    invstd = moments.invstd(affine.eps)
    return invstd if affine.weights is None else invstd * torch.stack(list(affine.weights))


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

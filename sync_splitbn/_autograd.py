"""Forward and backward of synchronized split batch normalization, with one sum over ranks each."""

from typing import Any

import torch
from torch import Tensor

from . import _kernels
from ._collectives import AllReduce, all_reduce_
from ._kernels import Kernels
from ._moments import Moments, Splits


class SyncSplitBatchNormFunction(torch.autograd.Function):
    """Normalize each split by its statistics over all ranks; also return the packed moments."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        splits: Splits,
        num_splits: int,
        eps: float,
        group: Any,
        kernels: Kernels,
    ) -> tuple[Tensor, Tensor]:
        """Return y, like x, and the global moments, [S, 2C + 1]."""
        packed = all_reduce_(kernels.moments(x, splits, num_splits), group)
        moments = Moments.unpack(packed)
        mean, invstd = moments.mean, moments.invstd(eps)
        index = splits if isinstance(splits, Tensor) else None
        ctx.save_for_backward(x, weight, mean, invstd, moments.count, index)
        ctx.sizes = None if isinstance(splits, Tensor) else splits
        ctx.eps, ctx.group, ctx.kernels = eps, group, kernels
        ctx.mark_non_differentiable(packed)
        return kernels.normalize(x, splits, mean, invstd, weight, bias), packed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, summed over ranks, and of weight and bias, local for DDP."""
        dy = grads[0]
        x, weight, mean, invstd, count, index = ctx.saved_tensors
        splits, group, kernels = ctx.sizes or index, ctx.group, ctx.kernels
        twice = torch.is_grad_enabled()
        if twice:
            # Under create_graph the saved statistics would pass for constants: have them, and
            # all that follows, as functions of x.
            kernels = _kernels.choose("aten")
            local = kernels.moments(x, splits, mean.shape[0])
            moments = Moments.unpack(_all_reduced(local, group))
            mean, invstd, count = moments.mean, moments.invstd(ctx.eps), moments.count
        local = kernels.grad_sums(dy, x, splits, mean)
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            sums = _all_reduced(local, group) if twice else all_reduce_(local.clone(), group)
            dx = kernels.grad_input(dy, x, splits, mean, invstd, weight, sums, count)
        sum_dy, sum_dy_xmu = local.chunk(2, dim=1)
        if ctx.needs_input_grad[1]:
            dweight = (sum_dy_xmu * invstd).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            dbias = sum_dy
        return dx, dweight, dbias, None, None, None, None, None


def _all_reduced(local: Tensor, group: Any) -> Tensor:
    """Return the sum over ranks, differentiable."""
    total: Tensor = AllReduce.apply(local, group)  # type: ignore[no-untyped-call]
    return total

"""Forward and backward of synchronized split batch normalization, with one sum over ranks each."""

from typing import Any

import torch
from torch import Tensor

from . import _kernels
from ._collectives import all_reduce_, all_reduce_copy, differentiable_all_reduce
from ._moments import Affine, Moments, Splits


def _saved(splits: Splits, x: Tensor) -> Tensor | None:
    """Return what to save of the splits: an index, or for sizes a shape that tells them apart.

    Activation checkpointing compares shapes, and so refuses a second forward with other sizes.
    """
    if isinstance(splits, Tensor):
        return splits
    return None if torch.compiler.is_compiling() else x.new_empty((0, hash(splits) % 2**31))


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
        impl: str | None,
    ) -> tuple[Tensor, ...]:
        """Return y, like x, the global moments, [S, 2C + 1], and their mean and var, [S, C]."""
        kernels = _kernels.choose(impl, x)
        packed = all_reduce_(kernels.moments(x, splits, num_splits), group)
        moments = Moments(packed)
        ctx.sizes = None if isinstance(splits, Tensor) else splits
        described = packed, moments.mean, moments.var
        ctx.save_for_backward(x, weight, _saved(splits, x), *described)
        ctx.eps, ctx.group, ctx.impl = eps, group, impl
        ctx.mark_non_differentiable(*described)
        ctx.set_materialize_grads(False)
        return kernels.normalize(x, splits, moments, Affine(weight, bias, eps)), *described

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, summed over ranks, and of weight and bias, local for DDP."""
        x, weight, index, *described = ctx.saved_tensors
        # Not left out where nothing came: the other ranks expect this one's sums.
        dy = torch.zeros_like(x) if grads[0] is None else grads[0]
        splits = index if ctx.sizes is None else ctx.sizes
        kernels = _kernels.choose(ctx.impl, x)
        total = all_reduce_copy
        if torch.is_grad_enabled():
            if ctx.impl not in (None, "aten"):
                raise RuntimeError(
                    f"impl={ctx.impl!r} must not be differentiated twice, got create_graph=True; "
                    "pass impl=None or impl='aten'"
                )
            # Under create_graph the saved moments would pass for constants: have them, and all
            # that follows, as functions of x.
            kernels, total = _kernels.choose("aten", x), differentiable_all_reduce
            described = [total(kernels.moments(x, splits, len(described[0])), ctx.group)]
        moments = Moments(*described)
        affine = Affine(weight, None, ctx.eps)
        local = kernels.grad_sums(dy, x, splits, moments, affine)
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            sums = total(local, ctx.group)
            dx = kernels.grad_input(dy, x, splits, moments, affine, sums)
        sum_dy, sum_dy_xmu = local.chunk(2, dim=1)
        if ctx.needs_input_grad[1]:
            dweight = sum_dy_xmu * moments.invstd(ctx.eps).to(local.dtype)
        if ctx.needs_input_grad[2]:
            dbias = sum_dy
        return dx, dweight, dbias, None, None, None, None, None

"""Forward and backward of synchronized split batch normalization, with one sum over ranks each."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from . import _kernels
from ._collectives import all_reduce_, all_reduce_copy, differentiable_all_reduce
from ._moments import Affine, Moments, Splits


class SyncSplitBatchNormFunction(torch.autograd.Function):
    """Normalize each split by its moments over all ranks; also return these, not differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        splits: Splits,
        num_splits: int,
        eps: float,
        group: Any,
        impl: str | None,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return y, like x, and the values of the global `Moments`, [S, 2C + 1].

        The parameters are S weights and S biases, [C] each, or None.
        """
        kernels = _kernels.choose(impl, x)
        weights, biases = parameters[:num_splits], parameters[num_splits:]
        affine = Affine(_all_or_none(weights), _all_or_none(biases), eps)
        if group is None:
            y, moments = kernels.normalize_batch(x, splits, num_splits, affine)
        else:
            moments = kernels.moments(all_reduce_(kernels.sums(x, splits, num_splits), group))
            y = kernels.normalize(x, splits, moments, affine)
        ctx.sizes = None if isinstance(splits, Tensor) else splits
        ctx.save_for_backward(x, _saved(splits, x), moments.values, *weights)
        ctx.eps, ctx.group, ctx.impl = eps, group, impl
        ctx.mark_non_differentiable(moments.values)
        ctx.set_materialize_grads(False)
        return y, moments.values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, summed over ranks, and of the parameters, local for DDP."""
        x, index, values, *weights = ctx.saved_tensors
        # Not left out where nothing came: the other ranks expect this one's sums.
        dy = torch.zeros_like(x) if grads[0] is None else grads[0]
        splits = index if ctx.sizes is None else ctx.sizes
        kernels, moments = _kernels.choose(ctx.impl, x), Moments(values)
        affine, reduce = Affine(_all_or_none(weights), None, ctx.eps), all_reduce_copy
        if torch.is_grad_enabled():
            if ctx.impl not in (None, "aten"):
                raise RuntimeError(
                    f"impl={ctx.impl!r} must not be differentiated twice, got create_graph=True; "
                    "pass impl=None or impl='aten'"
                )
            # Under create_graph the saved moments would pass for constants: have them, and all
            # that follows, as functions of x.
            kernels, reduce = _kernels.choose("aten", x), differentiable_all_reduce
            if ctx.group is None:
                _, moments = kernels.normalize_batch(x, splits, len(weights), affine)
            else:
                sums = kernels.sums(x, splits, len(weights))
                moments = kernels.moments(reduce(sums, ctx.group))
        dx: Tensor | None = None
        if ctx.group is None and ctx.needs_input_grad[0]:
            dx, local = kernels.grad_batch(dy, x, splits, moments, affine)
        else:
            local = kernels.grad_sums(dy, x, splits, moments, affine)
            if ctx.needs_input_grad[0]:
                sums = reduce(local, ctx.group)
                dx = kernels.grad_input(dy, x, splits, moments, affine, sums)
        # The rows are dbias and dweight of split 0, then of split 1, and so on.
        rows = local.reshape(2 * len(weights), x.shape[1]).unbind()
        parameters = zip(ctx.needs_input_grad[6:], rows[1::2] + rows[::2], strict=True)
        not_tensors = (None,) * 5
        return dx, *not_tensors, *(grad if needed else None for needed, grad in parameters)


def _saved(splits: Splits, x: Tensor) -> Tensor | None:
    """Return what to save of the splits: an index, or for sizes a shape that tells them apart.

    Activation checkpointing compares shapes, and so refuses a second forward with other sizes.
    """
    if isinstance(splits, Tensor):
        return splits
    is_eager = not torch.compiler.is_compiling() and all(type(size) is int for size in splits)
    return x.new_empty((0, hash(splits) % 2**31)) if is_eager else None


def _all_or_none(parameters: Sequence[Tensor | None]) -> Sequence[Tensor] | None:
    """Return the parameters of all splits, or None where there are none."""
    return None if parameters[0] is None else cast(Sequence[Tensor], parameters)

"""Forward and backward of synchronized split batch normalization, with one sum over ranks each."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _kernels
from ._collectives import all_reduce_, all_reduce_copy, differentiable_all_reduce


class SyncSplitBatchNormFunction(torch.autograd.Function):
    """Normalize each split by its moments over all ranks; also return these, not differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        index: Tensor | None,
        sizes: tuple[int, ...] | None,
        num_splits: int,
        eps: float,
        group: Any,
        *impl_and_parameters: Any,
    ) -> tuple[Tensor, Tensor]:
        """Return y, like x, and the global moments, [S, 2C + 1].

        The parameters are S weights and S biases, [C] each, or None.
        """
        # Where there are as many arguments as names, Dynamo leaves out ctx, and where the others
        # were 2 S parameters alone, one split had as many.
        impl, *parameters = impl_and_parameters
        kernels = _kernels.choose(impl, x)
        weights, biases = _given(parameters[:num_splits]), _given(parameters[num_splits:])
        if group is None:
            y, moments = kernels.normalize_batch(x, index, sizes, num_splits, weights, biases, eps)
        else:
            sums = all_reduce_(kernels.sums(x, index, sizes, num_splits), group)
            moments = kernels.moments(sums)
            y = kernels.normalize(x, index, sizes, moments, weights, biases, eps)
        ctx.save_for_backward(x, _saved(index, sizes, x), moments, *weights)
        ctx.sizes, ctx.eps, ctx.group, ctx.impl = sizes, eps, group, impl
        ctx.mark_non_differentiable(moments)
        ctx.set_materialize_grads(False)
        return y, moments

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, summed over ranks, and of the parameters, local for DDP."""
        x, index, moments, *weights = ctx.saved_tensors
        sizes, eps, needed = ctx.sizes, ctx.eps, ctx.needs_input_grad
        index = index if sizes is None else None
        # Not left out where nothing came: the other ranks expect this one's sums.
        dy = torch.zeros_like(x) if grads[0] is None else grads[0]
        kernels, reduce = _kernels.choose(ctx.impl, x), all_reduce_copy
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
                _, moments = kernels.normalize_batch(x, index, sizes, len(moments), [], [], eps)
            else:
                sums = kernels.sums(x, index, sizes, len(moments))
                moments = kernels.moments(reduce(sums, ctx.group))
        dx: Tensor | None = None
        if ctx.group is None and needed[0]:
            dx, local = kernels.grad_batch(dy, x, index, sizes, moments, weights, eps)
        else:
            local = kernels.grad_sums(dy, x, index, sizes, moments, eps)
            if needed[0]:
                sums = reduce(local, ctx.group)
                dx = kernels.grad_input(dy, x, index, sizes, moments, weights, eps, sums)
        # The rows are dbias and dweight of split 0, then of split 1, and so on.
        rows = local.reshape(2 * moments.shape[0], x.shape[1]).unbind()
        parameters = zip(needed[7:], rows[1::2] + rows[::2], strict=True)
        not_tensors = (None,) * 6
        return dx, *not_tensors, *(grad if wanted else None for wanted, grad in parameters)


def _given(parameters: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the parameters of all splits, or nothing where there are none."""
    return [each for each in parameters if each is not None]


def _saved(index: Tensor | None, sizes: tuple[int, ...] | None, x: Tensor) -> Tensor | None:
    """Return what to save of the splits: an index, or for sizes a shape that tells them apart.

    Activation checkpointing compares shapes, and so refuses a second forward with other sizes.
    Equal sizes need none.
    """
    if sizes is None or torch.compiler.is_compiling() or sizes.count(sizes[0]) == len(sizes):
        return index
    is_known = all(type(size) is int for size in sizes)
    return x.new_empty((0, hash(sizes) % 2**31)) if is_known else None

"""Forward and backward of synchronized split batch normalization, with one sum over ranks each."""

from collections.abc import Sequence
from typing import Any, cast

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


def _all_or_none(parameters: Sequence[Tensor | None]) -> Sequence[Tensor] | None:
    """Return the parameters of all splits, or None where there are none."""
    return None if parameters[0] is None else cast(Sequence[Tensor], parameters)


class SyncSplitBatchNormFunction(torch.autograd.Function):
    """Normalize each split by its statistics over all ranks; also return the packed moments."""

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
    ) -> tuple[Tensor, ...]:
        """Return y, like x, the global moments, [S, 2C + 1], and their mean and var, [S, C].

        The parameters are S weights and S biases, [C] each, or None.
        """
        kernels = _kernels.choose(impl, x)
        weights, biases = parameters[:num_splits], parameters[num_splits:]
        affine = Affine(_all_or_none(weights), _all_or_none(biases), eps)
        alone = _kernels.of_alone(kernels, group)
        if alone is not None:
            y, moments = alone.alone(x, splits, num_splits, affine)
        else:
            moments = Moments(all_reduce_(kernels.moments(x, splits, num_splits), group))
            y = kernels.normalize(x, splits, moments, affine)
        described = moments.packed, moments.mean, moments.var
        ctx.sizes = None if isinstance(splits, Tensor) else splits
        ctx.save_for_backward(x, _saved(splits, x), *described, *weights)
        ctx.eps, ctx.group, ctx.impl = eps, group, impl
        ctx.mark_non_differentiable(*described)
        ctx.set_materialize_grads(False)
        return y, *described

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, summed over ranks, and of the parameters, local for DDP."""
        x, index, packed, mean, var, *weights = ctx.saved_tensors
        # Not left out where nothing came: the other ranks expect this one's sums.
        dy = torch.zeros_like(x) if grads[0] is None else grads[0]
        splits = index if ctx.sizes is None else ctx.sizes
        kernels, moments = _kernels.choose(ctx.impl, x), Moments(packed, mean, var)
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
            moments = Moments(total(kernels.moments(x, splits, len(weights)), ctx.group))
        affine = Affine(_all_or_none(weights), None, ctx.eps)
        alone = _kernels.of_alone(kernels, ctx.group)
        of_weights = any(ctx.needs_input_grad[-2 * len(weights) : -len(weights)])
        of_biases = any(ctx.needs_input_grad[-len(weights) :])
        dx: Tensor | None = None
        if alone is not None and ctx.needs_input_grad[0]:
            dx, parameters = alone.grad_alone(dy, x, splits, moments, affine)
            dweight, dbias = parameters.unbind()
        else:
            local = kernels.grad_sums(dy, x, splits, moments, affine)
            if ctx.needs_input_grad[0]:
                sums = total(local, ctx.group)
                dx = kernels.grad_input(dy, x, splits, moments, affine, sums)
            dbias, dweight = local.chunk(2, dim=1)
            if of_weights:
                dweight = dweight * moments.invstd(ctx.eps).to(local.dtype)
        none = (None,) * len(weights)
        dweights = dweight.unbind() if of_weights else none
        dbiases = dbias.unbind() if of_biases else none
        return dx, None, None, None, None, None, *dweights, *dbiases

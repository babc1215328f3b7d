"""The compiled kernels as operators of PyTorch, so that the dispatcher sees every tensor first.

Fake, functional, traced, batched, negative and zero tensors are treated here as by any operator,
before a kernel takes their addresses. A kernel module is registered for its device. The operators
do not differentiate: `_autograd` calls them below autograd.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .._moments import (
    Affine,
    Moments,
    RunningStats,
    Splits,
    as_dense,
    empty_grad_sums,
    empty_sums,
)

_ROWS = "Tensor x, Tensor? index, SymInt[]? sizes"
# Lists that are empty for None: the dispatcher does not look into a "Tensor[]?".
_AFFINE = "Tensor[] weights, Tensor[] biases, float eps"
_SCHEMAS = (
    f"sums({_ROWS}, int num_splits) -> Tensor",
    "moments(Tensor sums) -> Tensor",
    f"normalize({_ROWS}, Tensor moments, {_AFFINE}) -> Tensor",
    f"normalize_batch({_ROWS}, int num_splits, {_AFFINE}) -> (Tensor, Tensor)",
    f"grad_sums(Tensor dy, {_ROWS}, Tensor moments, float eps) -> Tensor",
    f"grad_input(Tensor dy, {_ROWS}, Tensor moments, Tensor[] weights, float eps, Tensor sums) "
    "-> Tensor",
    f"grad_batch(Tensor dy, {_ROWS}, Tensor moments, Tensor[] weights, float eps) "
    "-> (Tensor, Tensor)",
    "update_running_stats(Tensor(a!)[] means, Tensor(b!)[] vars, Tensor(c!)[] counters, "
    "float? momentum, Tensor moments) -> ()",
)
_library = torch.library.Library("sync_splitbn", "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema)
_SUMS, _MOMENTS, _NORMALIZE, _NORMALIZE_BATCH, _GRAD_SUMS, _GRAD_INPUT, _GRAD_BATCH, _UPDATE = (
    getattr(torch.ops.sync_splitbn, _schema.partition("(")[0]).default for _schema in _SCHEMAS
)


def sums(x: Tensor, splits: Splits, num_splits: int) -> Tensor:
    """Return the local [sum of x | sum of x^2 | count], [S, 2C + 1], float64."""
    result: Tensor = _SUMS(x, *_flat(splits), num_splits)
    return result


def moments(sums: Tensor) -> Moments:
    """Return the moments that follow from the sums of x."""
    return Moments(_MOMENTS(sums))


def normalize(x: Tensor, splits: Splits, moments: Moments, affine: Affine) -> Tensor:
    """Return `xhat * weight + bias`, like `x`."""
    weights, biases, eps = affine
    result: Tensor = _NORMALIZE(x, *_flat(splits), moments.values, weights or (), biases or (), eps)
    return result


def normalize_batch(
    x: Tensor, splits: Splits, num_splits: int, affine: Affine
) -> tuple[Tensor, Moments]:
    """Return y by the moments of `x` itself, and these."""
    weights, biases, eps = affine
    y, values = _NORMALIZE_BATCH(x, *_flat(splits), num_splits, weights or (), biases or (), eps)
    return y, Moments(values)


def grad_sums(dy: Tensor, x: Tensor, splits: Splits, moments: Moments, affine: Affine) -> Tensor:
    """Return the local [sum of dy | sum of dy * xhat], [S, 2C], accumulation type."""
    result: Tensor = _GRAD_SUMS(dy, x, *_flat(splits), moments.values, affine.eps)
    return result


def grad_input(
    dy: Tensor, x: Tensor, splits: Splits, moments: Moments, affine: Affine, sums: Tensor
) -> Tensor:
    """Return the gradient of `x` from the global `sums` of `grad_sums`, like `x`."""
    weights, _, eps = affine
    result: Tensor = _GRAD_INPUT(dy, x, *_flat(splits), moments.values, weights or (), eps, sums)
    return result


def grad_batch(
    dy: Tensor, x: Tensor, splits: Splits, moments: Moments, affine: Affine
) -> tuple[Tensor, Tensor]:
    """Return the gradient of `x` by the sums of `dy` itself, and these."""
    weights, _, eps = affine
    dx, sums = _GRAD_BATCH(dy, x, *_flat(splits), moments.values, weights or (), eps)
    return dx, sums


def update_running_stats(running: RunningStats, moments: Moments) -> None:
    """Update running statistics and counters in place."""
    _UPDATE(*running, moments.values)


def register(kernels: Any, device: str) -> None:
    """Have a kernel module compute the operators for tensors of a device, "CPU" or "CUDA"."""

    def sums(x: Tensor, index: Any, sizes: Any, num_splits: int) -> Any:
        return kernels.sums(x, index if sizes is None else sizes, num_splits)

    def moments(sums: Tensor) -> Any:
        return kernels.moments(sums).values

    def normalize(
        x: Tensor, index: Any, sizes: Any, moments: Tensor, weights: Any, biases: Any, eps: float
    ) -> Any:
        splits = index if sizes is None else sizes
        return kernels.normalize(x, splits, Moments(moments), _affine(weights, biases, eps))

    def normalize_batch(
        x: Tensor, index: Any, sizes: Any, num_splits: int, weights: Any, biases: Any, eps: float
    ) -> Any:
        splits = index if sizes is None else sizes
        y, found = kernels.normalize_batch(x, splits, num_splits, _affine(weights, biases, eps))
        return y, found.values

    def grad_sums(
        dy: Tensor, x: Tensor, index: Any, sizes: Any, moments: Tensor, eps: float
    ) -> Any:
        splits = index if sizes is None else sizes
        return kernels.grad_sums(dy, x, splits, Moments(moments), Affine(None, None, eps))

    def grad_input(
        dy: Tensor,
        x: Tensor,
        index: Any,
        sizes: Any,
        moments: Tensor,
        weights: Any,
        eps: float,
        sums: Tensor,
    ) -> Any:
        splits, affine = index if sizes is None else sizes, _affine(weights, (), eps)
        return kernels.grad_input(dy, x, splits, Moments(moments), affine, sums)

    def grad_batch(
        dy: Tensor, x: Tensor, index: Any, sizes: Any, moments: Tensor, weights: Any, eps: float
    ) -> Any:
        splits = index if sizes is None else sizes
        return kernels.grad_batch(dy, x, splits, Moments(moments), _affine(weights, (), eps))

    def update_running_stats(
        means: Any, variances: Any, counters: Any, momentum: float | None, moments: Tensor
    ) -> None:
        running = RunningStats(means, variances, counters, momentum)
        kernels.update_running_stats(running, Moments(moments))
        # Whoever saved one of them for a backward pass must learn of it.
        changed = (*means, *variances, *counters)
        torch.autograd.graph.increment_version([t for t in changed if not t.is_inference()])

    for implementation in (
        sums,
        moments,
        normalize,
        normalize_batch,
        grad_sums,
        grad_input,
        grad_batch,
        update_running_stats,
    ):
        _library.impl(implementation.__name__, implementation, device)


def _flat(splits: Splits) -> tuple[Tensor | None, tuple[int, ...] | None]:
    """Return the splits as an operator takes them: an index or sizes."""
    return (splits, None) if isinstance(splits, Tensor) else (None, splits)


def _affine(weights: Any, biases: Any, eps: float) -> Affine:
    """Return the map as kernels take it."""
    return Affine(weights or None, biases or None, eps)


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(as_dense(x))


# What the operators return, without its values.
_EMPTY_RESULTS: dict[Any, Callable[..., Any]] = {
    _SUMS: lambda x, index, sizes, num_splits: empty_sums(x, num_splits),
    _MOMENTS: torch.empty_like,
    _NORMALIZE: lambda x, *rest: _empty_like(x),
    _NORMALIZE_BATCH: lambda x, index, sizes, num_splits, *affine: (
        _empty_like(x),
        empty_sums(x, num_splits),
    ),
    _GRAD_SUMS: lambda dy, x, index, sizes, moments, *rest: empty_grad_sums(x, moments.shape[0]),
    _GRAD_INPUT: lambda dy, x, *rest: _empty_like(x),
    _GRAD_BATCH: lambda dy, x, index, sizes, moments, *rest: (
        _empty_like(x),
        empty_grad_sums(x, moments.shape[0]),
    ),
    _UPDATE: lambda *arguments: None,
}


def _on_meta(shape: Callable[..., Any]) -> Callable[..., Any]:
    """Return the meta kernel that makes its result by `shape`, and takes meta tensors alone."""

    def kernel(*arguments: Any) -> Any:
        tree_map(_check_meta, arguments)
        return shape(*arguments)

    return kernel


def _check_meta(leaf: Any) -> None:
    if isinstance(leaf, Tensor) and not leaf.is_meta:
        raise RuntimeError(
            f"all tensors must be on one device, got meta and {leaf.device}; "
            "materialize the layer by to_empty() and reset_parameters()"
        )


def _one_by_one(operator: Any) -> Callable[..., tuple[Any, Any]]:
    """Return the batching rule that calls `operator` for each element of the batch."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        leaves, spec = tree_flatten(arguments)
        dims, _ = tree_flatten(in_dims)

        def element(i: int) -> Any:
            pairs = zip(leaves, dims, strict=True)
            return tree_unflatten(
                [leaf if dim is None else leaf.select(dim, i) for leaf, dim in pairs], spec
            )

        results = [operator(*element(i)) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0, 0)

    return rule


def _one_by_one_in_autograd(operator: Any) -> Callable[..., Any]:
    """Return the same rule for `is_grads_batched=True`, whose batched tensors are of another kind.

    There `dy` alone is batched.
    """

    def rule(dy: Tensor, *arguments: Any) -> Any:
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        batch = torch._remove_batch_dim(dy, level, 1, 0)
        results = [operator(each, *arguments) for each in batch.unbind()]
        if isinstance(results[0], Tensor):
            return torch._add_batch_dim(torch.stack(results), 0, level)
        return tuple(
            torch._add_batch_dim(torch.stack(parts), 0, level)
            for parts in zip(*results, strict=True)
        )

    return rule


for _operator, _empty_result in _EMPTY_RESULTS.items():
    _name = _operator._schema.name.partition("::")[2]
    _library.impl(_name, _on_meta(_empty_result), "Meta")
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    if _operator is not _UPDATE:
        torch.library.register_vmap(_operator, _one_by_one(_operator), lib=_library)
for _operator in (_GRAD_SUMS, _GRAD_INPUT, _GRAD_BATCH):
    _name = _operator._schema.name.partition("::")[2]
    _library.impl(_name, _one_by_one_in_autograd(_operator), "Batched")

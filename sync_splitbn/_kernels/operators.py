"""The compiled kernels as operators of PyTorch, so that the dispatcher sees every tensor first.

Fake, functional, traced, batched, negative and zero tensors are treated here as by any operator,
before a kernel takes their addresses. A kernel module is registered for its device. The operators
do not differentiate: `_autograd` calls them below autograd.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .._moments import as_dense, empty_grad_sums, empty_sums

_library = torch.library.Library("sync_splitbn", "DEF")


def _define(schema: str) -> Any:
    """Define an operator, and return it."""
    _library.define(schema)
    return getattr(torch.ops.sync_splitbn, schema.partition("(")[0]).default


_ROWS = "Tensor x, Tensor? index, SymInt[]? sizes"
# Lists are empty for None: the dispatcher does not look into a "Tensor[]?".
_AFFINE = "Tensor[] weights, Tensor[] biases, float eps"
_GRADIENT = f"Tensor dy, {_ROWS}, Tensor moments, Tensor[] weights, float eps"
sums = _define(f"sums({_ROWS}, int num_splits) -> Tensor")
moments = _define("moments(Tensor sums) -> Tensor")
normalize = _define(f"normalize({_ROWS}, Tensor moments, {_AFFINE}) -> Tensor")
normalize_batch = _define(
    f"normalize_batch({_ROWS}, int num_splits, {_AFFINE}) -> (Tensor, Tensor)"
)
grad_sums = _define(f"grad_sums(Tensor dy, {_ROWS}, Tensor moments, float eps) -> Tensor")
grad_input = _define(f"grad_input({_GRADIENT}, Tensor sums) -> Tensor")
grad_batch = _define(f"grad_batch({_GRADIENT}) -> (Tensor, Tensor)")
update_running_stats = _define(
    "update_running_stats(Tensor(a!)[] means, Tensor(b!)[] vars, Tensor(c!)[] counters, "
    "float? momentum, Tensor moments) -> ()"
)


def register(kernels: ModuleType, device: str) -> None:
    """Have a kernel module compute the operators for tensors of a device, "CPU" or "CUDA"."""
    for operator in _EMPTY_RESULTS:
        _library.impl(operator, getattr(kernels, _name(operator)), device)


def _name(operator: Any) -> str:
    name: str = operator._schema.name
    return name.partition("::")[2]


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(as_dense(x))


# What the operators return, without its values.
_EMPTY_RESULTS: dict[Any, Callable[..., Any]] = {
    sums: lambda x, index, sizes, num_splits: empty_sums(x, num_splits),
    moments: torch.empty_like,
    normalize: lambda x, *rest: _empty_like(x),
    normalize_batch: lambda x, index, sizes, num_splits, *affine: (
        _empty_like(x),
        empty_sums(x, num_splits),
    ),
    grad_sums: lambda dy, x, index, sizes, moments, *rest: empty_grad_sums(x, moments.shape[0]),
    grad_input: lambda dy, x, *rest: _empty_like(x),
    grad_batch: lambda dy, x, index, sizes, moments, *rest: (
        _empty_like(x),
        empty_grad_sums(x, moments.shape[0]),
    ),
    update_running_stats: lambda *arguments: None,
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
    _library.impl(_operator, _on_meta(_empty_result), "Meta")
    _library.impl(_operator, torch.library.fallthrough_kernel, "Autograd")
    if _operator is not update_running_stats:
        torch.library.register_vmap(_operator, _one_by_one(_operator), lib=_library)
for _operator in (grad_sums, grad_input, grad_batch):
    _library.impl(_operator, _one_by_one_in_autograd(_operator), "Batched")

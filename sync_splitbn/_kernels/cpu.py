"""The kernels for CPU: loops in C++, each over all splits at once.

N rows, S splits, C features. The loops are in `cpp`, and compiled where the package is installed
and a compiler is at hand. They move what must be moved: x once for its sums, x and y for
normalizing, dy and x for the sums of dy, dy, x and dx for the gradient. They are called through
`operators`; here every tensor is checked before its address is taken.
"""

import importlib.util
import itertools
import platform

import torch
from torch import Tensor

from .._moments import (
    COMPILED_TYPES,
    Index,
    Sizes,
    Tensors,
    accumulation_dtype,
    as_dense,
    empty_grad_sums,
    empty_sums,
    increment_versions,
)

# What module.cpp calls CONTRACT.
_CONTRACT = 2
_not_loaded: str | None = None
try:
    from . import _cpu
except (AttributeError, ImportError) as error:
    compiled = importlib.util.find_spec(f"{__package__}._cpu") is not None
    _not_loaded = str(error) if compiled else "the package was installed without a C++ compiler"
else:
    # A module that an older checkout left behind would take its arguments for others.
    if getattr(_cpu, "contract", 1) != _CONTRACT:
        _not_loaded = "compiled loops of another version; install the package again"
    # They are compiled for it, and a processor without it would stop the process.
    x86 = platform.machine() in ("x86_64", "AMD64")
    if x86 and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        _not_loaded = "a processor without AVX2"


def unavailable(x: Tensor) -> str | None:
    """Return why the loops cannot compute with tensors like `x`, or None."""
    if _not_loaded is None and x.is_cpu and x.dtype in COMPILED_TYPES:
        return None
    if _not_loaded is not None:
        return _not_loaded
    return f"no compiled loops for {x.dtype} on {x.device}"


def sums(x: Tensor, index: Index, sizes: Sizes, num_splits: int) -> Tensor:
    """Return the local [sum of x | sum of x^2 | count], [S, 2C + 1], float64."""
    x, out = as_dense(x), empty_sums(x, num_splits)
    _cpu.sums(x, _contiguous(index), sizes, out, torch.get_num_threads())
    return out


def moments(sums: Tensor) -> Tensor:
    """Return the moments that follow from the sums of x."""
    out = torch.empty_like(sums, memory_format=torch.contiguous_format)
    _cpu.moments(sums.contiguous(), out)
    return out


def normalize(
    x: Tensor,
    index: Index,
    sizes: Sizes,
    moments: Tensor,
    weights: Tensors,
    biases: Tensors,
    eps: float,
) -> Tensor:
    """Return `xhat * weight + bias`, like `x`."""
    x = as_dense(x)
    y, parameters = torch.empty_like(x), (_all_contiguous(weights), _all_contiguous(biases))
    batch = x, _contiguous(index), sizes, moments.contiguous()
    _cpu.normalize(*batch, *parameters, eps, y, torch.get_num_threads())
    return y


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
    x, moments = as_dense(x), empty_sums(x, num_splits)
    y, parameters = torch.empty_like(x), (_all_contiguous(weights), _all_contiguous(biases))
    batch = x, _contiguous(index), sizes, moments
    _cpu.normalize_batch(*batch, *parameters, eps, y, torch.get_num_threads())
    return y, moments


def grad_sums(
    dy: Tensor, x: Tensor, index: Index, sizes: Sizes, moments: Tensor, eps: float
) -> Tensor:
    """Return the local [sum of dy | sum of dy * xhat], [S, 2C], accumulation type."""
    x, out = as_dense(x), empty_grad_sums(x, moments.shape[0])
    batch = _in_layout_of(x, dy), x, _contiguous(index), sizes, moments.contiguous()
    _cpu.grad_sums(*batch, [], eps, out, None, torch.get_num_threads())
    return out


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
    x = as_dense(x)
    dx, weights, sums = torch.empty_like(x), _all_contiguous(weights), sums.contiguous()
    batch = _in_layout_of(x, dy), x, _contiguous(index), sizes, moments.contiguous()
    _cpu.grad_input(*batch, weights, eps, sums, dx, torch.get_num_threads())
    return dx


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
    x, sums = as_dense(x), empty_grad_sums(x, moments.shape[0])
    dx, weights = torch.empty_like(x), _all_contiguous(weights)
    batch = _in_layout_of(x, dy), x, _contiguous(index), sizes, moments.contiguous()
    _cpu.grad_batch(*batch, weights, eps, sums, dx, torch.get_num_threads())
    return dx, sums


def update_running_stats(
    means: Tensors, vars: Tensors, counters: Tensors, momentum: float | None, moments: Tensor
) -> None:
    """Update running statistics and counters in place, where a split has elements."""
    given = *means, *vars, *counters
    dtype = accumulation_dtype(given[0].dtype)
    # Half precision is widened here, and rounded once.
    used = (
        _contiguous_as(dtype, "running_mean", means),
        _contiguous_as(dtype, "running_var", vars),
        _contiguous_as(torch.int64, "num_batches_tracked", counters),
    )
    # The loops average nothing where there are no counters.
    _cpu.update_running_stats(*used, momentum or 0.0, momentum is None, moments.contiguous())
    for old, new in zip(given, itertools.chain(*used), strict=True):
        if new is not old:
            old.copy_(new)
    increment_versions(given)


def _contiguous(index: Index) -> Tensor | None:
    return None if index is None else index.contiguous()


def _all_contiguous(parameters: Tensors) -> list[Tensor]:
    return [each.contiguous() for each in parameters]


def _contiguous_as(dtype: torch.dtype, name: str, tensors: Tensors) -> list[Tensor]:
    return [
        t if t.dtype == dtype and t.is_contiguous() else _converted(t, dtype, name) for t in tensors
    ]


def _converted(t: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return a contiguous tensor of a type from which the values can go back to `t`, or raise."""
    if not (torch.can_cast(t.dtype, dtype) and torch.can_cast(dtype, t.dtype)):
        raise TypeError(f"{name} must be of a type like {dtype}, got {t.dtype}")
    if any(step == 0 and n > 1 for n, step in zip(t.shape, t.stride(), strict=True)):
        raise RuntimeError(f"{name} must not overlap itself in memory, got an expanded tensor")
    return t.to(dtype).contiguous()


def _in_layout_of(x: Tensor, dy: Tensor) -> Tensor:
    """Return `dy` with its elements where `x` has its own, and of their type."""
    if dy.shape != x.shape:
        raise RuntimeError(f"dy must have the shape of x, {[*x.shape]}, got {[*dy.shape]}")
    is_alike = dy.stride() == x.stride() or (dy.is_contiguous() and x.is_contiguous())
    return dy if is_alike and dy.dtype == x.dtype else torch.empty_like(x).copy_(dy)

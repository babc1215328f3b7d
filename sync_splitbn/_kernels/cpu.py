"""The kernels for CPU: loops in C++, each over all splits at once.

N rows, S splits, C features. The loops are in `cpp`, and compiled where the package is installed
and a compiler is at hand. They move what must be moved: x once for its sums, x and y for
normalizing, dy and x for the sums of dy, dy, x and dx for the gradient. They are called through
`operators`; here every tensor is checked before its address is taken.
"""

import importlib.util
import itertools
import platform
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._moments import (
    Affine,
    Moments,
    RunningStats,
    Splits,
    accumulation_dtype,
    as_dense,
    empty_grad_sums,
    empty_sums,
)

_not_loaded: str | None = None
try:
    from . import _cpu
except ImportError as error:
    compiled = importlib.util.find_spec(f"{__package__}._cpu") is not None
    _not_loaded = str(error) if compiled else "the package was installed without a C++ compiler"
else:
    # They are compiled for it, and a processor without it would stop the process.
    x86 = platform.machine() in ("x86_64", "AMD64")
    if x86 and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        _not_loaded = "a processor without AVX2"

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
if _not_loaded is None:
    _cpu.set_types(*TYPES, torch.int64)


def unavailable(x: Tensor) -> str | None:
    """Return why the loops cannot compute with tensors like `x`, or None."""
    if _not_loaded is None and x.is_cpu and x.dtype in TYPES:
        return None
    if _not_loaded is not None:
        return _not_loaded
    return f"no compiled loops for {x.dtype} on {x.device}"


def sums(x: Tensor, splits: Splits, num_splits: int) -> Tensor:
    """Return the local [sum of x | sum of x^2 | count], [S, 2C + 1], float64."""
    x = as_dense(x)
    out = empty_sums(x, num_splits)
    _cpu.sums(x, _contiguous(splits), num_splits, torch.get_num_threads(), out)
    return out


def moments(sums: Tensor) -> Moments:
    """Return the moments that follow from the sums of x."""
    values = torch.empty_like(sums, memory_format=torch.contiguous_format)
    _cpu.moments(sums.contiguous(), values)
    return Moments(values)


def normalize(x: Tensor, splits: Splits, moments: Moments, affine: Affine) -> Tensor:
    """Return `xhat * weight + bias`, like `x`."""
    x, values = as_dense(x), moments.values.contiguous()
    y = torch.empty_like(x)
    _cpu.normalize(*_arguments(x, splits, values), *_parameters(affine), affine.eps, y)
    return y


def normalize_batch(
    x: Tensor, splits: Splits, num_splits: int, affine: Affine
) -> tuple[Tensor, Moments]:
    """Return y by the moments of `x` itself, and these."""
    x = as_dense(x)
    y = torch.empty_like(x)
    values = empty_sums(x, num_splits)
    _cpu.normalize_batch(*_arguments(x, splits, values), *_parameters(affine), affine.eps, y)
    return y, Moments(values)


def grad_sums(dy: Tensor, x: Tensor, splits: Splits, moments: Moments, affine: Affine) -> Tensor:
    """Return the local [sum of dy | sum of dy * xhat], [S, 2C], accumulation type."""
    x, values = as_dense(x), moments.values.contiguous()
    dy, sums = _in_layout_of(x, dy), empty_grad_sums(x, values.shape[0])
    _cpu.grad_sums(dy, *_arguments(x, splits, values), None, affine.eps, sums, None)
    return sums


def grad_input(
    dy: Tensor, x: Tensor, splits: Splits, moments: Moments, affine: Affine, sums: Tensor
) -> Tensor:
    """Return the gradient of `x` from the global `sums` of `grad_sums`, like `x`."""
    x, values, sums = as_dense(x), moments.values.contiguous(), sums.contiguous()
    dy, dx, (weights, _) = _in_layout_of(x, dy), torch.empty_like(x), _parameters(affine)
    _cpu.grad_input(dy, *_arguments(x, splits, values), weights, affine.eps, sums, dx)
    return dx


def grad_batch(
    dy: Tensor, x: Tensor, splits: Splits, moments: Moments, affine: Affine
) -> tuple[Tensor, Tensor]:
    """Return the gradient of `x` by the sums of `dy` itself, and these."""
    x, values = as_dense(x), moments.values.contiguous()
    dy, dx, (weights, _) = _in_layout_of(x, dy), torch.empty_like(x), _parameters(affine)
    sums = empty_grad_sums(x, values.shape[0])
    _cpu.grad_batch(dy, *_arguments(x, splits, values), weights, affine.eps, sums, dx)
    return dx, sums


def update_running_stats(running: RunningStats, moments: Moments) -> None:
    """Update running statistics and counters in place, where a split has elements."""
    means, variances, counters, momentum = running
    dtype = accumulation_dtype(means[0].dtype)
    # Half precision is widened here, and rounded once.
    used = (
        _contiguous_as(dtype, "running_mean", means),
        _contiguous_as(dtype, "running_var", variances),
        _contiguous_as(torch.int64, "num_batches_tracked", counters),
    )
    _cpu.update_running_stats(
        moments.values.contiguous(),
        used[0],
        used[1],
        used[2] or None,
        momentum or 0.0,
        # Without a counter there is no average to take.
        momentum is None and len(counters) > 0,
    )
    for old, new in zip((*means, *variances, *counters), itertools.chain(*used), strict=True):
        if new is not old:
            old.copy_(new)


def _arguments(x: Tensor, splits: Splits, values: Tensor) -> tuple[Any, ...]:
    """Return what the loops need to know of a batch and its moments."""
    return x, _contiguous(splits), values.shape[0], torch.get_num_threads(), values


def _contiguous(splits: Splits) -> Splits:
    return splits.contiguous() if isinstance(splits, Tensor) else splits


def _contiguous_as(dtype: torch.dtype, name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
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


def _parameters(affine: Affine) -> tuple[list[Tensor] | None, list[Tensor] | None]:
    """Return the weights and biases, contiguous."""
    weights, biases, _ = affine
    return (
        None if weights is None else [each.contiguous() for each in weights],
        None if biases is None else [each.contiguous() for each in biases],
    )


def _in_layout_of(x: Tensor, dy: Tensor) -> Tensor:
    """Return `dy` with its elements where `x` has its own, and of their type."""
    if dy.shape != x.shape:
        raise RuntimeError(f"dy must have the shape of x, {[*x.shape]}, got {[*dy.shape]}")
    dy = dy.to(x.dtype)
    if dy.stride() == x.stride() or (dy.is_contiguous() and x.is_contiguous()):
        return dy
    return torch.empty_like(x).copy_(dy)

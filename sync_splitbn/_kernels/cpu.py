"""The four kernels for eager CPU: loops in C++, each over all splits at once.

N rows, S splits, C features. The loops are in `cpp`, and compiled where the package is installed
and a compiler is at hand. They move what must be moved: x once for the moments, x and y for
normalizing, dy and x for the sums, dy, x and dx for the gradient.
"""

import importlib.util
import math
import platform
from collections.abc import Sequence

import torch
from torch import Tensor

from .._moments import Affine, Moments, Splits, accumulation_dtype, is_eager_cpu

# Why the loops cannot be used here, if they cannot.
missing: str | None = None
try:
    from . import _cpu
except ImportError as error:
    compiled = importlib.util.find_spec(f"{__package__}._cpu") is not None
    missing = str(error) if compiled else "none"
else:
    # They are compiled for it, and a processor without it would stop the process.
    x86 = platform.machine() in ("x86_64", "AMD64")
    if x86 and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        missing = "a processor without AVX2"

LETTERS = {
    torch.float32: "f",
    torch.float64: "d",
    torch.bfloat16: "b",
    torch.float16: "h",
}


def moments(x: Tensor, splits: Splits, num_splits: int) -> Tensor:
    """Return the packed local moments of `x`, [S, 2C + 1], float64."""
    x, splits = _dense(x), _plain(splits)
    packed = x.new_empty((num_splits, 2 * x.shape[1] + 1), dtype=torch.float64)
    batch = _batch(x, splits, num_splits)
    _cpu.moments(LETTERS[x.dtype], batch, x.data_ptr(), packed.data_ptr())
    return packed


def normalize(x: Tensor, splits: Splits, moments: Moments, affine: Affine) -> Tensor:
    """Return `(x - mean) * invstd * weight + bias` with each row's split's values, like `x`."""
    x, splits = _dense(x), _plain(splits)
    mean, var = moments.mean.contiguous(), moments.var.contiguous()
    y = torch.empty_like(x)
    weights, biases = _contiguous(affine.weights), _contiguous(affine.biases)
    _cpu.normalize(
        LETTERS[x.dtype],
        _batch(x, splits, len(mean)),
        x.data_ptr(),
        y.data_ptr(),
        mean.data_ptr(),
        var.data_ptr(),
        _addresses(weights),
        _addresses(biases),
        affine.eps,
    )
    return y.relu_() if affine.relu else y


def grad_sums(dy: Tensor, x: Tensor, splits: Splits, moments: Moments, affine: Affine) -> Tensor:
    """Return the local `[sum of dy | sum of dy * (x - mean)]`, [S, 2C], accumulation type."""
    dy = affine.through_relu(dy, lambda: normalize(x, splits, moments, affine))
    x, splits, mean = _dense(x), _plain(splits), moments.mean.contiguous()
    dy = _like(dy, x)
    sums = x.new_empty((len(mean), 2 * x.shape[1]), dtype=accumulation_dtype(x.dtype))
    _cpu.grad_sums(
        LETTERS[x.dtype],
        _batch(x, splits, len(mean)),
        dy.data_ptr(),
        x.data_ptr(),
        mean.data_ptr(),
        sums.data_ptr(),
    )
    return sums


def grad_input(
    dy: Tensor, x: Tensor, splits: Splits, moments: Moments, affine: Affine, sums: Tensor
) -> Tensor:
    """Return the gradient of `x` from the global `sums` of `grad_sums`, like `x`."""
    dy = affine.through_relu(dy, lambda: normalize(x, splits, moments, affine))
    x, splits = _dense(x), _plain(splits)
    mean, var = moments.mean.contiguous(), moments.var.contiguous()
    dy, dx = _like(dy, x), torch.empty_like(x)
    packed, sums = moments.packed.contiguous(), sums.contiguous()
    weights = _contiguous(affine.weights)
    _cpu.grad_input(
        LETTERS[x.dtype],
        _batch(x, splits, len(mean)),
        dy.data_ptr(),
        x.data_ptr(),
        dx.data_ptr(),
        mean.data_ptr(),
        var.data_ptr(),
        packed.data_ptr(),
        sums.data_ptr(),
        _addresses(weights),
        affine.eps,
    )
    return dx


def alone(x: Tensor, splits: Splits, num_splits: int, affine: Affine) -> tuple[Tensor, Moments]:
    """Return `normalize` by the moments of `x` itself, and these."""
    x, splits, features = _dense(x), _plain(splits), x.shape[1]
    y = torch.empty_like(x)
    packed = x.new_empty((num_splits, 2 * features + 1), dtype=torch.float64)
    mean, var = x.new_empty((2, num_splits, features), dtype=torch.float64).unbind()
    weights, biases = _contiguous(affine.weights), _contiguous(affine.biases)
    _cpu.alone(
        LETTERS[x.dtype],
        _batch(x, splits, num_splits),
        x.data_ptr(),
        y.data_ptr(),
        packed.data_ptr(),
        mean.data_ptr(),
        var.data_ptr(),
        _addresses(weights),
        _addresses(biases),
        affine.eps,
    )
    return y.relu_() if affine.relu else y, Moments(packed, mean, var)


def grad_alone(
    dy: Tensor, x: Tensor, splits: Splits, moments: Moments, affine: Affine
) -> tuple[Tensor, Tensor]:
    """Return `grad_input` by the sums of `dy` itself, and the parameters' gradients, [2, S, C]."""
    dy = affine.through_relu(dy, lambda: normalize(x, splits, moments, affine))
    x, splits = _dense(x), _plain(splits)
    dy, dx = _like(dy, x), torch.empty_like(x)
    mean, var, packed = (t.contiguous() for t in (moments.mean, moments.var, moments.packed))
    grads = x.new_empty((2, *mean.shape), dtype=accumulation_dtype(x.dtype))
    weights = _contiguous(affine.weights)
    _cpu.grad_alone(
        LETTERS[x.dtype],
        _batch(x, splits, len(mean)),
        dy.data_ptr(),
        x.data_ptr(),
        dx.data_ptr(),
        mean.data_ptr(),
        var.data_ptr(),
        packed.data_ptr(),
        grads.data_ptr(),
        _addresses(weights),
        affine.eps,
    )
    return dx, grads


def follow(
    means: Sequence[Tensor],
    vars: Sequence[Tensor],
    trackers: Sequence[Tensor],
    moments: Moments,
    momentum: float,
) -> bool:
    """Move the running statistics of each split by these moments, if they are as the loops know.

    Return whether they were; a split without elements moves nothing, of one element no variance.
    """
    dtype, running = means[0].dtype, (*means, *vars)
    if missing is not None or not is_eager_cpu(moments.packed):
        return False
    if dtype not in (torch.float32, torch.float64):
        return False
    if not all(t.dtype == dtype and is_eager_cpu(t) and t.is_contiguous() for t in running):
        return False
    if not all(t.dtype == torch.int64 and is_eager_cpu(t) for t in trackers):
        return False
    packed, mean, var = (t.contiguous() for t in (moments.packed, moments.mean, moments.var))
    _cpu.follow(
        LETTERS[dtype],
        means[0].numel(),
        packed.data_ptr(),
        mean.data_ptr(),
        var.data_ptr(),
        tuple(t.data_ptr() for t in means),
        tuple(t.data_ptr() for t in vars),
        tuple(t.data_ptr() for t in trackers),
        momentum,
    )
    # Whoever saved them for a backward pass is told, as by any operator.
    told = [t for t in (*running, *trackers) if not t.is_inference()]
    torch.autograd.graph.increment_version(told)
    return True


def _dense(x: Tensor) -> Tensor:
    """Return `x` in memory as it is, in one of the two layouts that the loops know."""
    x = x.resolve_neg()
    if x.is_contiguous():
        return x
    # The same question twice, but this one is answered in a tenth of the time.
    innermost = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if innermost or x.movedim(1, -1).is_contiguous() else x.contiguous()


def _like(dy: Tensor, x: Tensor) -> Tensor:
    """Return `dy` with its elements where `x` has its own, and of their type."""
    dy = dy.resolve_neg().to(x.dtype)
    if dy.stride() == x.stride() or (dy.is_contiguous() and x.is_contiguous()):
        return dy
    return torch.empty_like(x).copy_(dy)


def _plain(splits: Splits) -> Splits:
    """Return the splits as the loops read them; hold it while they do."""
    return splits.long().contiguous() if isinstance(splits, Tensor) else splits


def _batch(x: Tensor, splits: Splits, num_splits: int) -> "_cpu.Batch":
    """Return what the loops know of a batch."""
    rows, features, *length = x.shape
    innermost = features > 1 and x.stride(1) == 1
    positions = math.prod(length)
    of = splits.data_ptr() if isinstance(splits, Tensor) else splits
    return of, num_splits, rows, features, positions, innermost, torch.get_num_threads()


def _contiguous(values: Tensor | Sequence[Tensor] | None) -> Sequence[Tensor] | None:
    """Return the values of each split, [C], without gaps."""
    return None if values is None else [each.resolve_neg().contiguous() for each in values]


def _addresses(values: Sequence[Tensor] | None) -> tuple[int, ...] | None:
    """Return where the values of each split lie."""
    return None if values is None else tuple(each.data_ptr() for each in values)

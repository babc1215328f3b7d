"""The kernels for CUDA in Triton: how those of `triton_jit` are launched.

N rows, S splits, C features, L positions per row. Nothing here waits for the device, reads host
memory later or keeps device memory, so that CUDA graphs may capture every call.
"""

import functools
import itertools
import math
import os
import shutil
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._moments import (
    COMPILED_TYPES,
    Index,
    Sizes,
    Tensors,
    accumulation_dtype,
    as_dense,
    check_tensors,
    increment_versions,
)
from . import triton_jit as jit

# The interpreter is chosen by TRITON_INTERPRET=1, before Triton is imported.
INTERPRETED = not isinstance(jit.sums_kernel, triton.JITFunction)
NUM_WARPS = 4
# The most sizes and the most pointers of a kind among a kernel's arguments, which may take 4 KB.
MAX_SIZES = 256
MAX_POINTERS = 16
# An outlier among so many positions moves their mean little.
SHIFT_POSITIONS = 64


def unavailable(x: Tensor) -> str | None:
    """Return why Triton cannot compute with tensors like `x`, or None."""
    return _unavailable(x.device, x.dtype)


@functools.lru_cache(maxsize=64)
def _unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why Triton cannot compute on this device with this type, or None."""
    if dtype not in COMPILED_TYPES:
        return f"no Triton kernels for {dtype}"
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"no Triton kernels for device {device}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "a GPU of compute capability below 8.0"
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return "no C compiler, which Triton needs to launch kernels; set CC"
    return None


def sums(x: Tensor, index: Index, sizes: Sizes, num_splits: int) -> Tensor:
    """Return the local [sum of x | sum of x^2 | count], [S, 2C + 1], float64."""
    return _sum(_prepare(x, None, index, sizes, num_splits), None, 0.0)


def moments(sums: Tensor) -> Tensor:
    """Return the moments that follow from the sums of x."""
    sums = sums.contiguous()
    out, (num_splits, width) = torch.empty_like(sums), sums.shape
    block, blocks = _blocks(width // 2, 256)
    _launch(jit.moments_kernel, num_splits * blocks, sums, out, width // 2, block)
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
    batch = _prepare(x, None, index, sizes, moments.shape[0])
    return _apply(batch, _checked(moments, x), weights, biases, eps, None)


def grad_sums(
    dy: Tensor, x: Tensor, index: Index, sizes: Sizes, moments: Tensor, eps: float
) -> Tensor:
    """Return the local [sum of dy | sum of dy * xhat], [S, 2C], accumulation type."""
    batch = _prepare(x, dy, index, sizes, moments.shape[0])
    return _sum(batch, _checked(moments, x), eps)


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
    _check("sums", sums, (moments.shape[0], 2 * x.shape[1]), x)
    batch = _prepare(x, dy, index, sizes, moments.shape[0])
    return _apply(batch, _checked(moments, x), weights, (), eps, sums.contiguous())


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
    batch = _prepare(x, None, index, sizes, num_splits)
    moments = _sum(batch, None, 0.0, as_moments=True)
    return _apply(batch, moments, weights, biases, eps, None), moments


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
    batch, moments = _prepare(x, dy, index, sizes, moments.shape[0]), _checked(moments, x)
    local = _sum(batch, moments, eps)
    return _apply(batch, moments, weights, (), eps, local), local


def update_running_stats(
    means: Tensors, vars: Tensors, counters: Tensors, momentum: float | None, moments: Tensor
) -> None:
    """Update running statistics and counters in place, in one launch for each 16 splits."""
    given, moments = (*means, *vars, *counters), moments.contiguous()
    num_splits, features = moments.shape[0], moments.shape[1] // 2
    means = _uniform("running_mean", means, num_splits, (features,), moments)
    variances = _uniform("running_var", vars, num_splits, (features,), moments)
    if counters:
        counters = _uniform("num_batches_tracked", counters, num_splits, (), moments)
    step = 0.0 if momentum is None else float(momentum)
    block, _ = _blocks(features, 512)
    for i in range(0, num_splits, MAX_POINTERS):
        chunk = slice(i, i + MAX_POINTERS)
        pointers = means[chunk], variances[chunk], tuple(counters[chunk]) or None
        arguments = *pointers, features, step, momentum is None, block
        _launch(jit.running_kernel, len(means[chunk]), moments[chunk], *arguments)
    for tensor, written in zip(given, (*means, *variances, *counters), strict=True):
        if tensor is not written:
            tensor.copy_(written)
    increment_versions(given)


class Batch(NamedTuple):
    """A batch as the kernels read it."""

    x: Tensor  # [N, C, L], or [N, L, C] in memory
    dy: Tensor | None  # likewise
    order: Tensor | None  # rows sorted by an index, [N]
    bounds: Tensor | None  # of the splits in sorted rows, [S + 1]
    shape: tuple[int, int, int]  # N, C, L
    sizes: tuple[int, ...] | None  # rows of each split, where the host is to tell
    num_splits: int
    channels_last: bool


def _prepare(x: Tensor, dy: Tensor | None, index: Index, sizes: Sizes, num_splits: int) -> Batch:
    """Return a batch as the kernels read it, or raise."""
    reason = unavailable(x)
    if reason is not None:
        raise RuntimeError(f"impl='triton' must be able to serve the input, got {reason}")
    x = as_dense(x)
    shape = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    channels_last = shape[2] == 1 or not x.is_contiguous()
    if dy is not None:
        _check("dy", dy, x.shape, x)
        dy = (dy.movedim(1, -1) if channels_last else dy).contiguous()
    order = bounds = None
    if index is not None:
        _check("index", index, shape[:1], x)
        ids, order = index.sort(stable=True)
        bounds = torch.searchsorted(ids, torch.arange(num_splits + 1, device=x.device))
    elif len(sizes) != num_splits or sum(sizes) != shape[0] or min(sizes) < 0:
        raise ValueError(
            f"sizes must be those of {num_splits} splits and sum to {shape[0]}, got {sizes}"
        )
    elif num_splits > MAX_SIZES and len(set(sizes)) > 1:
        # Fills read no memory of the host, as copies of a captured graph would at each replay.
        ends = (0, *itertools.accumulate(sizes))
        bounds = torch.stack([torch.full((), end, device=x.device) for end in ends])
    host_sizes = tuple(sizes) if bounds is None else None
    return Batch(x, dy, order, bounds, shape, host_sizes, num_splits, channels_last)


def _sum(batch: Batch, moments: Tensor | None, eps: float, as_moments: bool = False) -> Tensor:
    """Return the sums of dy, or without one, the sums of x or its moments."""
    x, dy, order, bounds, (_, features, _), *_ = batch
    loads, stages = (2, 3) if dy is None else (1, 4)
    (programs, blocks), schedule, config = _plan_batch(batch, loads, stages)
    columns = 3 * features + 1 if dy is None else 2 * features
    partials = x.new_empty((programs, columns), dtype=torch.float64)
    shape = batch.num_splits, 2 * features + (dy is None)
    dtype = torch.float64 if dy is None else accumulation_dtype(x.dtype)
    out = x.new_empty(shape, dtype=dtype)
    inputs = x, dy, order, moments, partials, eps
    _launch(jit.sums_kernel, programs * blocks, *inputs, schedule, bounds, config)
    _, blocks = _blocks(features, 16)
    options = schedule, bounds, dy is not None, as_moments, config
    _launch(jit.total_kernel, batch.num_splits * blocks, partials, out, *options)
    return out


def _apply(
    batch: Batch,
    moments: Tensor,
    weights: Tensors,
    biases: Tensors,
    eps: float,
    sums: Tensor | None,
) -> Tensor:
    """Return y, or dx if there are `sums`."""
    x, dy, order, bounds, (_, features, _), *_ = batch
    parameters = []
    for name, tensors in (("weight", weights), ("bias", biases)):
        if tensors:
            tensors = _uniform(name, tensors, batch.num_splits, (features,), x)
            if batch.num_splits > MAX_POINTERS:
                tensors = (torch.stack(tensors),)
        parameters.append(tensors or None)
    loads, stages = (4, 1) if dy is None else (2, 1)
    (programs, blocks), schedule, config = _plan_batch(batch, loads, stages)
    out = torch.empty_like(x)
    inputs = x, dy, out, order, moments, *parameters, sums, eps
    _launch(jit.apply_kernel, programs * blocks, *inputs, schedule, bounds, config)
    return out


def _launch(kernel: Any, programs: int, *arguments: Any) -> None:
    """Run a kernel on the device of its first argument, unless there is nothing to compute."""
    if programs:
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, num_warps=NUM_WARPS)


@functools.cache
def _num_programs(device: torch.device) -> int:
    """Return how many programs run at once, with 128 registers: these are to share the work."""
    if INTERPRETED:
        return 8
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


def _plan_batch(batch: Batch, loads: int, stages: int) -> Any:
    """Return the plan of a batch on its device."""
    *_, shape, sizes, num_splits, channels_last = batch
    x = batch.x
    goal = _num_programs(x.device)
    return _plan(shape, sizes, num_splits, x.dtype, channels_last, goal, loads, stages)


@functools.lru_cache(maxsize=1024)
def _plan(
    shape: tuple[int, int, int],
    sizes: tuple[int, ...] | None,
    num_splits: int,
    dtype: torch.dtype,
    channels_last: bool,
    goal: int,
    loads: int,
    stages: int,
) -> tuple[tuple[int, int], tuple[int, ...], jit.Config]:
    """Cut a batch into tiles, and share them among about `goal` programs.

    Args:
        shape: N, C and L.
        sizes: rows of each split, or None where only the device knows them.
        num_splits: number of splits.
        dtype: type of x.
        channels_last: whether features are innermost.
        goal: programs that run at once.
        loads: 16-byte loads of x by a thread for one tile.
        stages: tiles on their way to shared memory, if more than 1.

    Returns:
        The programs for each block of features and the number of these blocks, and the schedule
        and config of `triton_jit`.
    """
    rows, features, length = shape
    inner = max(1, features if channels_last else length)
    align = min(inner & -inner, 16)
    # Lines out of step with 8 bytes take more loads, and threads the parameters of more features.
    tile = 32 * NUM_WARPS * 16 // dtype.itemsize * (loads if align * dtype.itemsize >= 8 else 1)
    width = triton.next_power_of_2(max(1, features))
    if channels_last:
        block_p = tile // _width(features, 128)
    else:
        block_p = _width(length, max(512, tile // width))
    block_c = max(1, min(tile // block_p, width))
    blocks = triton.cdiv(features, block_c)
    tiles = [
        triton.cdiv(n * length, block_p) if channels_last else n * triton.cdiv(length, block_p)
        for n in ((rows,) if sizes is None else sizes)
    ]
    each = max(1, triton.cdiv(sum(tiles) * blocks, goal))
    if sum(triton.cdiv(n, each) for n in tiles) * blocks > 1.25 * goal:
        # Some must wait for others: let there be many, so that few are left for the last turn.
        each = max(1, triton.cdiv(sum(tiles) * blocks, 4 * goal))
    programs = sum(triton.cdiv(n, each) for n in tiles)
    if sizes is None and programs:
        # The last tile of a split may be short, and the last program of a split have fewer tiles.
        programs += 2 * num_splits
    is_equal = sizes is not None and len(set(sizes)) == 1
    ends = () if sizes is None else sizes[:1] if is_equal else itertools.accumulate(sizes)
    head = (features // align, length) if channels_last else (features, length // align)
    is_wide = max(rows * length, block_p * features, block_c * length) + block_p >= 2**30
    config = jit.Config(
        acc=tl.float64 if dtype == torch.float64 else tl.float32,
        index=tl.int64 if is_wide else tl.int32,
        channels_last=channels_last,
        align=align,
        block_p=block_p,
        block_c=block_c,
        block_s=1 if is_equal else triton.next_power_of_2(num_splits),
        shift_tiles=triton.cdiv(SHIFT_POSITIONS, block_p),
        num_stages=stages,
    )
    return (programs, blocks), _encode(*head, num_splits, each, *ends), config


@functools.lru_cache(maxsize=1024)
def _blocks(features: int, widest: int) -> tuple[int, int]:
    """Return the width of a block of features, a power of two, and the number of blocks."""
    width = min(widest, triton.next_power_of_2(max(1, features)))
    return width, triton.cdiv(features, width)


def _encode(*numbers: int) -> tuple[int, ...]:
    """Return neither 1 nor multiples of 16, for which Triton would compile anew in a tuple."""
    return tuple(2 * number + 3 for number in numbers)


def _width(size: int, widest: int) -> int:
    """Return the width of tiles along a line: all of it, or else the widest that pads it little."""
    if 2 * size <= widest:
        return max(1, triton.next_power_of_2(size))
    widths = (widest, widest // 2, widest // 4)
    return min(widths, key=lambda w: (max(7 * triton.cdiv(size, w) * w, 8 * size), -w))


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """Raise unless a tensor has this shape and is on the device of x."""
    if tensor.shape != shape or tensor.device != x.device:
        raise RuntimeError(
            f"{name} must have shape {list(shape)} on {x.device}, "
            f"got {list(tensor.shape)} on {tensor.device}"
        )


def _checked(moments: Tensor, x: Tensor) -> Tensor:
    """Return moments as the kernels read them, or raise."""
    _check("moments", moments, (moments.shape[0], 2 * x.shape[1] + 1), x)
    if moments.dtype != torch.float64:
        raise TypeError(f"moments must be float64, got {moments.dtype}")
    return moments.contiguous()


def _uniform(
    name: str, tensors: Tensors, num_splits: int, shape: tuple[int, ...], x: Tensor
) -> tuple[Tensor, ...]:
    """Return contiguous tensors of one type, themselves where they are so, or copies; or raise."""
    if len(tensors) != num_splits:
        raise RuntimeError(f"{name} must be given for {num_splits} splits, got {len(tensors)}")
    check_tensors(name, tensors, shape, x.device)
    dtype = tensors[0].dtype
    if all(tensor.dtype == dtype and tensor.is_contiguous() for tensor in tensors):
        return tuple(tensors)
    dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])
    return tuple(tensor.to(dtype).contiguous() for tensor in tensors)

# ruff: noqa: N803 - what is compiled in is upper case, as everywhere in Triton
"""The four kernels for CUDA, in Triton: all splits in one launch, no copy, the same bits each run.

N rows, S splits, C features, L positions per row. Memory is walked in tiles of BP positions by BC
features, each within one split. Where features are innermost (`last`), positions run through the
rows, [N * L]; elsewhere those of a tile are of one row. A split is given to as many programs as
its share of the batch asks for, and they stride over its tiles, so that all sweep through memory
abreast. What writes sweeps in reverse of what summed before: the last read is still in the cache.

Where `splits` is an index, each split has programs for all rows, which mask out those of others.
A masked load moves no bytes: it costs instructions, as often as there are splits, not traffic.
"""

import functools
import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._moments import Affine, Moments, Splits, accumulation_dtype

WARPS = 4
# What tells of splits are parameters of the kernel, of which there may be 4 KB.
SPLITS_PER_LAUNCH = 64


class Constants(NamedTuple):
    """What a kernel is compiled for: nothing that changes with the number of rows."""

    acc: tl.constexpr  # type of accumulation
    last: tl.constexpr
    align: tl.constexpr  # divides the innermost size, up to 16
    bp: tl.constexpr
    bc: tl.constexpr
    stages: tl.constexpr  # tiles under way to shared memory, if more than 1
    eps: tl.constexpr
    relu: tl.constexpr


Inputs: TypeAlias = tuple[Any, ...]
Launches: TypeAlias = list[tuple[int, int, int, tuple[int, ...]]]


@triton.jit
def _work(numbers, K):
    """Return what a program is to do, a tuple for the functions below.

    It holds the split, its rows [low, high), its tiles, the program's number, the split's first
    program and last (exclusive), the program's features [BC], and the sizes C and L.
    """
    features, length, blocks = numbers[0] - 3 >> 1, numbers[1] - 3 >> 1, numbers[2] - 3 >> 1
    # The innermost size comes divided: so the compiler sees how its lines are aligned.
    if K.last:
        features *= K.align
    else:
        length *= K.align
    program = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * K.bc + tl.arange(0, K.bc)
    split, low, high, tiles = numbers[3] - 3 >> 1, numbers[4], numbers[5], numbers[6]
    first, last = numbers[7], numbers[8]
    for i in tl.static_range(1, len(numbers) // 5):
        here = 2 * program + 3 >= numbers[5 * i + 7]
        split += here.to(tl.int32)
        low = tl.where(here, numbers[5 * i + 4], low)
        high = tl.where(here, numbers[5 * i + 5], high)
        tiles = tl.where(here, numbers[5 * i + 6], tiles)
        first = tl.where(here, numbers[5 * i + 7], first)
        last = tl.where(here, numbers[5 * i + 8], last)
    low, high, tiles = low - 3 >> 1, high - 3 >> 1, tiles - 3 >> 1
    first, last = first - 3 >> 1, last - 3 >> 1
    return split, low, high, tiles, program, first, last, c, features, length


@triton.jit
def _tile(t, work, index, K):
    """Return the offsets of tile `t` in x and its mask, [BP, BC], and its positions' mask, [BP]."""
    split, low, high, _, _, _, _, c, features, length = work
    p = tl.arange(0, K.bp)
    if K.last:
        p += low.to(tl.int64) * length + tl.cast(t, tl.int64) * K.bp
        owned = p < high.to(tl.int64) * length
        if index is not None:
            owned &= tl.load(index + p // length, owned, other=-1) == split
        offsets = p[:, None] * features + c[None, :]
    else:
        blocks = (length + K.bp - 1) // K.bp
        row = (low + t // blocks).to(tl.int64)
        p += t % blocks * K.bp
        owned = p < length
        if index is not None:
            owned &= 0 * p + tl.load(index + row) == split
        offsets = (row * features + c)[None, :] * length + p[:, None]
    return offsets, owned[:, None] & (c < features)[None, :], owned


@triton.jit
def _shift(x, work, index, K):
    """Return the program's first element of each feature, [BC]; with an index, one of its split."""
    split, low, high, _, program, first, _, c, features, length = work
    t = (program - first).to(tl.int64)
    if K.last:
        row, p = low + t * K.bp // length, t * K.bp % length
    else:
        blocks = (length + K.bp - 1) // K.bp
        row, p = low + t // blocks, t % blocks * K.bp
    if index is not None:
        # The next row of the split, in a batch that is bent to a ring.
        steps = high.to(tl.int64)
        for start in range(0, high, 1024):
            n = start + tl.arange(0, 1024)
            mine = tl.load(index + n, n < high, other=-1) == split
            steps = tl.minimum(steps, tl.min(tl.where(mine, (n - row + high) % high, high), 0))
        row = (row + steps) % high
    offsets = (row * length + p) * features + c if K.last else (row * features + c) * length + p
    return tl.load(x + offsets, c < features, other=0).to(K.acc)


@triton.jit
def _line(packed, weight, bias, strides, work, K):
    """Return the mean, rounded to `high`, then 1 / count, invstd, scale, shift and rest, float64.

    All are [BC]. The output is `(x - high) * scale + shift`, and `rest` is high - mean.
    """
    split, _, _, _, _, _, _, c, features, _ = work
    here = c < features
    row = packed + split * (2 * features + 1)
    each = 1.0 / tl.maximum(tl.load(row + 2 * features), 1.0)
    mean = tl.load(row + c, here, other=0) * each
    var = tl.load(row + features + c, here, other=0) * each - mean * mean
    # A maximum would turn NaN into 0.
    invstd = tl.rsqrt(tl.where(var < 0, 0.0, var) + K.eps)
    high = mean.to(K.acc)
    rest = high.to(tl.float64) - mean
    scale = invstd
    if weight is not None:
        line = weight + split * (strides[0] - 3 >> 1) + c
        scale *= tl.load(line, here, other=0).to(tl.float64)
    shift = rest * scale
    if bias is not None:
        line = bias + split * (strides[1] - 3 >> 1) + c
        shift += tl.load(line, here, other=0).to(tl.float64)
    return high, each, invstd, scale, shift, rest


@triton.jit
def _sums_kernel(dy, x, index, packed, weight, bias, strides, partials, numbers, K):
    """Sum dy and dy * (x - mean) over a program's tiles, or x and x^2, and count, without dy.

    Grid [programs * blocks of features]. dy and x are [N, C, L], or [N, L, C] if `last`; index is
    [N] or None; packed is [S, 2C + 1]; weight and bias are [S, C] or None; partials is
    [programs, 2C], or [programs, 2C + 1] without dy.
    """
    work = _work(numbers, K)
    _, _, _, tiles, program, first, last, c, features, _ = work
    if dy is None:
        high = _shift(x, work, index, K)
    else:
        high, _, _, scale, shift, rest = _line(packed, weight, bias, strides, work, K)
        scale, shift = scale.to(K.acc), shift.to(K.acc)
    total = tl.full([K.bp, K.bc], 0, K.acc)
    products = tl.full([K.bp, K.bc], 0, K.acc)
    count = tl.full([K.bp], 0, tl.int32)
    for t in tl.range(program - first, tiles, last - first, num_stages=K.stages):
        offsets, here, owned = _tile(t, work, index, K)
        xmu = tl.load(x + offsets, here, other=0).to(K.acc) - high[None, :]
        if dy is None:
            xmu = tl.where(here, xmu, 0.0)
            g = xmu
            count += owned.to(tl.int32)
        else:
            g = tl.load(dy + offsets, here, other=0).to(K.acc)
            if K.relu:
                g = tl.where(tl.fma(xmu, scale[None, :], shift[None, :]) <= 0, 0.0, g)
        total += g
        products += g * xmu
    total = tl.sum(total.to(tl.float64), 0)
    products = tl.sum(products.to(tl.float64), 0)
    if dy is None:
        # Sums about k become sums about 0 in float64, where no digit is lost.
        n = tl.sum(count, 0).to(tl.float64)
        k = tl.where(n > 0, high, 0.0).to(tl.float64)
        products += k * (2 * total + n * k)
        total += n * k
        partials += program.to(tl.int64) * (2 * features + 1) + c
        tl.store(partials + 2 * features, n, c == 0)
    else:
        products += rest * total
        partials += program.to(tl.int64) * (2 * features) + c
    tl.store(partials, total, c < features)
    tl.store(partials + features, products, c < features)


@triton.jit
def _apply_kernel(dy, x, index, packed, weight, bias, strides, sums, out, numbers, K):
    """Write a program's tiles of dx, or of y without dy; grid [programs * blocks of features].

    dy, x and out are [N, C, L], or [N, L, C] if `last`; index is [N] or None; packed is
    [S, 2C + 1]; weight and bias are [S, C] or None; sums is [S, 2C], or None without dy.
    """
    work = _work(numbers, K)
    split, _, _, tiles, program, first, last, c, features, _ = work
    high, each, invstd, scale, shift, rest = _line(packed, weight, bias, strides, work, K)
    if dy is not None:
        sums += split * (2 * features) + c
        mean_dy = tl.load(sums, c < features, other=0).to(tl.float64) * each
        mean_dy_xmu = tl.load(sums + features, c < features, other=0).to(tl.float64) * each
        slope = -scale * mean_dy_xmu * invstd * invstd
        offset = (slope * rest - scale * mean_dy).to(K.acc)
        slope = slope.to(K.acc)
    scale, shift = scale.to(K.acc), shift.to(K.acc)
    for t in tl.range(program - first, tiles, last - first, num_stages=K.stages):
        offsets, here, _owned = _tile(tiles - 1 - t, work, index, K)
        xmu = tl.load(x + offsets, here, other=0).to(K.acc) - high[None, :]
        value = tl.fma(xmu, scale[None, :], shift[None, :])
        if dy is None:
            if K.relu:
                value = tl.where(value <= 0, 0.0, value)
        else:
            g = tl.load(dy + offsets, here, other=0).to(K.acc)
            if K.relu:
                g = tl.where(value <= 0, 0.0, g)
            value = tl.fma(g, scale[None, :], tl.fma(xmu, slope[None, :], offset[None, :]))
        tl.store(out + offsets, value.to(out.dtype.element_ty), here)


@triton.jit(do_not_specialize=["width"])
def _total_kernel(partials, sums, width, numbers):
    """Sum what the programs of a split summed, in their order; grid [splits * blocks of width].

    partials is [programs, width], sums is [S, width].
    """
    blocks = tl.cdiv(width, 16)
    place = tl.program_id(0) // blocks
    w = tl.program_id(0) % blocks * 16 + tl.arange(0, 16)
    first, last = numbers[7], numbers[8]
    for i in tl.static_range(1, len(numbers) // 5):
        first = tl.where(place == i, numbers[5 * i + 7], first)
        last = tl.where(place == i, numbers[5 * i + 8], last)
    first, last = first - 3 >> 1, last - 3 >> 1
    total = tl.zeros([64, 16], tl.float64)
    for start in range(first, last, 64):
        program = start + tl.arange(0, 64)
        here = (program < last)[:, None] & (w < width)[None, :]
        offsets = program.to(tl.int64)[:, None] * width + w[None, :]
        total += tl.load(partials + offsets, here, other=0)
    out = tl.sum(total, 0).to(sums.dtype.element_ty)
    tl.store(sums + ((numbers[3] - 3 >> 1) + place) * width + w, out, w < width)


# The interpreter is chosen by TRITON_INTERPRET=1, before Triton is imported.
INTERPRETED = not isinstance(_total_kernel, triton.JITFunction)
# Of a kernel: 4 on each of the 132 processors of an H100. With 128 registers a thread they run all
# at once, so that none starts when most are done, and with 64 bytes a thread under way they hide
# the latency of the memory.
PROGRAMS = 8 if INTERPRETED else 528


def moments(x: Tensor, splits: Splits, num_splits: int) -> Tensor:
    """Return the packed local moments of `x`, [S, 2C + 1], float64."""
    sums = x.new_empty((num_splits, 2 * x.shape[1] + 1), dtype=torch.float64)
    return _sum(sums, *_prepare(None, x, splits, sums, Affine(None, None, 0), 2, 3))


def normalize(x: Tensor, splits: Splits, moments: Moments, affine: Affine) -> Tensor:
    """Return `(x - mean) * invstd * weight + bias`, rectified if `affine.relu`, like `x`."""
    return _apply(None, *_prepare(None, x, splits, moments.packed, affine, 4, 1))


def grad_sums(dy: Tensor, x: Tensor, splits: Splits, moments: Moments, affine: Affine) -> Tensor:
    """Return the local `[sum of dy | sum of dy * (x - mean)]`, [S, 2C], accumulation type.

    With `affine.relu`, here and in `grad_input`, dy counts where the output is positive.
    """
    shape = len(moments.packed), 2 * x.shape[1]
    sums = x.new_empty(shape, dtype=accumulation_dtype(x.dtype))
    return _sum(sums, *_prepare(dy, x, splits, moments.packed, affine, 1, 4))


def grad_input(
    dy: Tensor, x: Tensor, splits: Splits, moments: Moments, affine: Affine, sums: Tensor
) -> Tensor:
    """Return the gradient of `x` from the global `sums` of `grad_sums`, like `x`."""
    return _apply(sums.contiguous(), *_prepare(dy, x, splits, moments.packed, affine, 2, 1))


def _sum(sums: Tensor, inputs: Inputs, K: Constants, launches: Launches) -> Tensor:
    """Fill `sums` [S, width]: first by program, then by split."""
    width = sums.shape[1]
    for splits, programs, blocks, numbers in launches:
        partials = sums.new_empty((programs, width), dtype=torch.float64)
        _run(_sums_kernel, programs * blocks, *inputs, partials, numbers, K)
        _run(_total_kernel, splits * triton.cdiv(width, 16), partials, sums, width, numbers)
    return sums


def _apply(sums: Tensor | None, inputs: Inputs, K: Constants, launches: Launches) -> Tensor:
    """Return y, or dx if there are `sums`."""
    out = torch.empty_like(inputs[1])
    for _, programs, blocks, numbers in launches:
        _run(_apply_kernel, programs * blocks, *inputs, sums, out, numbers, K)
    return out


def _run(kernel: Any, programs: int, *arguments: Any) -> None:
    """Run a kernel, unless there is nothing to compute."""
    if programs:
        with torch.cuda.device_of(arguments[1]):
            kernel[(programs,)](*arguments, num_warps=WARPS)


def _prepare(
    dy: Tensor | None, x: Tensor, splits: Splits, packed: Tensor, affine: Affine, *how: int
) -> tuple[Inputs, Constants, Launches]:
    """Return the first arguments of a kernel, and its `_plan`; `how` is loads and stages."""
    if not (x.is_cuda or INTERPRETED):
        raise RuntimeError(
            f"impl='triton' must be given a CUDA tensor, got device {x.device}; "
            "pass impl=None to choose by device"
        )
    shape = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    dense = x.is_contiguous()
    last = not dense and x.movedim(1, -1).is_contiguous()
    x = x if dense or last else x.contiguous()
    # With one feature or one position both orders are one: take that of the longer lines.
    last = last or 1 in shape[1:]
    if dy is not None:
        dy = (dy.movedim(1, -1) if last else dy).contiguous()
    index = splits.contiguous() if isinstance(splits, Tensor) else None
    weight, bias = (
        p if p is None or p.stride(1) == 1 else p.contiguous() for p in (affine.weight, affine.bias)
    )
    strides = _odd(0 if p is None else p.stride(0) for p in (weight, bias))
    sizes = splits if index is None else len(packed)
    plan = _plan(shape, sizes, x.dtype, last, PROGRAMS, (affine.eps, affine.relu, *how))
    return (dy, x, index, packed.contiguous(), weight, bias, strides), *plan


def _odd(numbers: Iterable[int]) -> tuple[int, ...]:
    """Return neither 1 nor multiples of 16, for which Triton would compile anew in a tuple."""
    return tuple(2 * number + 3 for number in numbers)


@functools.lru_cache(maxsize=1024)
def _plan(
    shape: tuple[int, int, int],
    sizes: tuple[int, ...] | int,
    dtype: torch.dtype,
    last: bool,
    goal: int,
    how: tuple[float, bool, int, int],
) -> tuple[Constants, Launches]:
    """Share some `goal` programs among splits of given sizes, or so many given by an index.

    A launch is its number of splits, of programs for each block of features and of such blocks,
    and the numbers that `_work` reads.
    """
    eps, relu, loads, stages = how
    rows, features, length = shape
    inner = max(1, features if last else length)
    align = min(inner & -inner, 16)
    # Lines out of step with 8 bytes take more loads, and threads the parameters of more features.
    tile = 32 * WARPS * 16 // dtype.itemsize * (loads if align * dtype.itemsize >= 8 else 1)
    bp = tile // _width(features, 128) if last else _width(length, 512)
    bc = max(1, min(tile // bp, triton.next_power_of_2(features)))
    ends = [0, *itertools.accumulate(() if isinstance(sizes, int) else sizes)]
    bounds = [(0, rows)] * sizes if isinstance(sizes, int) else list(itertools.pairwise(ends))
    tiles = [
        triton.cdiv((b - a) * length, bp) if last else (b - a) * triton.cdiv(length, bp)
        for a, b in bounds
    ]
    blocks = triton.cdiv(features, bc)
    each = max(1, triton.cdiv(sum(tiles) * blocks, goal))
    if sum(triton.cdiv(n, each) for n in tiles) * blocks > 1.25 * goal:
        # Some must wait for others: let there be many, so that few are left for the last turn.
        each = max(1, triton.cdiv(sum(tiles) * blocks, 4 * goal))
    head = (features // align, length) if last else (features, length // align)
    launches = []
    for i in range(0, len(bounds), SPLITS_PER_LAUNCH):
        numbers, programs = [*head, blocks, i], 0
        for (a, b), n in list(zip(bounds, tiles, strict=True))[i : i + SPLITS_PER_LAUNCH]:
            numbers += [a, b, n, programs, programs + triton.cdiv(n, each)]
            programs = numbers[-1]
        launches.append((len(numbers) // 5, programs, blocks, _odd(numbers)))
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    constants = map(tl.constexpr, (acc, last, align, bp, bc, stages, eps, relu))
    return Constants(*constants), launches


def _width(size: int, widest: int) -> int:
    """Return the width of tiles along a line: all of it, or else the widest that pads it little."""
    if 2 * size <= widest:
        return max(1, triton.next_power_of_2(size))
    widths = (widest, widest // 2, widest // 4)
    return min(widths, key=lambda w: (max(7 * triton.cdiv(size, w) * w, 8 * size), -w))

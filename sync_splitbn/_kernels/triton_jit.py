# ruff: noqa: N803 - constexpr parameters are upper case, as everywhere in Triton
"""The Triton kernels, which `triton` launches: all splits in one launch, without atomics.

N rows, S splits, C features, L positions per row.

Tiles: x is walked in tiles of `block_p` positions by `block_c` features, each within one split.
Where features are innermost (`channels_last`), tiles run through the rows, [N * L, C]; elsewhere
the positions of a tile are of one row, [N, C, L]. Offsets within a tile are 32-bit, others 64-bit.

Schedule: each split has one program for every `tiles_per_program` of its tiles, over which its
programs stride. A program finds its split from the row ranges: equal chunks, or `ends` that the
host knows, or, for rows sorted by an index, `bounds` on the device, [S + 1]. `schedule` is a tuple
of encoded numbers: C and L, S, tiles_per_program, and for equal chunks their rows, else the ends.

Sums: each program writes float64 partial sums, and a second kernel adds those of a split in a
fixed order, so that results repeat bit by bit. Kernels that write y or dx walk their tiles in
reverse of those that sum, since what was read last is still in the cache.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Config(NamedTuple):
    """What a kernel is compiled for: nothing that changes with the number of rows below 2^30."""

    acc: tl.dtype  # of accumulation
    index: tl.dtype  # of positions and of offsets within a tile
    channels_last: bool
    align: int  # divides the innermost size, at most 16
    block_p: int
    block_c: int
    block_s: int  # splits, up to a power of two
    shift_tiles: int  # tiles whose mean the sums are shifted by
    num_stages: int  # tiles on their way to shared memory, if more than 1


@triton.jit
def _sizes(schedule, CONFIG):
    """Return C and L. The innermost comes divided, so that the compiler sees its alignment."""
    features, length = _decode(schedule[0]), _decode(schedule[1])
    if CONFIG.channels_last:
        return features * CONFIG.align, length
    return features, length * CONFIG.align


@triton.jit
def _decode(number):
    """Return a number of the schedule, see `_encode`."""
    return (number - 3) // 2


@triton.jit
def _num_tiles(rows, length, CONFIG):
    """Return the number of tiles of so many rows."""
    if CONFIG.channels_last:
        return tl.cdiv(rows * length, CONFIG.block_p)
    return rows * tl.cdiv(length, CONFIG.block_p)


@triton.jit
def _share(split, program, schedule, bounds, length, CONFIG):
    """Return a split, its rows [low, high), its tiles, its first program and its programs.

    If `split` is None, it is that of `program`. A program too many gets no tiles.
    """
    num_splits, per_program = _decode(schedule[2]), _decode(schedule[3])
    if len(schedule) == 5 and bounds is None:
        rows = tl.cast(_decode(schedule[4]), CONFIG.index)
        tiles = _num_tiles(rows, length, CONFIG)
        programs = tl.cdiv(tiles, per_program).to(tl.int32)
        if split is None:
            split = program // programs
        return split, split * rows, split * rows + rows, tiles, split * programs, programs
    splits = tl.arange(0, CONFIG.block_s)
    if bounds is None:
        lows = tl.full([CONFIG.block_s], 0, CONFIG.index)
        highs = tl.full([CONFIG.block_s], 0, CONFIG.index)
        for i in tl.static_range(4, len(schedule)):
            end = tl.cast(_decode(schedule[i]), CONFIG.index)
            highs = tl.where(splits == i - 4, end, highs)
            lows = tl.where((splits == i - 3) & (splits < num_splits), end, lows)
    else:
        lows = tl.load(bounds + splits, splits < num_splits, other=0).to(CONFIG.index)
        highs = tl.load(bounds + splits + 1, splits < num_splits, other=0).to(CONFIG.index)
    tiles = _num_tiles(highs - lows, length, CONFIG)
    programs = tl.cdiv(tiles, per_program).to(tl.int32)
    lasts = tl.cumsum(programs, 0)
    if split is None:
        split = tl.sum((lasts <= program).to(tl.int32), 0)
    own = splits == split
    low, high = tl.sum(tl.where(own, lows, 0), 0), tl.sum(tl.where(own, highs, 0), 0)
    tiles, programs = tl.sum(tl.where(own, tiles, 0), 0), tl.sum(tl.where(own, programs, 0), 0)
    first = tl.sum(tl.where(own, lasts, 0), 0) - programs
    return tl.minimum(split, num_splits - 1), low, high, tiles, first, programs


@triton.jit
def _work(schedule, bounds, CONFIG):
    """Return this program's split, its number, its first feature, (tile, tiles, step) and place."""
    features, length = _sizes(schedule, CONFIG)
    blocks = tl.cdiv(features, CONFIG.block_c)
    program = tl.program_id(0) // blocks
    corner = tl.program_id(0) % blocks * CONFIG.block_c
    split, low, high, tiles, first, programs = _share(
        None, program, schedule, bounds, length, CONFIG
    )
    walk = program - first, tiles, tl.maximum(programs, 1)
    return split, program, corner, walk, (low, high, features, length, corner)


@triton.jit
def _tile(t, place, order, CONFIG):
    """Return a tile's base and offsets in x, its mask [BP, BC], and its number of positions."""
    low, high, features, length, corner = place
    p = tl.arange(0, CONFIG.block_p).to(CONFIG.index)
    c = tl.arange(0, CONFIG.block_c)
    if CONFIG.channels_last:
        start = t * CONFIG.block_p  # in positions of the split
        count = tl.minimum((high - low) * length - start, CONFIG.block_p)
        inside = p < count
        if order is None:
            base = (low * length + start).to(tl.int64) * features + corner
            offsets = p[:, None] * features + c[None, :]
        else:
            p += start % length
            skipped = p // length
            rows = tl.load(order + (low + start // length) + skipped, inside, other=0)
            p += (rows.to(CONFIG.index) - skipped) * length
            base = corner
            offsets = (p.to(tl.int64) * features)[:, None] + c[None, :]
    else:
        blocks = tl.cdiv(length, CONFIG.block_p)
        start = t % blocks * CONFIG.block_p  # in positions of the row
        count = tl.minimum(length - start, CONFIG.block_p).to(CONFIG.index)
        inside = p < count
        row = low + t // blocks
        if order is not None:
            row = tl.load(order + row)
        base = (row.to(tl.int64) * features + corner) * length + start
        offsets = p[:, None] + c[None, :] * length
    return base, offsets, inside[:, None] & (corner + c < features)[None, :], count


@triton.jit
def _shift(x, walk, place, order, CONFIG):
    """Return the mean of the program's first positions, [BC]."""
    total = tl.full([CONFIG.block_p, CONFIG.block_c], 0, CONFIG.acc)
    count = tl.full([], 0, CONFIG.index)
    end = tl.minimum(walk[1], walk[0] + CONFIG.shift_tiles * walk[2])
    for t in tl.range(walk[0], end, walk[2]):
        base, offsets, inside, positions = _tile(t, place, order, CONFIG)
        total += tl.load(x + base + offsets, inside, other=0).to(CONFIG.acc)
        count += positions
    return tl.sum(total, 0) / tl.maximum(count, 1).to(CONFIG.acc)


@triton.jit
def _statistics(moments, split, c, features, eps, CONFIG):
    """Return the mean rounded to `high`, the rest high - mean, invstd and the count."""
    row = moments + split * (2 * features + 1)
    mean = tl.load(row + c, c < features, other=0)
    var = tl.load(row + features + c, c < features, other=0)
    high = mean.to(CONFIG.acc)
    return high, high.to(tl.float64) - mean, tl.rsqrt(var + eps), tl.load(row + 2 * features)


@triton.jit
def _choose(tensors, i):
    """Return the i-th of some pointers."""
    pointer = tensors[0]
    for j in tl.static_range(1, len(tensors)):
        pointer = tl.where(i == j, tensors[j], pointer)
    return pointer


@triton.jit
def _parameter(tensors, split, c, features):
    """Return a split's weight or bias, [BC], from S tensors [C] or from a single one, [S, C]."""
    pointer = tensors[0] + split * features if len(tensors) == 1 else _choose(tensors, split)
    return tl.load(pointer + c, c < features, other=0).to(tl.float64)


@triton.jit
def sums_kernel(
    x, dy, order, moments, partials, eps: tl.float64, schedule, bounds, CONFIG: tl.constexpr
):
    """Sum x and x^2 about a shift over a program's tiles, or with dy, dy and dy * xhat.

    Grid [programs * blocks of features]. x and dy are [N, C, L], or [N, L, C] if channels_last;
    order is [N] or None. With dy, moments is [S, 2C + 1], and a row of partials, [programs, 2C],
    is [sums | sums]; without, it is [sums | sums | shift | count], and moments is None.
    """
    split, program, corner, walk, place = _work(schedule, bounds, CONFIG)
    features, c = place[2], corner + tl.arange(0, CONFIG.block_c)
    if dy is None:
        high = _shift(x, walk, place, order, CONFIG)
    else:
        high, rest, invstd, _ = _statistics(moments, split, c, features, eps, CONFIG)
    total = tl.full([CONFIG.block_p, CONFIG.block_c], 0, CONFIG.acc)
    products = tl.full([CONFIG.block_p, CONFIG.block_c], 0, CONFIG.acc)
    count = tl.full([], 0, CONFIG.index)
    for t in tl.range(walk[0], walk[1], walk[2], num_stages=CONFIG.num_stages):
        base, offsets, inside, positions = _tile(t, place, order, CONFIG)
        centred = tl.load(x + base + offsets, inside, other=0).to(CONFIG.acc) - high[None, :]
        if dy is None:
            centred = tl.where(inside, centred, 0.0)
            value = centred
            count += positions
        else:
            value = tl.load(dy + base + offsets, inside, other=0).to(CONFIG.acc)
        total += value
        products += value * centred
    total = tl.sum(total.to(tl.float64), 0)
    products = tl.sum(products.to(tl.float64), 0)
    if dy is None:
        partials += program.to(tl.int64) * (3 * features + 1)
        tl.store(partials + 2 * features + c, high.to(tl.float64), c < features)
        tl.store(partials + 3 * features, count.to(tl.float64))
    else:
        partials += program.to(tl.int64) * (2 * features)
        products = (products + rest * total) * invstd
    tl.store(partials + c, total, c < features)
    tl.store(partials + features + c, products, c < features)


@triton.jit
def total_kernel(
    partials, out, schedule, bounds, OF_DY: tl.constexpr, AS_MOMENTS: tl.constexpr,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """Sum what the programs of a split summed, in their order; grid [S * blocks of features].

    partials is as in `sums_kernel`; out is [S, 2C] OF_DY, else sums or moments, [S, 2C + 1].
    """
    features, length = _sizes(schedule, CONFIG)
    blocks = tl.cdiv(features, 16)
    c = tl.program_id(0) % blocks * 16 + tl.arange(0, 16)
    split, low, high, _, first, programs = _share(
        tl.program_id(0) // blocks, None, schedule, bounds, length, CONFIG
    )
    width = 2 * features if OF_DY else 3 * features + 1
    partials += first.to(tl.int64) * width
    # Sums are carried from the shifts to one origin: 0, or for moments, a value of the split, about
    # which float64 loses no digit of its own.
    origin = tl.full([16], 0, tl.float64)
    if AS_MOMENTS:
        inside = c < tl.where(programs > 0, features, 0)
        origin = tl.load(partials + 2 * features + c, inside, other=0)
    totals = tl.full([64, 16], 0, tl.float64)
    products = tl.full([64, 16], 0, tl.float64)
    for start in range(0, programs, 64):
        program = start + tl.arange(0, 64)
        here = (program < programs)[:, None] & (c < features)[None, :]
        row = partials + program.to(tl.int64)[:, None] * width
        total = tl.load(row + c[None, :], here, other=0)
        product = tl.load(row + features + c[None, :], here, other=0)
        if not OF_DY:
            shift = tl.load(row + 2 * features + c[None, :], here, other=0) - origin[None, :]
            around = tl.load(row + 3 * features, (program < programs)[:, None], other=0) * shift
            product += shift * (2 * total + around)
            total += around
        totals += total
        products += product
    total, product = tl.sum(totals, 0), tl.sum(products, 0)
    count = ((high - low) * length).to(tl.float64)
    if AS_MOMENTS:
        total, product = _mean_and_var(total, product, count)
        total += origin
    out += split.to(tl.int64) * (2 * features if OF_DY else 2 * features + 1)
    tl.store(out + c, total.to(out.dtype.element_ty), c < features)
    tl.store(out + features + c, product.to(out.dtype.element_ty), c < features)
    if not OF_DY:
        tl.store(out + 2 * features, count)


@triton.jit
def _mean_and_var(total, squares, count):
    """Return the mean and the biased variance, 0 of an empty split."""
    mean = total / tl.maximum(count, 1.0)
    var = squares / tl.maximum(count, 1.0) - mean * mean
    # A maximum would turn NaN into 0.
    return mean, tl.where(var < 0, 0.0, var)


@triton.jit
def apply_kernel(
    x, dy, out, order, moments, weights, biases, sums, eps: tl.float64, schedule, bounds,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """Write a program's tiles of y, or with dy, of dx; grid [programs * blocks of features].

    x, dy and out are [N, C, L], or [N, L, C] if channels_last; order is [N] or None; moments is
    [S, 2C + 1]; weights and biases are as in `_parameter`, or None; sums is [S, 2C] with dy.
    """
    split, _, corner, walk, place = _work(schedule, bounds, CONFIG)
    features, c = place[2], corner + tl.arange(0, CONFIG.block_c)
    high, rest, invstd, count = _statistics(moments, split, c, features, eps, CONFIG)
    scale = invstd
    if weights is not None:
        scale *= _parameter(weights, split, c, features)
    # The result is (x - high) * slope + offset, and with dy, + dy * scale.
    slope = scale
    if dy is not None:
        sums += split * (2 * features) + c
        count = tl.maximum(count, 1.0)
        mean_dy = tl.load(sums, c < features, other=0).to(tl.float64) / count
        mean_dy_xhat = tl.load(sums + features, c < features, other=0).to(tl.float64) / count
        slope = -scale * invstd * mean_dy_xhat
    offset = slope * rest
    if dy is not None:
        offset -= scale * mean_dy
    elif biases is not None:
        offset += _parameter(biases, split, c, features)
    scale, slope, offset = scale.to(CONFIG.acc), slope.to(CONFIG.acc), offset.to(CONFIG.acc)
    for t in tl.range(walk[0], walk[1], walk[2], num_stages=CONFIG.num_stages):
        base, offsets, inside, _positions = _tile(walk[1] - 1 - t, place, order, CONFIG)
        centred = tl.load(x + base + offsets, inside, other=0).to(CONFIG.acc) - high[None, :]
        value = tl.fma(centred, slope[None, :], offset[None, :])
        if dy is not None:
            upstream = tl.load(dy + base + offsets, inside, other=0).to(CONFIG.acc)
            value = tl.fma(upstream, scale[None, :], value)
        tl.store(out + base + offsets, value.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["features"])
def moments_kernel(sums, moments, features, BLOCK: tl.constexpr):
    """Turn sums into moments, both [S, 2C + 1]; grid [S * blocks of features]."""
    blocks = tl.cdiv(features, BLOCK)
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64) * (2 * features + 1)
    sums, moments = sums + row, moments + row
    count = tl.load(sums + 2 * features)
    total = tl.load(sums + c, c < features, other=0)
    squares = tl.load(sums + features + c, c < features, other=0)
    mean, var = _mean_and_var(total, squares, count)
    tl.store(moments + c, mean, c < features)
    tl.store(moments + features + c, var, c < features)
    tl.store(moments + 2 * features, count)


@triton.jit(do_not_specialize=["features"])
def running_kernel(
    moments, means, variances, counters, features, momentum: tl.float64, AVERAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Move the running statistics of a split; grid [S].

    moments is [S, 2C + 1]; means and variances are S tensors [C], counters S tensors [] or None.
    """
    split, step = tl.program_id(0), momentum
    row = moments + split * (2 * features + 1)
    count = tl.load(row + 2 * features)
    if counters is not None:
        counter = _choose(counters, split)
        counted = tl.load(counter) + (count >= 1).to(tl.int64)
        tl.store(counter, counted)
        if AVERAGE:
            step = 1 / tl.maximum(counted, 1).to(tl.float64)
    correction = count / tl.maximum(count - 1, 1.0)
    mean, var = _choose(means, split), _choose(variances, split)
    for start in range(0, features, BLOCK):
        c = start + tl.arange(0, BLOCK)
        _average(mean + c, row + c, 1.0, step, c < tl.where(count >= 1, features, 0))
        own = c < tl.where(count >= 2, features, 0)
        _average(var + c, row + features + c, correction, step, own)


@triton.jit
def _average(pointers, targets, factor, step, mask):
    """Move values in place to factor * targets, by a step from 0 to 1."""
    # The interpreter converts bfloat16 to and from float32 alone.
    dtype = pointers.dtype.element_ty
    wide: tl.constexpr = tl.float32 if dtype == tl.bfloat16 else tl.float64
    before = tl.load(pointers, mask, other=0).to(wide).to(tl.float64)
    after = tl.load(targets, mask, other=0) * factor
    # Not by the difference of both: infinity would become NaN.
    value = (1 - step) * before + step * after
    tl.store(pointers, value.to(wide).to(dtype), mask)

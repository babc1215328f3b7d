# ruff: noqa: N803 - constexpr parameters are upper case, as everywhere in Triton
"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter on the CPU."""

import importlib.util
import math
import os
import sys

import oracle
import pytest
import torch
from ranks import Collectives, run_ranks
from torch.utils.checkpoint import checkpoint

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip(
            "no CUDA device, and Triton was imported without TRITON_INTERPRET=1",
            allow_module_level=True,
        )
    os.environ["TRITON_INTERPRET"] = "1"
triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = triton.language

import sync_splitbn._kernels  # noqa: E402 - after the interpreter is chosen
from sync_splitbn import SyncSplitBatchNorm, assign_splits, sync_split_batch_norm  # noqa: E402
from sync_splitbn._kernels import aten, triton_jit  # noqa: E402
from sync_splitbn._kernels import triton as kernels  # noqa: E402
from sync_splitbn._moments import Moments  # noqa: E402

# The interpreter of Triton 3.6 takes scalars from arrays as NumPy will no longer allow.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")


def on_gpu(test):
    """Mark a test of what no interpreter can show."""
    return pytest.mark.gpu(pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")(test))


SHAPES = [
    (12, 5),
    (12, 70),
    (12, 5, 1),
    (12, 5, 7),
    (12, 65, 3, 2),
    (12, 1, 4),
    (12, 3, 2, 3, 2),
    (12, 3, 10, 26),
]
SPLITS = {
    "equal": (4, 4, 4),
    "uneven": (1, 8, 3),
    "two empty": (0, 12, 0),
    "index": torch.tensor([2, 0, 1, 1, 0, 2, 2, 2, 0, 1, 1, 1]),
    "index without 1": torch.tensor([2, 0, 0, 2, 2, 2, 2, 0, 0, 0, 0, 2]),
}
LAYOUTS = pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
# Of the largest value: rounding of the type, some times over.
CLOSE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 1.6e-2,
    torch.float16: 2e-3,
}


@pytest.fixture(autouse=True)
def several_tiles_a_program(monkeypatch):
    monkeypatch.setattr(kernels, "_num_programs", lambda device: 4)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Have new memory hold NaN, so that what is not written shows."""

    def poisoned(empty):
        def filled(*args, **kwargs):
            memory = empty(*args, **kwargs)
            return memory.fill_(float("nan")) if memory.is_floating_point() else memory

        return filled

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def features_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def batch(shape, dtype=torch.float32, last=False, mean=1.0):
    """Return x and dy, of which dy has something to do with x."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    dy = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5 * x
    x, dy = ((t.to(dtype)).to(DEVICE) for t in (2 * x + mean, dy))
    return (features_last(x), features_last(dy)) if last else (x, dy)


def affine_of(features, dtype=torch.float32, num_splits=3):
    """Return weights, biases and eps."""
    generator = torch.Generator().manual_seed(1)
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = torch.rand(2, num_splits, features, generator=generator).to(DEVICE, wide)
    return [*weight + 0.5], [*bias - 0.5], 1e-3


def splits_of(name):
    splits = SPLITS[name]
    return splits.to(DEVICE) if isinstance(splits, torch.Tensor) else splits


def rows_of(splits):
    """Return the index and the sizes as kernels take them, of which one is None."""
    return (splits, None) if isinstance(splits, torch.Tensor) else (None, splits)


def assert_near(value, truth, tolerance=None, size=1.0):
    """Compare within the rounding of the largest value, or of the `size` of what cancelled."""
    assert value.dtype == truth.dtype
    assert value.shape == truth.shape
    if truth.numel():
        worst = (value.double() - truth.double()).abs().max() / truth.abs().max().clamp(min=size)
        assert worst < (tolerance or CLOSE[value.dtype]), worst.item()


def run_all(kernels, x, dy, splits, affine, moments=None, sums=None, num_splits=3):
    """Return sums, moments, y, sums of dy, dx, the latter three for given moments and sums."""
    rows, (weights, _, eps) = rows_of(splits), affine
    found = kernels.sums(x, *rows, num_splits)
    own = kernels.moments(found)
    moments = own if moments is None else moments
    y = kernels.normalize(x, *rows, moments, *affine)
    local = kernels.grad_sums(dy, x, *rows, moments, eps)
    sums = local if sums is None else sums
    dx = kernels.grad_input(dy, x, *rows, moments, weights, eps, sums)
    return found, own, y, local, dx


def run_alone(kernels, x, dy, splits, affine, num_splits=3):
    """Return moments, y, sums of dy and dx of a rank without others."""
    rows, (weights, _, eps) = rows_of(splits), affine
    y, moments = kernels.normalize_batch(x, *rows, num_splits, *affine)
    dx, local = kernels.grad_batch(dy, x, *rows, moments, weights, eps)
    return moments, y, local, dx


def assert_as_aten(x, dy, splits, num_splits=3):
    affine = affine_of(x.shape[1], x.dtype, num_splits)
    truth = run_all(aten, x, dy, splits, affine, num_splits=num_splits)
    ours = run_all(kernels, x, dy, splits, affine, truth[1], truth[3], num_splits)
    tight = 1e-12 if x.dtype == torch.float64 else 1e-6
    tolerances = (tight, tight, None, None, None)
    for value, expected, tolerance in zip(ours, truth, tolerances, strict=True):
        assert_near(value, expected, tolerance)
    alone = run_alone(kernels, x, dy, splits, affine, num_splits)
    for value, expected, tolerance in zip(alone, truth[1:], tolerances[1:], strict=True):
        assert_near(value, expected, tolerance)
    if x.is_contiguous() or x.movedim(1, -1).is_contiguous():
        assert ours[2].stride() == ours[4].stride() == x.stride()


@pytest.mark.parametrize(
    ("splits", "last"),
    [("uneven", False), ("index", False), ("equal", True), ("index", True)],
    ids=["first, sizes", "first, index", "last, equal", "last, index"],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_equal_aten_in_every_shape(shape, splits, last):
    assert_as_aten(*batch(shape, last=last and len(shape) > 2), splits_of(splits))


@LAYOUTS
@pytest.mark.parametrize("splits", ["two empty", "index without 1"])
def test_kernels_equal_aten_where_splits_are_empty(splits, last):
    assert_as_aten(*batch((12, 5, 3, 4), last=last), splits_of(splits))


@LAYOUTS
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("shape", [(12, 24, 5, 4), (12, 7, 7, 7)], ids=str)
def test_kernels_equal_aten_in_every_type(shape, dtype, last):
    assert_as_aten(*batch(shape, dtype, last), (5, 0, 7))


@pytest.mark.parametrize("how", ["every other", "expanded", "rows swapped with features", "offset"])
def test_inputs_of_any_strides_are_taken(how):
    x = {
        "every other": batch((12, 10, 7, 9))[0][:, ::2, ::2, ::3],
        "expanded": batch((12, 5, 1))[0].expand(-1, -1, 7),
        "rows swapped with features": batch((5, 12, 7))[0].transpose(0, 1),
        "offset": batch((13, 5, 7))[0][1:],
    }[how]
    assert_as_aten(x, batch(x.shape)[1], (5, 0, 7))


@LAYOUTS
def test_gradient_in_another_layout_gives_the_same_bits(last):
    x, dy = batch((12, 5, 3, 4), last=last)
    other = dy.contiguous() if last else features_last(dy)
    expanded = dy[:, :, :1, :1].expand(dy.shape)
    affine = affine_of(5)
    for a, b in ((dy, other), (expanded, expanded.contiguous())):
        ours, theirs = (run_all(kernels, x, g, (5, 0, 7), affine) for g in (a, b))
        assert all(s.equal(t) for s, t in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("last", "splits"), [(False, "uneven"), (True, "index")], ids=["first, sizes", "last, index"]
)
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_forward_and_backward_equal_the_definition(dtype, last, splits):
    x, dy = batch((12, 5, 3, 7), dtype, last)
    splits, affine = splits_of(splits), affine_of(5, dtype)
    _, values, y, sums, dx = (t.cpu() for t in run_all(kernels, x, dy, splits, affine))
    state = oracle.State.initial(1, 3, 5)
    state.weight, state.bias = (
        torch.stack(p).double().cpu().unsqueeze(0).requires_grad_() for p in affine[:2]
    )
    wide, upstream = x.double().cpu().requires_grad_(), dy.double().cpu()
    if isinstance(splits, torch.Tensor):
        ids = splits.cpu()
    else:
        ids = torch.arange(3).repeat_interleave(torch.tensor(splits))
    truth = oracle.forward(wide, ids, torch.zeros_like(ids), state, eps=affine[2])
    truth.backward(upstream)
    dbias, dweight = sums.chunk(2, dim=1)
    assert_near(y, truth.detach().to(dtype))
    assert_near(dx, wide.grad.to(dtype))
    assert_near(dbias, state.bias.grad[0].to(sums.dtype))
    assert_near(dweight, state.weight.grad[0].to(sums.dtype))
    means, variances = torch.tensor([[[0.0] * 5] * 3, [[1.0] * 5] * 3]).double().to(DEVICE)
    kernels.update_running_stats([*means], [*variances], [], 0.1, values.to(DEVICE))
    assert_near(means.cpu(), state.running_mean, CLOSE[sums.dtype])
    assert_near(variances.cpu(), state.running_var, CLOSE[sums.dtype])


@LAYOUTS
@pytest.mark.parametrize("splits", ["uneven", "index"])
def test_kernels_hold_far_from_the_origin(last, splits):
    """The mean is 1e4 standard deviations: E[x^2] - E[x]^2 in float32 is off by 23 variances."""
    x, dy = batch((12, 5, 7, 7), last=last, mean=2e4)
    splits, affine = splits_of(splits), affine_of(5)
    _, values, y, _, dx = run_all(kernels, x, dy, splits, affine)
    truth = run_all(aten, x.double(), dy.double(), splits, affine)
    var, exact = Moments(values).var, Moments(truth[1]).var
    assert ((var - exact).abs() / exact).max() < 1e-6
    assert_near(y, truth[2].float(), 1e-5)
    assert_near(dx, truth[4].float(), 1e-5)


@LAYOUTS
def test_variance_of_float64_on_one_rank_is_taken_about_the_mean(last):
    """At mean/std of 1e7, squares about 0 are 1e14 variances, of which float64 has 16 digits."""
    x, _ = batch((12, 5, 7, 7), torch.float64, last, mean=2e7)
    exact = (x - 2e7).flatten(2).unflatten(0, (3, 4)).movedim(2, 1).flatten(2).var(2, correction=0)
    _, values = kernels.normalize_batch(x, None, (4, 4, 4), 3, [], [], 1e-5)
    assert ((Moments(values).var - exact).abs() / exact).max() < 1e-13


@LAYOUTS
@pytest.mark.parametrize("outlier", [1e3, 1e4])
@pytest.mark.parametrize("shape", [(24, 5, 40, 40), (96, 64, 2), (240, 130)], ids=str)
def test_outlier_in_the_corner_of_every_tile_does_not_cost_the_variance(shape, outlier, last):
    """Sums about an outlier are large, and what is left of them has few digits."""
    x, _ = batch(shape, last=last and len(shape) > 2)
    flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    last = not x.is_contiguous() or flat.shape[2] == 1
    config = kernels._plan((*shape[:2], flat.shape[2]), (len(x),), 1, x.dtype, last, 4, 2, 3)[2]
    x = x.clone(memory_format=torch.preserve_format)
    rows = x.movedim(1, -1).reshape(-1, shape[1]) if last else x.view(len(x), shape[1], -1)
    corners = rows[:: config.block_p] if last else rows[:, :, :: config.block_p]
    corners += 2 * outlier
    if last:
        x = rows.view(x.movedim(1, -1).shape).movedim(-1, 1)
    var = Moments(kernels.moments(kernels.sums(x, None, (len(x),), 1))).var
    exact = x.double().transpose(0, 1).flatten(1).var(1, correction=0)
    assert ((var - exact).abs() / exact).max() < 1e-6


@LAYOUTS
def test_single_outlier_where_a_program_begins_does_not_cost_the_variance(last):
    x, _ = batch((24, 5, 40, 40), last=last)
    x[0, :, 0, 0] += 2e3
    var = Moments(kernels.moments(kernels.sums(x, None, (24,), 1))).var
    exact = x.double().transpose(0, 1).flatten(1).var(1, correction=0)
    assert ((var - exact).abs() / exact).max() < 1e-6


@LAYOUTS
def test_splits_far_from_each_other_are_shifted_by_their_own_rows(last):
    x, _ = batch((12, 5, 7, 7), last=last)
    x += 2e4 * (SPLITS["index"] == 1).to(DEVICE).view(12, 1, 1, 1)
    index = splits_of("index")
    ours, truth = (Moments(k.moments(k.sums(x, index, None, 3))).var for k in (kernels, aten))
    assert ((ours - truth).abs() / truth).max() < 1e-6


def test_mean_that_the_type_cannot_hold_is_not_rounded():
    """At 2^24 the step of float32 is 2: half the rows are there, half a step above."""
    x = torch.full((8, 3, 4), 2.0**24, device=DEVICE)
    x[::2] += 2
    x[0] += 2
    _, dy = batch(x.shape)
    affine = affine_of(3, num_splits=1)
    truth = run_all(aten, x.double(), dy.double(), (8,), affine, num_splits=1)
    ours = run_all(kernels, x, dy, (8,), affine, truth[1], truth[3].float(), 1)
    for value, expected in zip(ours[2:], truth[2:], strict=True):
        assert_near(value, expected.float(), 2e-6)


def test_constant_far_away_has_no_negative_variance():
    """Rounding of E[x^2] - E[x]^2 may fall on either side of 0."""
    values = torch.linspace(1e5, 2e5, 40, dtype=torch.float64, device=DEVICE)
    x = values.view(1, 40, 1).expand(7, 40, 3).contiguous()
    sums = kernels.sums(x, None, (7,), 1)
    mean, square = sums[:, :-1].div(21).chunk(2, dim=1)
    assert (square < mean.square()).any(), "a test without a negative variance is none"
    assert (Moments(kernels.moments(sums)).var >= 0).all()


def test_nan_stays_in_its_split_and_channel():
    for splits in ((2, 2, 0), torch.tensor([1, 0, 1, 0], device=DEVICE)):
        x, dy = batch((4, 3, 9))
        x[0, 1, 0] = float("nan")
        rows = slice(0, 2) if isinstance(splits, tuple) else slice(0, 4, 2)
        split = 0 if isinstance(splits, tuple) else 1
        for values, y, sums, dx in (
            run_all(kernels, x, dy, splits, affine_of(3))[1:],
            run_alone(kernels, x, dy, splits, affine_of(3)),
        ):
            assert values[split, [1, 4]].isnan().all()
            assert values.isnan().sum() == 2
            assert sums.isnan().sum() == 1
            for result in (y, dx):
                assert result.isnan().sum() == 18
                assert result[rows, 1].isnan().all()


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2, 2), (6, 3, 0)], ids=str)
def test_empty_tensors_are_taken(shape):
    x = torch.zeros(shape, device=DEVICE)
    n = shape[0] // 3
    for splits in ((n, n, n), torch.arange(shape[0], device=DEVICE) % 3):
        none = [], [], 1e-5
        sums, values, y, local, dx = run_all(kernels, x, x, splits, none)
        assert sums.equal(torch.zeros(3, 7, dtype=torch.float64, device=DEVICE))
        assert values.equal(sums)
        assert local.equal(torch.zeros(3, 6, device=DEVICE))
        assert y.shape == dx.shape == shape
        assert run_alone(kernels, x, x, splits, none)[0].equal(values)


def test_parameters_may_be_shared_or_strided_or_missing_or_of_mixed_types():
    x, dy = batch((12, 5, 7))
    (weights, biases, _), wide = affine_of(5, num_splits=1), affine_of(10)
    for affine in (
        (weights * 3, biases * 3, 1e-3),
        ([w[::2] for w in wide[0]], [b[5:] for b in wide[1]], 1e-3),
        ([weights[0], *(w[:5].double() for w in wide[0][1:])], [], 1e-3),
        ([], biases * 3, 1e-3),
        ([], [], 0.5),
    ):
        truth = run_all(aten, x, dy, (5, 0, 7), affine)
        ours = run_all(kernels, x, dy, (5, 0, 7), affine)
        for value, expected in zip(ours[2:], truth[2:], strict=True):
            assert_near(value, expected)


def test_index_may_be_strided():
    strided = splits_of("index").repeat_interleave(2)[::2]
    assert not strided.is_contiguous()
    assert_as_aten(*batch((12, 5, 7)), strided)


@LAYOUTS
@pytest.mark.parametrize("how", ["equal", "sizes", "index"])
def test_splits_beyond_a_kernels_arguments_are_taken(how, last, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_SIZES", 4)
    monkeypatch.setattr(kernels, "MAX_POINTERS", 4)
    sizes = (2, 0, 5, 1, 0, 4)
    x, dy = batch((12, 5, 7), last=last)
    ids = torch.arange(6).repeat_interleave(torch.tensor(sizes)).flip(0).to(DEVICE)
    splits = {"equal": (2,) * 6, "sizes": sizes, "index": ids}[how]
    assert_as_aten(x, dy, splits, num_splits=6)


def test_hundreds_of_splits_are_taken():
    sizes = tuple(2 if i % 50 == 7 else 0 for i in range(260))
    x, _ = batch((sum(sizes), 3))
    ours, truth = (k.sums(x, None, sizes, len(sizes)) for k in (kernels, aten))
    assert_near(ours, truth, 1e-6)


@pytest.mark.parametrize("splits", ["uneven", "index"])
def test_same_call_gives_the_same_bits(splits):
    x, dy = batch((12, 5, 3, 7) if DEVICE == "cpu" else (12, 70, 99, 99))
    first, second = (
        run_all(kernels, x, dy, splits_of(splits), affine_of(x.shape[1])) for _ in range(2)
    )
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("last", "indexed"), [(False, True), (True, True), (True, False)])
def test_each_program_reads_only_the_rows_of_its_split(last, indexed):
    """With NaN in all other rows, a split is what it is without them."""
    x, _ = batch((12, 5, 7), last=last)
    for split in range(3):
        splits = splits_of("index" if indexed else "uneven")
        ids = splits if indexed else torch.arange(3).repeat_interleave(torch.tensor(splits))
        own = (ids.to(DEVICE) == split).view(12, 1, 1)
        poisoned = torch.where(own, x, float("nan"))
        sums, truth = (kernels.sums(t, *rows_of(splits), 3) for t in (poisoned, x))
        assert sums[split].equal(truth[split])


@triton.jit
def offsets_kernel(out, t, schedule, CONFIG: tl.constexpr):
    """Store what tile `t` addresses, [BP, BC]."""
    _, _, _, _, place = triton_jit._work(schedule, None, CONFIG)
    base, offsets, _inside, _count = triton_jit._tile(
        t.to(CONFIG.index) + tl.program_id(0), place, None, CONFIG
    )
    p, c = tl.arange(0, CONFIG.block_p)[:, None], tl.arange(0, CONFIG.block_c)[None, :]
    tl.store(out + p * CONFIG.block_c + c, base + offsets.to(tl.int64))


@LAYOUTS
@pytest.mark.parametrize(
    "shape", [(7, 60_000, 40_000), (7, 40, 400_000_000), (50_000, 70_000, 1)], ids=str
)
def test_offsets_pass_2_to_the_31(shape, last):
    rows, features, length = shape
    last = last or length == 1
    _, schedule, config = kernels._plan(shape, (rows,), 1, torch.float32, last, 8, 1, 1)
    bp, bc = config.block_p, config.block_c
    tiles = -(-rows * length // bp) if last else rows * -(-length // bp)
    offsets = torch.zeros(bp, bc, dtype=torch.int64, device=DEVICE)
    offsets_kernel[(1,)](offsets, tiles - 1, schedule, config)
    begin = (tiles - 1) * bp % (-(-length // bp) * bp) if not last else (tiles - 1) * bp
    p, c = begin + torch.arange(bp).unsqueeze(1), torch.arange(bc)
    expected = p * features + c if last else ((rows - 1) * features + c) * length + p
    assert offsets.cpu().equal(expected)
    assert offsets.min() > 2**31


def running_of(dtype, num_splits=3, features=5, strided=False):
    """Return means, variances and counters."""
    generator = torch.Generator().manual_seed(2)
    step = 2 if strided else 1
    values = torch.rand(2, num_splits, step * features, generator=generator).to(DEVICE, dtype)
    means, variances = ([row[::step] for row in half] for half in values)
    counters = [torch.tensor(3 * i, device=DEVICE) for i in range(num_splits)]
    return means, variances, counters


@pytest.mark.parametrize("momentum", [0.1, 0.9, 0, 1, None])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("num_splits", [3, 20])
def test_running_stats_follow_as_in_aten(num_splits, dtype, momentum):
    values = torch.rand(num_splits, 11, dtype=torch.float64, device=DEVICE)
    values[:, -1] = torch.tensor([0, 1, 7] * num_splits)[:num_splits]
    ours, truth = (running_of(dtype, num_splits) for _ in range(2))
    kernels.update_running_stats(*ours, momentum, values)
    aten.update_running_stats(*truth, momentum, values)
    # The interpreter cuts bfloat16 where a GPU rounds it.
    tolerance = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(dtype, 1e-7)
    for kind, expected in zip(ours, truth, strict=True):
        for a, b in zip(kind, expected, strict=True):
            assert_near(a, b, tolerance if a.is_floating_point() else 0.5)


def test_infinite_running_stats_stay_infinite():
    moments = torch.tensor([[2.0, 3.0, 4.0, 9.0, 4.0]], device=DEVICE).double()
    mean = torch.tensor([0.0, -math.inf], device=DEVICE)
    var = torch.tensor([math.inf, 1.0], device=DEVICE)
    kernels.update_running_stats([mean], [var], [], 0.25, moments)
    torch.testing.assert_close(mean.cpu(), torch.tensor([0.5, -math.inf]))
    torch.testing.assert_close(var.cpu(), torch.tensor([math.inf, 3.75]))


def test_running_stats_of_an_empty_split_stay_and_one_element_moves_no_variance():
    values = torch.full((3, 11), 0.5, dtype=torch.float64, device=DEVICE)
    values[:, -1] = torch.tensor([0, 1, 2])
    running, before = running_of(torch.float32), running_of(torch.float32)
    kernels.update_running_stats(*running, 0.1, values)
    moved = [
        [not a.equal(b) for a, b in zip(kind, old, strict=True)]
        for kind, old in zip(running, before, strict=True)
    ]
    assert moved == [[False, True, True], [False, False, True], [False, True, True]]


@pytest.mark.parametrize("momentum", [0.25, None])
def test_running_stats_may_be_strided_or_mixed_and_counters_missing(momentum):
    values = torch.rand(3, 11, dtype=torch.float64, device=DEVICE) + 2
    for strided, mixed, counted in (
        (True, False, True),
        (False, True, True),
        (False, False, False),
    ):
        ours, truth = (running_of(torch.float32, strided=strided) for _ in "ab")
        for means, _, counters in (ours, truth):
            means[1] = means[1].double() if mixed else means[1]
            del counters[3 if counted else 0 :]
        kernels.update_running_stats(*ours, momentum, values)
        if momentum is None and not counted:
            # As plain batch norm, which then averages nothing.
            assert ours[0][0].equal(truth[0][0])
            continue
        aten.update_running_stats(*truth, momentum, values)
        for kind, expected in zip(ours, truth, strict=True):
            for a, b in zip(kind, expected, strict=True):
                assert_near(a, b, 1e-7)


class Guarded:
    """Tensors inside larger allocations; what lies around them must be neither read nor written."""

    def __init__(self):
        self.whole = []

    def __call__(self, tensor, margin=64):
        """Return a copy with the same strides, in the middle of poison."""
        size = tensor.untyped_storage().nbytes() // tensor.itemsize
        poison = float("nan") if tensor.is_floating_point() else 2**40
        memory = torch.full((size + 2 * margin,), poison, dtype=tensor.dtype, device=DEVICE)
        inner = memory[margin : margin + size].as_strided(tensor.shape, tensor.stride(), margin)
        inner.copy_(tensor)
        self.whole.append((memory, size, margin))
        return inner

    def assert_untouched(self):
        for memory, size, margin in self.whole:
            around = torch.cat([memory[:margin], memory[margin + size :]])
            assert (around.isnan() if memory.is_floating_point() else around == 2**40).all()


@LAYOUTS
@pytest.mark.parametrize(
    ("shape", "splits"),
    [((12, 5, 3, 7), "uneven"), ((12, 5, 3, 7), "index"), ((12, 24, 4, 4), "equal")],
    ids=["sizes", "index", "equal, aligned"],
)
def test_memory_around_all_tensors_is_neither_read_nor_written(shape, splits, last, monkeypatch):
    x, dy = batch(shape, last=last)
    affine, plain, features = affine_of(shape[1]), splits_of(splits), shape[1]
    expected = run_all(kernels, x, dy, plain, affine)
    guard = Guarded()
    for owner, name in ((torch, "empty_like"), (torch.Tensor, "new_empty")):
        empty = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, empty=empty, **k: guard(empty(*a, **k)))
    x, dy = guard(x), guard(dy)
    rows = guard(plain) if isinstance(plain, torch.Tensor) else plain
    weights, biases = ([guard(p) for p in kind] for kind in affine[:2])
    affine = weights, biases, affine[2]
    found = run_all(kernels, x, dy, rows, affine)
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
    alone = run_alone(kernels, x, dy, rows, affine)
    assert not any(result.isnan().any() for result in alone)
    running = running_of(torch.float32, features=features)
    running = [[guard(t) for t in kind] for kind in running]
    kernels.update_running_stats(*running, 0.1, found[1])
    assert not any(t.isnan().any() for kind in running[:2] for t in kind)
    guard.assert_untouched()


MISTAKES = {
    "dy of another shape": ("dy must have shape", {"dy": (12, 5, 8)}),
    "index of another length": ("index must have shape", {"splits": torch.zeros(11).long()}),
    "sizes of another sum": (
        "sizes must be those of 3 splits and sum to 12",
        {"splits": (4, 4, 5)},
    ),
    "sizes below 0": ("sizes must be those of 3 splits", {"splits": (-1, 6, 7)}),
    "sizes of other splits": ("sizes must be those of 3 splits", {"splits": (6, 6)}),
    "weight of another length": ("weight must have shape", {"weight": (4,)}),
    "weights of fewer splits": ("weight must be given for 3 splits", {"count": 2}),
    "weight elsewhere": ("weight must be on the device", {"weight_device": "meta"}),
    "dy elsewhere": ("dy must have shape", {"dy_device": "meta"}),
    "moments of other features": ("moments must have shape", {"moments": (3, 9)}),
    "sums of other features": ("sums must have shape", {"sums": (3, 12)}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_shapes_lengths_and_devices_are_refused(mistake):
    message, wrong = MISTAKES[mistake]
    x = torch.zeros(12, 5, 7, device=DEVICE)
    dy = torch.zeros(wrong.get("dy", x.shape), device=wrong.get("dy_device", DEVICE))
    device = wrong.get("weight_device", DEVICE)
    weights = [torch.ones(wrong.get("weight", (5,)), device=device)] * wrong.get("count", 3)
    moments = torch.zeros(wrong.get("moments", (3, 11)), dtype=torch.float64, device=DEVICE)
    sums = torch.zeros(wrong.get("sums", (3, 10)), device=DEVICE)
    splits = wrong.get("splits", (4, 4, 4))
    splits = splits.to(DEVICE) if isinstance(splits, torch.Tensor) else splits
    with pytest.raises((RuntimeError, ValueError), match=message):
        kernels.grad_input(dy, x, *rows_of(splits), moments, weights, 1e-5, sums)


def test_wrong_running_stats_and_types_are_refused():
    moments = torch.zeros(3, 11, dtype=torch.float64, device=DEVICE)
    means, variances, counters = running_of(torch.float32)
    for wrong, message in (
        ((means[:2], variances, counters), "running_mean must be given for 3 splits"),
        ((means, [v[:4] for v in variances], counters), "running_var must have shape"),
        ((means, variances, [c.view(1) for c in counters]), "num_batches_tracked must"),
        (([m.to("meta") for m in means], variances, counters), "running_mean must be on"),
    ):
        with pytest.raises(RuntimeError, match=message):
            kernels.update_running_stats(*wrong, 0.1, moments)
    x = torch.zeros(12, 5, device=DEVICE)
    with pytest.raises(TypeError, match="moments must be float64, got"):
        kernels.normalize(x, None, (4, 4, 4), moments.float(), *affine_of(5))
    with pytest.raises(RuntimeError, match="got no Triton kernels for"):
        kernels.sums(x.to(torch.float8_e5m2), None, (4, 4, 4), 3)


@pytest.fixture
def compiled_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    kernels._unavailable.cache_clear()
    yield
    kernels._unavailable.cache_clear()


def test_cpu_tensors_are_refused_outside_the_interpreter(compiled_kernels):
    x = torch.zeros(3, 2)
    assert kernels.unavailable(x) == "no Triton kernels for device cpu"
    with pytest.raises(RuntimeError, match="impl='triton' must be able to serve the input, got no"):
        kernels.sums(x, None, (1, 1, 1), 3)


@pytest.mark.parametrize(
    ("capability", "compiler", "reason"),
    [
        ((7, 5), "gcc", "a GPU of compute capability below 8.0"),
        ((8, 0), None, "no C compiler, which Triton needs to launch kernels; set CC"),
        ((9, 0), "clang", None),
    ],
)
def test_old_gpus_and_missing_compilers_are_told(
    compiled_kernels, monkeypatch, capability, compiler, reason
):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: name if name == compiler else None)
    assert kernels._unavailable(torch.device("cuda", 0), torch.float32) == reason


def test_import_without_triton_is_an_import_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("sync_splitbn._kernels.again", kernels.__file__)
    with pytest.raises(ImportError, match="triton"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.fixture
def everywhere(monkeypatch):
    """Have Triton compute wherever ATen is not asked for by name."""
    use_everywhere(monkeypatch)


def use_everywhere(monkeypatch):
    monkeypatch.setattr(
        sync_splitbn._kernels, "choose", lambda impl, x: aten if impl == "aten" else kernels
    )


def layer_of(state, **options):
    num_splits, features = state.weight.shape[1:]
    layer = SyncSplitBatchNorm(features, num_splits=num_splits, **options)
    with torch.no_grad():
        for s, stats in enumerate((layer, *layer.aux_bn)):
            stats.weight.copy_(state.weight[0, s])
            stats.bias.copy_(state.bias[0, s])
    return layer


def gathered(layer, name):
    """Return a parameter's gradients or a buffer of all splits."""
    tensors = [getattr(stats, name) for stats in (layer, *layer.aux_bn)]
    return torch.stack([t if t.grad is None else t.grad for t in tensors]).detach().cpu()


def step(layer, x, dy, ids):
    """Return y, dx, the gradients of weights and biases, and the buffers, after one step."""
    x = x.detach().to(DEVICE, copy=True).requires_grad_()
    with assign_splits(layer, index=ids.to(DEVICE)):
        y = layer(x)
    y.backward(dy.to(DEVICE))
    names = "weight", "bias", "running_mean", "running_var", "num_batches_tracked"
    return y.detach().cpu(), x.grad.cpu(), *(gathered(layer, name) for name in names)


@pytest.mark.parametrize("momentum", [0.1, None])
@LAYOUTS
def test_layer_on_one_rank_equals_the_definition(everywhere, last, momentum):
    state, truth = (oracle.State.initial(1, 3, 5) for _ in range(2))
    layer = layer_of(state, momentum=momentum).to(DEVICE)
    for seed in range(2):
        torch.manual_seed(seed)
        x, dy = torch.randn(10, 5, 3, 4) * 2 + 1, torch.randn(10, 5, 3, 4)
        x = features_last(x) if last else x
        ids = torch.randint(0, 2 + seed, (10,))
        layer.zero_grad()
        y, dx, dweight, dbias, *buffers = step(layer, x, dy, ids)
        wide, rank = x.double().requires_grad_(), torch.zeros_like(ids)
        truth.weight.grad = truth.bias.grad = None
        expected = oracle.forward(wide, ids, rank, truth, momentum=momentum)
        expected.backward(dy.double())
        assert_near(y, expected.detach().float())
        assert_near(dx, wide.grad.float())
        assert_near(dweight, truth.weight.grad[0].float())
        assert_near(dbias, truth.bias.grad[0].float())
        assert_near(buffers[0], truth.running_mean.float())
        assert_near(buffers[1], truth.running_var.float())
        assert buffers[2].equal(truth.num_batches_tracked)


def test_function_named_triton_equals_aten():
    x, dy = batch((12, 5, 3, 4))
    results = []
    for impl in ("triton", "aten"):
        parts = [
            t.detach().clone().requires_grad_() for t in (x, *affine_of(5)[0], *affine_of(5)[1])
        ]
        y, moments = sync_split_batch_norm(
            parts[0], 3, parts[1:4], parts[4:], sizes=(3, 0, 9), impl=impl
        )
        results.append([y.detach(), moments.values, *torch.autograd.grad(y, parts, dy)])
    for ours, truth in zip(*results, strict=True):
        assert_near(ours, truth, 1e-5)


def test_function_named_triton_refuses_a_second_derivative():
    x, dy = (t.requires_grad_() for t in batch((6, 5)))
    y, _ = sync_split_batch_norm(x, 3, impl="triton")
    with pytest.raises(RuntimeError, match="impl='triton' must not be differentiated twice"):
        torch.autograd.grad(y, x, dy, create_graph=True)


def test_second_derivative_of_the_default_is_by_way_of_aten(everywhere):
    x, dy = batch((6, 5, 3))
    weights, biases, _ = affine_of(5)
    results = []
    for impl in (None, "aten"):
        parts = [t.detach().clone().requires_grad_() for t in (x, *weights, *biases)]
        y, _ = sync_split_batch_norm(parts[0], 3, parts[1:4], parts[4:], impl=impl)
        upstream = dy.clone().requires_grad_()
        first = torch.autograd.grad(y, parts[:4], upstream, create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        results.append(torch.autograd.grad(penalty, [upstream, *parts[:4]]))
    for ours, truth in zip(*results, strict=True):
        assert truth.abs().max() > 0.1
        assert_near(ours, truth, 1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_a_batch_once_and_changes_no_gradient(everywhere, reentrant):
    x, dy = batch((6, 4, 3))
    results = []
    for is_checkpointed in (False, True):
        layer, leaf = SyncSplitBatchNorm(4, num_splits=2).to(DEVICE), x.clone().requires_grad_()
        y = checkpoint(layer, leaf, use_reentrant=reentrant) if is_checkpointed else layer(leaf)
        y.backward(dy)
        results.append((y.detach(), leaf.grad, gathered(layer, "weight"), *layer.buffers()))
    assert all(a.equal(b) for a, b in zip(*results, strict=True))
    assert layer.num_batches_tracked == layer.aux_bn[0].num_batches_tracked == 1


def test_autocast_keeps_the_statistics_and_the_type_of_the_input(everywhere):
    x, dy = batch((6, 4, 3), torch.bfloat16)
    layer, leaf = SyncSplitBatchNorm(4, num_splits=2).to(DEVICE), x.clone().requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        y = layer(leaf)
    y.backward(dy)
    assert y.dtype == leaf.grad.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == layer.running_mean.dtype == torch.float32
    mean = x[:3].double().mean((0, 2))
    assert_near(layer.running_mean.double(), 0.1 * mean, 1e-7)


RANK_ROWS = (7, 0, 4)


def rows_of_ranks(world_size):
    """Return x, dy and splits of all ranks' rows, with a split that is on one rank alone."""
    generator = torch.Generator().manual_seed(5)
    rows = sum(RANK_ROWS[:world_size])
    x, dy = torch.randn(2, rows, 5, 3, 2, generator=generator)
    ids = torch.randint(0, 2, (rows,), generator=generator)
    ids[:2] = 2
    return 2 * x + 3, dy, ids


def train_on_a_rank(rank, world_size, rows):
    """Return what `step` does of a layer on this rank, and what was sent."""
    patch = pytest.MonkeyPatch()
    use_everywhere(patch)
    layer = layer_of(oracle.State.initial(world_size, 3, 5))
    x, dy, ids = (t.split(rows)[rank] for t in rows_of_ranks(3))
    with Collectives() as collectives:
        results = step(layer, x, dy, ids)
    return results, collectives.calls


@pytest.mark.skipif(DEVICE == "cuda", reason="ranks run in the interpreter")
@pytest.mark.parametrize("rows", [[7, 4], [11, 0]], ids=["uneven", "one-empty"])
def test_layer_on_two_ranks_equals_the_definition(rows, tmp_path):
    answers = run_ranks(train_on_a_rank, 2, tmp_path, rows)
    state = oracle.State.initial(2, 3, 5)
    x, dy, ids = rows_of_ranks(3)
    rank = torch.arange(2).repeat_interleave(torch.tensor(rows))
    wide = x.double().requires_grad_()
    expected = oracle.forward(wide, ids, rank, state)
    expected.backward(dy.double())
    parts = zip(expected.detach().split(rows), wide.grad.split(rows), strict=True)
    for i, (((y, dx, dweight, dbias, *buffers), calls), (y_true, dx_true)) in enumerate(
        zip(answers, parts, strict=True)
    ):
        assert_near(y, y_true.float())
        assert_near(dx, dx_true.float())
        assert_near(dweight, state.weight.grad[i].float())
        assert_near(dbias, state.bias.grad[i].float())
        assert_near(buffers[0], state.running_mean.float())
        assert_near(buffers[1], state.running_var.float())
        assert buffers[2].equal(state.num_batches_tracked)
        sent = [(numel, dtype) for _, numel, dtype in calls]
        assert sent == [(3 * 11, torch.float64), (3 * 10, torch.float32)]
    assert all(a.equal(b) for a, b in zip(*(answer[0][4:] for answer in answers), strict=True))


@on_gpu
@pytest.mark.parametrize("splits", ["equal", "uneven", "index"])
def test_nothing_waits_for_the_device(splits):
    x, dy = batch((12, 5, 7, 7))
    splits, affine = splits_of(splits), affine_of(5)
    run_all(kernels, x, dy, splits, affine)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_all(kernels, x, dy, splits, affine)
        run_alone(kernels, x, dy, splits, affine)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.parametrize("splits", ["equal", "uneven", "index"])
def test_captured_graph_replays_with_new_data(splits):
    x, dy = batch((12, 5, 7, 7))
    splits, affine = splits_of(splits), affine_of(5)
    expected = run_all(kernels, x, dy, splits, affine)
    static = torch.zeros_like(x)
    run_all(kernels, static, dy, splits, affine)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run_all(kernels, static, dy, splits, affine)
    static.copy_(x)
    graph.replay()
    assert all(a.equal(b) for a, b in zip(results, expected, strict=True))


@on_gpu
@LAYOUTS
def test_tensors_beyond_2_to_the_31_elements_are_taken(last):
    shape = (5, 64, 2900, 2900)
    memory_format = torch.channels_last if last else torch.contiguous_format
    x, dy = (
        torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE)
        .contiguous(memory_format=memory_format)
        .normal_()
        for _ in range(2)
    )
    affine, splits = affine_of(64, num_splits=2), (2, 3)
    owner = [(1, 0), (1, 0), (0, 1), (0, 1), (0, 1)]
    weights, _, eps = affine
    packed = kernels.sums(x, None, splits, 2)
    moments = kernels.moments(packed)
    parts = [aten.sums(x[i : i + 1], None, owner[i], 2) for i in range(5)]
    assert_near(packed, sum(parts), 1e-6)
    sums = kernels.grad_sums(dy, x, None, splits, moments, eps)
    parts = [
        aten.grad_sums(dy[i : i + 1], x[i : i + 1], None, owner[i], moments, eps) for i in range(5)
    ]
    assert_near(sums, sum(parts), 1e-4)
    for i in (0, 4):
        row = slice(i, i + 1)
        y = kernels.normalize(x, None, splits, moments, *affine)[row]
        assert_near(y, aten.normalize(x[row], None, owner[i], moments, *affine))
        dx = kernels.grad_input(dy, x, None, splits, moments, weights, eps, sums)[row]
        expected = aten.grad_input(dy[row], x[row], None, owner[i], moments, weights, eps, sums)
        assert_near(dx, expected)

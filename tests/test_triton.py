"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter on the CPU."""

import importlib.util
import os
import subprocess
import sys

import oracle
import pytest
import torch

from sync_splitbn._kernels import aten
from sync_splitbn._moments import Affine, Moments

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

from sync_splitbn._kernels import triton as kernels  # noqa: E402 - after the interpreter is chosen

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
LAYOUTS_AND_SPLITS = [
    pytest.param(False, "uneven", id="channels first, sizes"),
    pytest.param(True, "index", id="channels last, index"),
]
# Of the largest value: rounding of the type, some times over.
CLOSE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 1.6e-2,
    torch.float16: 2e-3,
}


@pytest.fixture(autouse=True)
def several_tiles_a_program(monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", 4)


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


def affine_of(features, dtype=torch.float32, num_splits=3, relu=False):
    generator = torch.Generator().manual_seed(1)
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = torch.rand(2, num_splits, features, generator=generator).to(DEVICE, wide)
    return Affine(weight + 0.5, bias - 0.5, 1e-3, relu)


def splits_of(name):
    splits = SPLITS[name]
    return splits.to(DEVICE) if isinstance(splits, torch.Tensor) else splits


def assert_near(value, truth, tolerance=None, size=1.0):
    """Compare within the rounding of the largest value, or of the `size` of what cancelled."""
    assert value.dtype == truth.dtype
    assert value.shape == truth.shape
    if truth.numel():
        worst = (value.double() - truth.double()).abs().max() / truth.abs().max().clamp(min=size)
        assert worst < (tolerance or CLOSE[value.dtype]), worst.item()


def all_four(kernels, x, dy, splits, affine, of_all=None, sums=None):
    """Return what the four functions return, the last three for given moments and sums."""
    packed = kernels.moments(x, splits, 3)
    of_all = of_all or Moments(packed)
    y = kernels.normalize(x, splits, of_all, affine)
    local = kernels.grad_sums(dy, x, splits, of_all, affine)
    return (
        packed,
        y,
        local,
        kernels.grad_input(dy, x, splits, of_all, affine, local if sums is None else sums),
    )


def assert_as_aten(x, dy, splits):
    affine = affine_of(x.shape[1], x.dtype)
    truth = all_four(aten, x, dy, splits, affine)
    ours = all_four(kernels, x, dy, splits, affine, Moments(truth[0]), truth[2])
    tight = 1e-12 if x.dtype == torch.float64 else 1e-6
    for value, expected, tolerance in zip(ours, truth, (tight, None, None, None), strict=True):
        assert_near(value, expected, tolerance)
    if x.is_contiguous() or x.movedim(1, -1).is_contiguous():
        assert ours[1].stride() == ours[3].stride() == x.stride()


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("splits", ["uneven", "index"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_equal_aten_in_every_shape(shape, splits, last):
    assert_as_aten(*batch(shape, last=last and len(shape) > 2), splits_of(splits))


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("splits", SPLITS)
def test_kernels_equal_aten_for_all_splits(splits, last):
    assert_as_aten(*batch((12, 5, 3, 4), last=last), splits_of(splits))


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
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


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
def test_gradient_in_another_layout_gives_the_same_bits(last):
    x, dy = batch((12, 5, 3, 4), last=last)
    other = dy.contiguous() if last else features_last(dy)
    expanded = dy[:, :, :1, :1].expand(dy.shape)
    affine = affine_of(5)
    for a, b in ((dy, other), (expanded, expanded.contiguous())):
        ours, theirs = (all_four(kernels, x, g, (5, 0, 7), affine) for g in (a, b))
        assert all(s.equal(t) for s, t in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("last", "splits"), LAYOUTS_AND_SPLITS)
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_forward_and_backward_equal_the_definition(dtype, last, splits):
    x, dy = batch((12, 5, 3, 7), dtype, last)
    splits = splits_of(splits)
    affine = affine_of(5, dtype)
    packed, y, sums, dx = (t.cpu() for t in all_four(kernels, x, dy, splits, affine))
    state = oracle.State.initial(1, 3, 5)
    state.weight = affine.weight.double().cpu().unsqueeze(0).requires_grad_()
    state.bias = affine.bias.double().cpu().unsqueeze(0).requires_grad_()
    wide, upstream = x.double().cpu().requires_grad_(), dy.double().cpu()
    ids = splits.cpu() if isinstance(splits, torch.Tensor) else torch.arange(3)
    if not isinstance(splits, torch.Tensor):
        ids = ids.repeat_interleave(torch.tensor(splits))
    truth = oracle.forward(wide, ids, torch.zeros_like(ids), state, eps=affine.eps)
    truth.backward(upstream)
    sum_dy, sum_dy_xmu = sums.chunk(2, dim=1)
    assert_near(y, truth.detach().to(dtype))
    assert_near(dx, wide.grad.to(dtype))
    assert_near(sum_dy, state.bias.grad[0].to(sums.dtype))
    dweight = sum_dy_xmu * Moments(packed).invstd(affine.eps)
    assert_near(dweight.to(sums.dtype), state.weight.grad[0].to(sums.dtype))
    assert_near(0.1 * Moments(packed).mean, state.running_mean, CLOSE[sums.dtype])
    unbiased = 0.9 + 0.1 * Moments(packed).unbiased_var
    assert_near(unbiased, state.running_var, CLOSE[sums.dtype])


@pytest.mark.parametrize(("last", "splits"), LAYOUTS_AND_SPLITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_relu_is_applied_and_its_gradient_masked(dtype, last, splits):
    x, dy = batch((12, 6, 5, 5), dtype, last)
    plain, rectified = (affine_of(6, dtype, relu=relu) for relu in (False, True))
    splits = splits_of(splits)
    moments = Moments(aten.moments(x, splits, 3))
    output = aten.normalize(x.float(), splits, moments, plain)
    masked = torch.where(output > 0, dy, 0)
    truth = all_four(aten, x, masked, splits, plain, moments)
    ours = all_four(kernels, x, dy, splits, rectified, moments, truth[2])
    assert (output > 0).any(dim=(0, 2, 3)).all()
    assert (output < 0).any(dim=(0, 2, 3)).all()
    assert_near(ours[1], truth[1].relu())
    assert_near(ours[2], truth[2])
    assert_near(ours[3], truth[3])


@pytest.mark.parametrize("splits", ["uneven", "index"])
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
def test_kernels_hold_far_from_the_origin(last, splits):
    """The mean is 1e4 standard deviations: E[x^2] - E[x]^2 in float32 is off by 23 variances."""
    x, dy = batch((12, 5, 7, 7), last=last, mean=2e4)
    splits, affine = splits_of(splits), affine_of(5)
    packed, y, _, dx = all_four(kernels, x, dy, splits, affine)
    truth = all_four(aten, x.double(), dy.double(), splits, affine)
    var, exact = Moments(packed).var, Moments(truth[0]).var
    assert ((var - exact).abs() / exact).max() < 1e-6
    assert_near(y, truth[1].float(), 1e-5)
    assert_near(dx, truth[3].float(), 1e-5)


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
def test_splits_far_from_each_other_are_shifted_by_their_own_rows(last):
    x, _ = batch((12, 5, 7, 7), last=last)
    x += 2e4 * (SPLITS["index"] == 1).to(DEVICE).view(12, 1, 1, 1)
    packed, truth = (Moments(k.moments(x, splits_of("index"), 3)) for k in (kernels, aten))
    assert ((packed.var - truth.var).abs() / truth.var).max() < 1e-6


def test_mean_that_the_type_cannot_hold_is_not_rounded():
    """At 2^24 the step of float32 is 2: half the rows are there, half a step above."""
    x = torch.full((8, 3, 4), 2.0**24, device=DEVICE)
    x[::2] += 2
    x[0] += 2
    _, dy = batch(x.shape)
    affine = affine_of(3, num_splits=1)
    truth = all_four(aten, x.double(), dy.double(), (8,), affine)
    ours = all_four(kernels, x, dy, (8,), affine, Moments(truth[0]), truth[2].float())
    for value, expected in zip(ours[1:], truth[1:], strict=True):
        assert_near(value, expected.float(), 2e-6)


def test_constant_far_away_has_no_negative_variance():
    """Rounding of E[x^2] - E[x]^2 may fall on either side of 0."""
    values = torch.linspace(1e5, 2e5, 40, dtype=torch.float64, device=DEVICE)
    x = values.view(1, 40, 1).expand(7, 40, 3).contiguous()
    moments = Moments(kernels.moments(x, (7,), 1))
    mean, square = moments.packed[:, :-1].div(21).chunk(2, dim=1)
    assert (square < mean.square()).any(), "a test without a negative variance is none"
    y = kernels.normalize(x, (7,), moments, Affine(None, None, 1e-12))
    assert not y.isnan().any()


def test_nan_stays_in_its_split():
    for splits in ((2, 2, 0), torch.tensor([1, 0, 1, 0], device=DEVICE)):
        x, dy = batch((4, 3, 9))
        x[0, 1, 0] = float("nan")
        sick = 0 if isinstance(splits, tuple) else 1
        affine = affine_of(3, relu=True)
        packed, y, sums, dx = all_four(kernels, x, dy, splits, affine)
        assert packed[sick, 1].isnan()
        assert packed.isnan().sum() == 2
        assert sums.isnan().sum() == 1
        for result in (y, dx):
            assert result.isnan().sum() == 18
            assert result[:2, 1].isnan().all() if sick == 0 else result[::2, 1].isnan().all()


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2, 2), (6, 3, 0)], ids=str)
def test_empty_tensors_are_taken(shape):
    x = torch.zeros(shape, device=DEVICE)
    n = shape[0] // 3
    for splits in ((n, n, n), torch.arange(shape[0], device=DEVICE) % 3):
        packed, y, sums, dx = all_four(kernels, x, x, splits, Affine(None, None, 1e-5))
        assert packed.equal(torch.zeros(3, 7, dtype=torch.float64, device=DEVICE))
        assert sums.equal(torch.zeros(3, 6, device=DEVICE))
        assert y.shape == dx.shape == shape


def test_parameters_may_be_shared_or_strided_or_missing():
    x, dy = batch((12, 5, 7))
    one, wide = affine_of(5, num_splits=1), affine_of(10)
    for affine in (
        Affine(one.weight.expand(3, 5), one.bias.expand(3, 5), one.eps),
        Affine(wide.weight[:, ::2], wide.bias[:, 5:], 1e-3),
        Affine(one.weight.expand(3, 5), None, 1e-3),
        Affine(None, None, 0.5),
    ):
        truth = all_four(aten, x, dy, (5, 0, 7), affine)
        ours = all_four(kernels, x, dy, (5, 0, 7), affine)
        for value, expected in zip(ours[1:], truth[1:], strict=True):
            assert_near(value, expected)


def test_index_may_be_strided():
    strided = splits_of("index").repeat_interleave(2)[::2]
    assert not strided.is_contiguous()
    assert_as_aten(*batch((12, 5, 7)), strided)


@pytest.mark.parametrize("how", ["sizes", "index"])
def test_splits_beyond_one_launch_are_taken(how, monkeypatch):
    monkeypatch.setattr(kernels, "SPLITS_PER_LAUNCH", 2)
    kernels._plan.cache_clear()
    x, dy = batch((12, 5, 7))
    sizes = (2, 0, 5, 1, 4)
    ids = torch.arange(5).repeat_interleave(torch.tensor(sizes)).flip(0).to(DEVICE)
    splits = sizes if how == "sizes" else ids
    affine = affine_of(5, num_splits=5)
    packed, expected = (k.moments(x, splits, 5) for k in (kernels, aten))
    assert_near(packed, expected, 1e-6)
    moments = Moments(expected)
    truth = aten.grad_sums(dy, x, splits, moments, affine)
    assert_near(kernels.grad_sums(dy, x, splits, moments, affine), truth)
    y, dx = (
        (
            k.normalize(x, splits, moments, affine),
            k.grad_input(dy, x, splits, moments, affine, truth),
        )
        for k in (kernels, aten)
    )
    for value, exact in zip(y, dx, strict=True):
        assert_near(value, exact)
    kernels._plan.cache_clear()


@pytest.mark.parametrize("splits", ["uneven", "index"])
def test_same_call_gives_the_same_bits(splits):
    x, dy = batch((12, 5, 3, 7) if DEVICE == "cpu" else (12, 70, 99, 99))
    first, second = (
        all_four(kernels, x, dy, splits_of(splits), affine_of(x.shape[1], relu=True))
        for _ in range(2)
    )
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


@triton.jit
def offsets_kernel(out, t, numbers, constants):
    """Store what tile `t` of program 0 addresses, [BP, BC]."""
    work = kernels._work(numbers, constants)
    offsets, _here, _owned = kernels._tile(t + tl.program_id(0), work, None, constants)
    p, c = tl.arange(0, constants.bp)[:, None], tl.arange(0, constants.bc)[None, :]
    tl.store(out + p * constants.bc + c, offsets)


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("shape", [(7, 60_000, 40_000), (7, 40, 400_000_000)], ids=str)
def test_offsets_pass_2_to_the_31(shape, last):
    rows, features, length = shape
    constants, ((_, _, _, numbers),) = kernels._plan(
        shape, (rows,), torch.float32, last, 8, (1e-5, False, 1, 1)
    )
    bp, bc = constants.bp.value, constants.bc.value
    tiles = -(-rows * length // bp) if last else rows * -(-length // bp)
    offsets = torch.zeros(bp, bc, dtype=torch.int64, device=DEVICE)
    offsets_kernel[(1,)](offsets, tiles - 1, numbers, constants)
    begin = (tiles - 1) * bp % (-(-length // bp) * bp) if not last else (tiles - 1) * bp
    p, c = begin + torch.arange(bp).unsqueeze(1), torch.arange(bc)
    expected = p * features + c if last else ((rows - 1) * features + c) * length + p
    assert offsets.cpu().equal(expected)
    assert offsets.min() > 2**33


def test_cpu_tensors_are_refused_outside_the_interpreter(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    x, affine = torch.zeros(3, 2), Affine(None, None, 1e-5)
    moments = Moments(torch.zeros(3, 5, dtype=torch.float64))
    for call in (
        lambda: kernels.moments(x, (1, 1, 1), 3),
        lambda: kernels.normalize(x, (1, 1, 1), moments, affine),
        lambda: kernels.grad_sums(x, x, (1, 1, 1), moments, affine),
        lambda: kernels.grad_input(x, x, (1, 1, 1), moments, affine, torch.zeros(3, 4)),
    ):
        with pytest.raises(
            RuntimeError, match="'triton' must be given a CUDA tensor, got device cpu;"
        ):
            call()


def test_import_without_triton_is_an_import_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("sync_splitbn._kernels.again", kernels.__file__)
    with pytest.raises(ImportError, match="triton"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver
from sync_splitbn._kernels import triton as kernels
from sync_splitbn._moments import Affine, Moments

class H100:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = get_current_stream = lambda self, device=0: 0

driver.set_active(H100())
kernels.INTERPRETED = True  # so that CPU tensors are taken; nothing runs
kernels.PROGRAMS = 528
run, compiled = JITFunction.run, []

def compile_only(self, *args, warmup, **kwargs):
    compiled.append(run(self, *args, warmup=True, **kwargs))

JITFunction.run = compile_only

def train(rows, last):
    x = torch.empty(sum(rows), 24, 28, 28, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    moments = Moments(torch.empty(3, 49, dtype=torch.float64))
    affine = Affine(torch.empty(3, 24), torch.empty(3, 24), 1e-5, True)
    kernels.moments(x, rows, 3)
    kernels.normalize(x, rows, moments, affine)
    if last:
        sums = kernels.grad_sums(x, x, rows, moments, affine)
        kernels.grad_input(x, x, rows, moments, affine, sums)

for last in (False, True):
    for rows in ((16, 16, 16), (1, 0, 3), (5, 128, 1)):
        train(rows, last)
different = {id(kernel): kernel for kernel in compiled}.values()
print(len(compiled), len(different))
for kernel in different:
    wide = "ld.global.v4.b32" in kernel.asm["ptx"] or "cp.async.cg" in kernel.asm["ptx"]
    print(kernel.metadata.name, wide)
"""


def test_kernels_compile_for_an_h100_once_for_any_batch_and_load_16_bytes(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts, *lines = done.stdout.splitlines()
    assert counts == "27 8"
    assert sorted(lines) == sorted(
        ["_apply_kernel True"] * 3 + ["_sums_kernel True"] * 3 + ["_total_kernel False"] * 2
    )


@on_gpu
@pytest.mark.parametrize("splits", ["uneven", "index"])
def test_nothing_waits_for_the_device(splits):
    x, dy = batch((12, 5, 7, 7))
    splits, affine = splits_of(splits), affine_of(5)
    all_four(kernels, x, dy, splits, affine)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        all_four(kernels, x, dy, splits, affine)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
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
    packed = kernels.moments(x, splits, 2)
    moments = Moments(packed)
    parts = [aten.moments(x[i : i + 1], owner[i], 2) for i in range(5)]
    assert_near(packed, sum(parts), 1e-6)
    sums = kernels.grad_sums(dy, x, splits, moments, affine)
    parts = [
        aten.grad_sums(dy[i : i + 1], x[i : i + 1], owner[i], moments, affine) for i in range(5)
    ]
    assert_near(sums, sum(parts), 1e-4)
    for i in (0, 4):
        row = slice(i, i + 1)
        y = kernels.normalize(x, splits, moments, affine)[row]
        assert_near(y, aten.normalize(x[row], owner[i], moments, affine))
        dx = kernels.grad_input(dy, x, splits, moments, affine, sums)[row]
        assert_near(dx, aten.grad_input(dy[row], x[row], owner[i], moments, affine, sums))

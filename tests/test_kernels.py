"""Each kernel module computes the formulas of the design, whatever the layout and the type."""

import functools
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from compiled import COMPILED, IMPLS, KERNELS

from sync_splitbn import sync_split_batch_norm
from sync_splitbn._kernels import aten, choose, cpu, operators
from sync_splitbn._moments import Moments

SHAPES = [(12, 5), (12, 5, 1), (12, 5, 7), (12, 65, 3, 2), (12, 1, 4), (12, 3, 2, 3, 2)]
# For several threads: short rows, long ones, and many features.
SHAPES_OF_THREADS = [(12, 70, 7, 7), (12, 3, 47, 89), (12, 2100, 3), (12, 3001, 2)]
# Long rows, many rows, and neither.
SHAPES_OF_MANY = [
    (3, 2, 301, 301),
    (3, 512, 101, 101),
    (15, 40, 28, 28),
    (6, 700, 7, 7),
    (90000, 1),
    (30000, 4, 2),
    (90000, 3),
]
SPLITS = {
    "equal": (4, 4, 4),
    "uneven": (1, 8, 3),
    "one empty": (5, 0, 7),
    "index": torch.tensor([2, 0, 1, 1, 0, 2, 2, 2, 0, 1, 1, 1]),
}
EPS = 1e-5
# Of the largest value: rounding of the type, some times over.
CLOSE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 1.6e-2,
    torch.float16: 2e-3,
}


def rows_of(splits):
    """Return the index and the sizes as kernels take them, of which one is None."""
    return (splits, None) if isinstance(splits, torch.Tensor) else (None, splits)


def definition(x, dy, ids, weight, bias, eps):
    """Sums, moments, y, sums of dy and dx, split by split, in float64."""
    x, dy = x.double(), dy.double()
    sums_x, values, sums_dy = [], [], []
    y, dx = torch.zeros_like(x), torch.zeros_like(x)
    column = (1, -1, *(1 for _ in x.shape[2:]))
    for s in range(3):
        mine = ids == s
        rows, upstream = (t[mine].transpose(0, 1).flatten(1) for t in (x, dy))  # [C, n]
        n = rows.shape[1]
        count = torch.tensor([float(n)])
        mean = rows.mean(1) if n else torch.zeros(len(rows))
        var = rows.var(1, correction=0) if n else torch.zeros(len(rows))
        xhat = (rows - mean.unsqueeze(1)) / (var + eps).sqrt().unsqueeze(1)
        sum_dy, sum_dy_xhat = upstream.sum(1), (upstream * xhat).sum(1)
        sums_x.append(torch.cat([rows.sum(1), rows.square().sum(1), count]))
        values.append(torch.cat([mean, var, count]))
        sums_dy.append(torch.cat([sum_dy, sum_dy_xhat]))
        mean, var, w, b = (t.view(column) for t in (mean, var, weight[s], bias[s]))
        xhat = (x[mine] - mean) / (var + eps).sqrt()
        y[mine] = xhat * w + b
        mean_dy, mean_dy_xhat = (t.view(column) / max(n, 1) for t in (sum_dy, sum_dy_xhat))
        dx[mine] = (dy[mine] - mean_dy - xhat * mean_dy_xhat) * w / (var + eps).sqrt()
    return torch.stack(sums_x), torch.stack(values), y, torch.stack(sums_dy), dx


def assert_near(value, truth, dtype, size=1e-3):
    """Compare within the rounding of the largest value, or of the `size` of what cancelled."""
    if truth.numel():
        worst = (value.double() - truth).abs().max() / truth.abs().max().clamp(min=size)
        assert worst < CLOSE[dtype], worst.item()


def assert_moments(values, truth):
    assert values.dtype == torch.float64
    moments = Moments(values)
    size = truth.mean.abs().max().item()
    torch.testing.assert_close(moments.mean, truth.mean, rtol=1e-6, atol=1e-6 * size)
    torch.testing.assert_close(moments.var, truth.var, rtol=1e-6, atol=1e-9)
    assert moments.count.equal(truth.count)


def check(kernels, x, dy, splits, dtype):
    torch.manual_seed(1)
    by_index = isinstance(splits, torch.Tensor)
    ids = splits if by_index else torch.arange(3).repeat_interleave(torch.tensor(splits))
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = (torch.rand(3, x.shape[1], dtype=wide) + 0.5 for _ in range(2))
    sums_x, values, y, sums_dy, dx = definition(x, dy, ids, weight.double(), bias.double(), EPS)
    truth, rows = Moments(values), rows_of(splits)
    weights, biases = list(weight), list(bias)

    sums = kernels.sums(x, *rows, 3)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, sums_x, rtol=1e-6, atol=1e-6 * sums_x.abs().max().item())
    assert_moments(kernels.moments(sums), truth)
    fused_y, fused_moments = kernels.normalize_batch(x, *rows, 3, weights, biases, EPS)
    assert_moments(fused_moments, truth)
    fused_dx, fused_sums = kernels.grad_batch(dy, x, *rows, values, weights, EPS)

    # In a split of one element dy cancels against its own mean, times this.
    scale = (weight / (truth.var + EPS).sqrt()).max().item()
    of_sums = sums_dy.to(wide)
    for name, value, expected, size in (
        ("normalize", kernels.normalize(x, *rows, values, weights, biases, EPS), y, 1),
        ("normalize_batch", fused_y, y, 1),
        ("grad_input", kernels.grad_input(dy, x, *rows, values, weights, EPS, of_sums), dx, scale),
        ("grad_batch", fused_dx, dx, scale),
    ):
        assert value.dtype == dtype, name
        assert value.shape == x.shape, name
        assert_near(value, expected, dtype, size=size)
    for local in (kernels.grad_sums(dy, x, *rows, values, EPS), fused_sums):
        assert local.dtype == wide
        assert_near(local, sums_dy, wide)
    bare = kernels.normalize(x, *rows, values, [], [], EPS)
    shape = (*weight[ids].shape, *(1 for _ in x.shape[2:]))
    weight, bias = (value.double()[ids].view(shape) for value in (weight, bias))
    assert_near(bare, (y - bias) / weight, dtype)


@pytest.fixture
def threads():
    """Let a test set their number."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def check_layouts(kernels, shape, splits, dtype):
    torch.manual_seed(0)
    for last in (False, True):
        x, dy = (torch.randn(shape) * 2 + 1).to(dtype), torch.randn(shape).to(dtype)
        if last:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        check(kernels, x, dy, splits, dtype)
        check(kernels, x, dy.movedim(1, -1).contiguous().movedim(-1, 1), splits, dtype)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernels", KERNELS)
def test_kernels_compute_their_definition(kernels, shape, splits, dtype):
    check_layouts(kernels, shape, SPLITS[splits], dtype)


@COMPILED
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("shape", SHAPES_OF_THREADS, ids=str)
def test_cpu_kernels_share_their_work_among_any_number_of_threads(shape, splits, dtype, threads):
    """With more of them than rows, they share the features."""
    for number in (1, 2, 5, 16):
        threads(number)
        check_layouts(cpu, shape, SPLITS[splits], dtype)


@COMPILED
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("length", [(64, 64), (61, 67)], ids=str)
def test_cpu_kernels_write_large_results_as_small_ones(length, last, dtype):
    """Those go past the cache, if they lie well for it."""
    torch.manual_seed(0)
    x = torch.randn(66, 32, *length).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    dy, sizes = torch.randn_like(x), (12, 24, 30)
    moments = cpu.moments(cpu.sums(x, None, sizes, 3))
    sums = cpu.grad_sums(dy, x, None, sizes, moments, EPS)
    y = cpu.normalize(x, None, sizes, moments, [], [], EPS)
    dx = cpu.grad_input(dy, x, None, sizes, moments, [], EPS, sums)
    assert y.nbytes >= 2**24
    row = 0
    for split, size in enumerate(sizes):
        # One after the other they are small.
        one = moments[split : split + 1]
        for start in range(row, row + size, 6):
            rows = slice(start, start + 6)
            alone = cpu.normalize(x[rows], None, (6,), one, [], [], EPS)
            assert y[rows].equal(alone)
            of = sums[split : split + 1]
            alone = cpu.grad_input(dy[rows], x[rows], None, (6,), one, [], EPS, of)
            assert dx[rows].equal(alone)
        row += size


@pytest.mark.parametrize("far", [1, 30, 100, 1e4])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kernels", KERNELS)
def test_kernels_hold_far_from_the_origin(kernels, last, far):
    torch.manual_seed(0)
    x, dy = torch.randn(12, 6, 5, 7) + far, torch.randn(12, 6, 5, 7)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    for splits in SPLITS.values():
        check(kernels, x, dy, splits, torch.float32)


@COMPILED
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_cpu_kernels_hold_where_only_some_channels_are_far(last, dtype):
    torch.manual_seed(0)
    x = torch.randn(12, 7, 5, 6)
    x[4:8, 2] += 50
    x[:, 5] -= 7
    x = x.to(dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    for splits in SPLITS.values():
        check(cpu, x, torch.randn_like(x), splits, dtype)


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", SHAPES_OF_MANY, ids=str)
def test_cpu_kernels_keep_the_digits_of_many_values(shape, last, dtype):
    """They are added up in float32: of 90,000 values one to the other, that is off by 2e-6."""
    torch.manual_seed(0)
    around = torch.randn(shape)
    # At 1e4, half precision has no digits to keep.
    for far in (0, 1, 3, 30, 100, 1e4)[: 6 if dtype == torch.float32 else 4]:
        x = (around + far).to(dtype)
        if last:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        n = shape[0] // 3
        found = Moments(cpu.moments(cpu.sums(x, None, (n, n, n), 3)))
        parts = [part.double().transpose(0, 1).flatten(1) for part in x.split(n)]
        var = torch.stack([part.var(1, correction=0) for part in parts])
        assert ((found.var - var).abs() / var).max() < 1e-6, far
        off = (found.mean - torch.stack([part.mean(1) for part in parts])).abs() / var.sqrt()
        assert off.max() < 2e-6, far


def test_moments_give_the_inverse_deviation_of_each_eps():
    moments = Moments(torch.tensor([[2.0, 1.0, 2.0]], dtype=torch.float64))  # of 1 and 3
    assert moments.unbiased_var.item() == 2
    for eps in (3.0, 8.0, 3.0):
        assert moments.invstd(eps).item() == pytest.approx((1 + eps) ** -0.5)


@COMPILED
def test_cpu_kernels_serve_two_threads_at_once():
    torch.manual_seed(0)
    xs, dys = torch.randn(2, 2, 12, 16, 40, 40).bfloat16()
    rows = None, (4, 4, 4)
    moments = [cpu.moments(cpu.sums(x, *rows, 3)) for x in xs]

    def differentiate(i):
        sums = cpu.grad_sums(dys[i], xs[i], *rows, moments[i], EPS)
        return cpu.grad_input(dys[i], xs[i], *rows, moments[i], [], EPS, sums)

    apart = [differentiate(i) for i in range(2)]
    start = threading.Barrier(2)

    def repeat(i):
        start.wait()
        return [differentiate(i) for _ in range(20)]

    with ThreadPoolExecutor(2) as pool:
        for expected, found in zip(apart, pool.map(repeat, range(2)), strict=True):
            for dx in found:
                torch.testing.assert_close(dx, expected)


@COMPILED
def test_operators_take_tensors_that_are_views():
    """Of memory that is read backwards, with gaps, in another order, or with the sign to change."""
    torch.manual_seed(0)
    values = torch.randn(24, 8, 6, 5, dtype=torch.complex64)
    weights, biases = torch.rand(3, 16)[:, ::2], torch._neg_view(torch.rand(8, 3).T)
    weights, biases, rows = list(weights), list(biases), (None, (4, 3, 5))
    views = [
        values.real[::2],
        values.conj().imag[:12],
        torch.randn(12, 8, 5, 6).transpose(2, 3),
        values.real[:12, :, :, :1].expand(12, 8, 6, 5),
        values.real[0].expand(12, 8, 6, 5),
        torch._efficientzerotensor(12, 8, 6, 5),
    ]
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-4)
    for x in views:
        for dy in [*views, views[0].bfloat16()]:
            moments = operators.moments(operators.sums(x, *rows, 3))
            close(moments, aten.moments(aten.sums(x, *rows, 3)))
            affine = x, *rows, moments, weights, biases, EPS
            close(operators.normalize(*affine), aten.normalize(*affine))
            sums = operators.grad_sums(dy, x, *rows, moments, EPS)
            close(sums, aten.grad_sums(dy, x, *rows, moments, EPS))
            gradient = dy, x, *rows, moments, weights, EPS, sums
            close(operators.grad_input(*gradient), aten.grad_input(*gradient))


@COMPILED
def test_index_and_parameters_may_be_views():
    """Of another order, of one element for all, and with the sign to change."""
    torch.manual_seed(0)
    x, dy = torch.randn(2, 12, 4, 3)
    ids = torch.randint(3, (12, 5))
    for index in (ids[:, 2], ids[:, 1].int(), ids.T[0], ids[:1, 0].expand(12)):
        weight = torch._neg_view(torch.rand(3, 4))
        bias = torch.randn(4, 3, dtype=torch.complex64).conj().imag.T
        found = []
        for impl in ("cpu", "aten"):
            leaf = x.clone().requires_grad_()
            y, moments = sync_split_batch_norm(leaf, 3, weight, bias, index=index, impl=impl)
            y.backward(dy)
            found.append((y, leaf.grad, moments.values))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@COMPILED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cpu_kernels_round_to_half_precision_as_torch_does(dtype):
    """To the nearest, and of two as near to the even one."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite()].view(1, 1, -1)
    moments = torch.tensor([[0, 0.5, 1]], dtype=torch.float64)
    weight = torch.full((1,), 1 + torch.finfo(dtype).eps / 2)
    y = cpu.normalize(x, None, (1,), moments, [weight], [], 0.5)
    assert y.equal((x.float() * weight).to(dtype))


@COMPILED
def test_cpu_kernels_leave_an_infinite_gradient_infinite():
    for length in (3, 8, 9, 16, 33):
        x, dy = torch.randn(1, 2, length), torch.zeros(1, 2, length)
        dy[0, 0] = torch.inf
        moments = cpu.moments(cpu.sums(x, None, (1,), 1))
        sums = cpu.grad_sums(dy, x, None, (1,), moments, EPS)
        assert sums[0, 0] == torch.inf
        assert sums[0, 1] == 0


@COMPILED
def test_cpu_kernels_never_read_or_write_beyond_their_tensors():
    """What does not fit is an error, not another's memory."""
    x = torch.zeros(4, 3)
    for splits, message in (
        ((2, 1), "sizes must sum"),
        ((5, -1), "sizes must sum"),
        ((1, 2**63 - 1), "sizes must sum"),
        (torch.tensor([0, 1, 2, 0]), "index must hold"),
        (torch.tensor([0, 1, -1, 0]), "index must hold"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu.sums(x, *rows_of(splits), 2)


@COMPILED
def test_cpu_kernels_keep_what_is_no_number():
    """A NaN stays in its split and channel, and is a NaN in half precision too."""
    for dtype in CLOSE:
        x = torch.randn(6, 4, 5).to(dtype)
        x[3, 2, 1] = torch.nan
        rows = None, (2, 4)
        moments = cpu.moments(cpu.sums(x, *rows, 2))
        y = cpu.normalize(x, *rows, moments, [], [], EPS)
        hurt = torch.zeros(6, 4, 5, dtype=torch.bool)
        hurt[2:, 2] = True
        assert y.isnan().equal(hurt), dtype
        # Rounding one with all bits set would make a zero of it.
        weight = torch.full((4,), -1, dtype=torch.int32).view(torch.float32)
        weight = weight.to(torch.promote_types(dtype, torch.float32))
        assert cpu.normalize(x, *rows, moments, [weight] * 2, [], EPS).isnan().all()


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2, 2), (6, 3, 0), (6, 0), (6, 0, 4)], ids=str)
@pytest.mark.parametrize("kernels", KERNELS)
def test_kernels_take_empty_tensors(kernels, shape):
    x = torch.zeros(shape)
    n, features = shape[0] // 3, shape[1]
    expected = torch.zeros(3, 2 * features + 1, dtype=torch.float64)
    expected[:, -1] = n * torch.Size(shape[2:]).numel()
    for rows in ((None, (n, n, n)), (torch.arange(shape[0]) % 3, None)):
        sums = kernels.sums(x, *rows, 3)
        assert sums.equal(expected)
        moments = kernels.moments(sums)
        assert moments.equal(expected)
        sums = kernels.grad_sums(x, x, *rows, moments, EPS)
        assert sums.equal(torch.zeros(3, 2 * features))
        y, of_batch = kernels.normalize_batch(x, *rows, 3, [], [], EPS)
        assert of_batch.equal(expected)
        dx, sums = kernels.grad_batch(x, x, *rows, moments, [], EPS)
        assert sums.equal(torch.zeros(3, 2 * features))
        again = kernels.normalize(x, *rows, moments, [], [], EPS)
        for result in (y, dx, again, kernels.grad_input(x, x, *rows, moments, [], EPS, sums)):
            assert result.shape == shape


def running_stats(dtype, features, counted=True):
    torch.manual_seed(0)
    means, variances = torch.rand(2, 3, features).to(dtype)
    counters = list(torch.tensor([4, 0, 7])) if counted else []
    return list(means), list(variances), counters


@pytest.mark.parametrize("counted", [True, False], ids=["counted", "uncounted"])
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("kernels", KERNELS)
def test_kernels_update_running_statistics_by_their_definition(kernels, dtype, momentum, counted):
    """An empty split keeps its own and its count, a single element leaves the variance."""
    mean, var = torch.randn(2, 3, 5).double()
    count = torch.tensor([[6.0], [0.0], [1.0]]).double()
    means, variances, counters = running_stats(dtype, 5, counted)
    old_means, old_variances, _ = running_stats(dtype, 5, counted)
    moments = torch.cat([mean, var.abs(), count], dim=1)
    kernels.update_running_stats(means, variances, counters, momentum, moments)
    tracked = [5, 0, 8]
    for s, n in enumerate((6, 0, 1)):
        step = momentum
        if momentum is None:
            step = 1 / tracked[s] if counted and n else 0
        for found, old, new, least in (
            (means[s], old_means[s], mean[s], 1),
            (variances[s], old_variances[s], var[s].abs() * 6 / 5, 2),
        ):
            expected = old.double().lerp(new, step) if n >= least else old.double()
            assert found.dtype == dtype
            assert_near(found, expected, dtype, size=1)
            assert n >= least or found.equal(old)
    if counted:
        assert [int(counter) for counter in counters] == tracked


@pytest.mark.parametrize("kernels", KERNELS)
def test_infinite_running_statistics_stay_infinite(kernels):
    moments = torch.tensor([[2.0, 3.0, 4.0, 9.0, 4.0]]).double()
    mean, var = torch.tensor([0.0, -math.inf]), torch.tensor([math.inf, 1.0])
    kernels.update_running_stats([mean], [var], [], 0.25, moments)
    torch.testing.assert_close(mean, torch.tensor([0.5, -math.inf]))
    torch.testing.assert_close(var, torch.tensor([math.inf, 3.75]))


@pytest.mark.parametrize("kernels", KERNELS)
def test_kernels_update_running_statistics_that_are_views_of_different_types(kernels):
    moments = torch.tensor([[2.0, 3.0, 4.0, 9.0, 4.0]] * 2).double()
    memory = torch.zeros(4, 4, dtype=torch.float64)
    means = [memory[0, ::2], torch.zeros(2, dtype=torch.bfloat16)]
    variances = [torch.zeros(2), memory.T[1, ::2]]
    kernels.update_running_stats(means, variances, [], 1.0, moments)
    for found in means:
        assert found.tolist() == [2, 3]
    for found in variances:
        torch.testing.assert_close(found.double(), torch.tensor([16 / 3, 12]).double())
    assert memory.count_nonzero() == 4


@pytest.mark.parametrize("impl", IMPLS)
def test_named_kernels_serve_the_operation(impl):
    torch.manual_seed(0)
    x, dy = torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3)
    results = []
    for name in (impl, "aten"):
        leaf = x.clone().requires_grad_()
        y, moments = sync_split_batch_norm(leaf, 3, impl=name)
        y.backward(dy)
        results.append((y, leaf.grad, moments.mean))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_parameters_may_come_from_an_iterator():
    """They were read several times, and nothing was left for the last."""
    weights, x = [torch.full((3,), 5.0), torch.full((3,), 2.0)], torch.randn(8, 3)
    expected, _ = sync_split_batch_norm(x, 2, weights)
    assert sync_split_batch_norm(x, 2, iter(weights))[0].equal(expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_parameters_may_be_given_split_by_split(impl):
    """As the layer has them: gradients reach each, and one that all share gets their sum."""
    torch.manual_seed(0)
    x, dy = torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3)
    weight, bias = torch.rand(3, 4, requires_grad=True), torch.rand(4, requires_grad=True)
    parts = [row.detach().clone().requires_grad_() for row in weight]
    shared = bias.detach().clone().requires_grad_()
    y, _ = sync_split_batch_norm(x, 3, weight, bias, impl=impl)
    y.backward(dy)
    of_parts, _ = sync_split_batch_norm(x, 3, parts, [shared] * 3, impl=impl)
    of_parts.backward(dy)
    assert of_parts.equal(y)
    torch.testing.assert_close(torch.stack([part.grad for part in parts]), weight.grad)
    torch.testing.assert_close(shared.grad, bias.grad)
    torch.testing.assert_close(bias.grad, dy.sum((0, 2, 3)))


def test_cpu_kernels_refuse_other_devices():
    with pytest.raises(RuntimeError, match=r"impl='cpu' must be able to serve the input"):
        sync_split_batch_norm(torch.zeros(4, 3, device="meta"), 2, impl="cpu")


def test_triton_kernels_without_triton_or_cuda_are_refused():
    with pytest.raises(RuntimeError, match=r"impl='triton' must be able to serve the input, got "):
        sync_split_batch_norm(torch.zeros(4, 3), 2, impl="triton")


@COMPILED
def test_second_derivative_through_named_kernels_is_refused():
    x = torch.randn(4, 3, requires_grad=True)
    y, _ = sync_split_batch_norm(x, 2, impl="cpu")
    with pytest.raises(RuntimeError, match="impl='cpu' must not be differentiated twice"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


@COMPILED
def test_kernels_are_chosen_by_device_type_and_compile_state(monkeypatch):
    x = torch.zeros(4, 3)
    assert choose(None, x) is operators
    assert choose(None, x.to("meta")) is aten
    assert choose(None, x.to(torch.float8_e5m2)) is aten
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert choose(None, x) is operators
    assert choose("cpu", x) is operators
    with pytest.raises(RuntimeError, match=r"got no compiled loops for torch.float8_e5m2 on cpu"):
        choose("cpu", x.to(torch.float8_e5m2))


def test_without_compiled_loops_aten_serves_and_their_name_is_refused(monkeypatch):
    monkeypatch.setattr(cpu, "_not_loaded", "the package was installed without a C++ compiler")
    x = torch.zeros(4, 3)
    assert choose(None, x) is aten
    with pytest.raises(RuntimeError, match=r"impl='cpu' must .*, got .* without a C\+\+ compiler"):
        sync_split_batch_norm(x, 2, impl="cpu")

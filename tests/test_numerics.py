"""Accuracy far from the origin, and derivatives of first and second order."""

import itertools

import oracle
import pytest
import torch
from compiled import IMPLS
from ranks import run_ranks
from torch.nn import functional as F

from sync_splitbn import SyncSplitBatchNorm, assign_splits, sync_split_batch_norm

FAR = [0, 1, 100, 1e3, 1e4]  # mean / std


def far_batch(far, ranks, memory_format):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(ranks * 12, 4, 7, 7, generator=generator) + far
    dy = torch.randn(x.shape, generator=generator) + 0.5 * (x - far)
    return [t.contiguous(memory_format=memory_format) for t in (x, dy)]


def far_step(rank, world_size, far, memory_format):
    x, dy = (t.chunk(world_size)[rank].clone() for t in far_batch(far, world_size, memory_format))
    x.requires_grad_()
    output, moments = sync_split_batch_norm(x, 3)
    output.backward(dy)
    return output.detach(), x.grad, moments.var, moments.mean


def far_truth(far, world_size):
    x, dy = (t.double() for t in far_batch(far, world_size, torch.contiguous_format))
    x.requires_grad_()
    state = oracle.State.initial(world_size, 3, 4)
    state.weight, state.bias = torch.ones_like(state.weight), torch.zeros_like(state.bias)
    rank = torch.arange(world_size).repeat_interleave(12)
    split = torch.arange(3).repeat_interleave(4).repeat(world_size)
    y = oracle.forward(x, split, rank, state)
    (dx,) = torch.autograd.grad(y, x, dy)
    parts = [x.detach()[split == s].transpose(0, 1).flatten(1) for s in range(3)]
    return y.detach(), dx, torch.stack([part.var(1, correction=0) for part in parts])


def relative(value, truth):
    return ((value.double() - truth).abs().max() / truth.abs().max()).item()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("world_size", [1, 3])
def test_statistics_and_gradients_hold_far_from_the_origin(world_size, memory_format, tmp_path):
    """E[x^2] - E[x]^2 in float32 is off by 23 at 1e4, a float32 wire as much (flax#1491)."""
    for far in FAR:
        ranks = run_ranks(far_step, world_size, tmp_path, far, memory_format)
        y, dx, var = far_truth(far, world_size)
        assert ((ranks[0][2] - var).abs() / var).max() < 1e-6, far
        assert relative(torch.cat([r[0] for r in ranks]), y) < 1e-5, far
        assert relative(torch.cat([r[1] for r in ranks]), dx) < 1e-5, far
        assert all(r[2].equal(ranks[0][2]) and r[3].equal(ranks[0][3]) for r in ranks)


def in_parts(x, sizes):
    return torch.cat([F.batch_norm(part, None, None, training=True) for part in x.split(sizes)])


def derivatives(operation, x, dy):
    """Output, gradient and the gradient of its square."""
    x = x.clone().requires_grad_()
    y = operation(x)
    (dx,) = torch.autograd.grad(y.tanh(), x, dy, create_graph=True)
    (second,) = torch.autograd.grad(dx.square().sum(), x)
    return {"y": y.detach(), "dx": dx.detach(), "second derivative": second}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("rows", ["sizes", "index"])
@pytest.mark.parametrize("impl", [*IMPLS, None])
@pytest.mark.parametrize("far", [1e4, 1e6, 1e8])
def test_float64_of_one_rank_is_as_accurate_as_plain_batch_norm(far, impl, rows, memory_format):
    """Squares about 0 left an error of 8.7e-4 in y at a mean / std of 1e6, and no digit at 1e8."""
    torch.manual_seed(0)
    sizes, ids = (3, 5, 4), torch.arange(3).repeat_interleave(torch.tensor([3, 5, 4]))
    assigned = {"sizes": sizes} if rows == "sizes" else {"index": ids}
    sign = torch.tensor([1, -1, 1, 0.3]).view(-1, 1, 1)
    x = torch.randn(12, 4, 7, 7, dtype=torch.float64) + far * sign
    x, dy = (t.contiguous(memory_format=memory_format) for t in (x, torch.randn_like(x)))
    near = x - far * sign  # exact, as x has fewer digits behind the point

    moments = sync_split_batch_norm(x, 3, **assigned, impl=impl)[1]
    var = torch.stack([part.var((0, 2, 3), correction=0) for part in near.split(sizes)])
    torch.testing.assert_close(moments.var, var, rtol=1e-13, atol=0)

    def operation(x):
        return sync_split_batch_norm(x, 3, **assigned, impl=impl)[0]

    truth = derivatives(lambda x: in_parts(x, sizes), near, dy)
    stock = derivatives(lambda x: in_parts(x, sizes), x, dy)
    if impl == "cpu":
        x.requires_grad_()
        y = operation(x)
        (dx,) = torch.autograd.grad(y.tanh(), x, dy)
        found = {"y": y.detach(), "dx": dx}
    else:
        found = derivatives(operation, x, dy)
    for name, value in found.items():
        assert relative(value, truth[name]) <= 2 * relative(stock[name], truth[name]), name


def far_in_float64(rank, world_size, far):
    torch.manual_seed(rank)
    x = torch.randn(12, 4, 7, 7, dtype=torch.float64) + far
    x.requires_grad_()
    y, moments = sync_split_batch_norm(x, 3)
    dy = torch.randn_like(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    return x.detach(), dy, y.detach(), dx, moments.var


def test_float64_over_ranks_holds_to_the_documented_limit(tmp_path):
    """The wire carries squares about 0, which lose twice the digits of mean / std."""
    for far, limit in ((100, 1e-10), (1e4, 1e-6)):
        ranks = run_ranks(far_in_float64, 2, tmp_path, far)
        by_split = [torch.cat(part) for part in zip(*(r[0].chunk(3) for r in ranks), strict=True)]
        near = (torch.cat(by_split) - far).requires_grad_()
        dy = torch.cat([torch.cat([r[1].chunk(3)[s] for r in ranks]) for s in range(3)])
        truth = in_parts(near, [24 // 3] * 3)
        (dx,) = torch.autograd.grad(truth, near, dy)
        for which, expected in ((2, truth.detach()), (3, dx)):
            found = torch.cat([torch.cat([r[which].chunk(3)[s] for r in ranks]) for s in range(3)])
            assert relative(found, expected) < limit, far
        parts = near.detach().split(8)
        var = torch.stack([part.var((0, 2, 3), correction=0) for part in parts])
        assert relative(ranks[0][4], var) < limit, far


def test_single_features_far_from_the_origin_are_exact():
    """Without positions to sum over, each row is its own shift."""
    x = (torch.randn(300, 4) + 1e4).requires_grad_()
    _, moments = sync_split_batch_norm(x, 1)
    truth = x.detach().double().var(0, correction=0)
    assert ((moments.var[0] - truth).abs() / truth).max() < 1e-6


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_padding_ahead_of_the_data_costs_few_digits(impl, memory_format):
    """A shift taken from the first rows alone left an error of 1e-3 here."""
    x = torch.randn(96, 8, 31, 31) + 1e4
    x[0] = 0
    _, moments = sync_split_batch_norm(x.contiguous(memory_format=memory_format), 1, impl=impl)
    truth = x.double().transpose(0, 1).flatten(1).var(1, correction=0)
    # Float32 sums of equal outliers round one way.
    assert ((moments.var[0] - truth).abs() / truth).max() < 1e-5


# The first, and those that the loops sample, of one row of 1,024, of two and of four together.
PLACES = [0, 1, 257, 513, 769, *range(24, 1024, 125), 99, 599, 74, 574, 49, 549, 299, 799]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("count", "background"), [(8, 0), (8, 1), (1, 1), (32, 1e-3)])
@pytest.mark.parametrize("impl", IMPLS)
def test_outliers_among_the_sampled_values_cost_no_digits(impl, count, background, memory_format):
    """A shift that one sample alone could move left an error of 1e-4."""
    for place, outlier in itertools.product(PLACES, (1000 / 3, -1000 / 3)):
        x = background * torch.rand(count, 4, 1024)
        x[:, :, place] = outlier
        x = x.view(count, 4, 32, 32).contiguous(memory_format=memory_format)
        _, moments = sync_split_batch_norm(x, 1, impl=impl)
        truth = x.double().transpose(0, 1).flatten(1).var(1, correction=0)
        assert ((moments.var[0] - truth).abs() / truth).max() < 1e-6, (place, outlier)


@pytest.mark.parametrize("impl", [None, "aten"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_variance_of_a_constant_far_from_the_origin_is_not_negative(dtype, impl):
    """Rounding makes Σx²/n − mean² negative here and there; its root would be NaN."""
    x = torch.linspace(1e3, 1e5, 512, dtype=dtype).view(512, 1).expand(999, 512, 5)
    output, moments = sync_split_batch_norm(x, 1, eps=1e-30, impl=impl)
    assert moments.var.min() >= 0
    assert output.isfinite().all()


def test_unbiased_variance_is_zero_for_one_element_and_for_none():
    _, moments = sync_split_batch_norm(torch.randn(3, 2), 3, sizes=(1, 0, 2))
    assert moments.unbiased_var[:2].equal(torch.zeros(2, 2, dtype=torch.float64))
    assert moments.unbiased_var[2].gt(0).all()


@pytest.mark.parametrize("how", ["sizes", "index", "empty split"])
def test_first_and_second_derivatives_pass_gradcheck(how):
    torch.manual_seed(0)
    x = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(2, 2, dtype=torch.float64).add(0.5).requires_grad_()
    bias = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    rows = {
        "sizes": {"sizes": (2, 4)},
        "index": {"index": torch.tensor([1, 0, 1, 1, 0, 1])},
        "empty split": {"sizes": (0, 6)},
    }[how]

    def operation(x, weight, bias):
        return sync_split_batch_norm(x, 2, weight, bias, **rows)[0]

    assert torch.autograd.gradcheck(operation, (x, weight, bias))
    assert torch.autograd.gradgradcheck(operation, (x, weight, bias))


def penalty(y, x, dy):
    """A gradient penalty: its gradient needs second derivatives."""
    (dx,) = torch.autograd.grad((y * dy).sum(), x, create_graph=True)
    return (dx.square() * torch.linspace(0.5, 2, dx.numel()).view_as(dx)).sum()


def penalized(rank, world_size, sizes):
    torch.manual_seed(rank)
    x = torch.randn(sum(sizes[rank]), 3, 4, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    layer = SyncSplitBatchNorm(3, dtype=torch.float64)
    with assign_splits(layer, sizes=sizes[rank]):
        y = layer(x)
    penalty(y.tanh(), x, dy).backward()
    weights = torch.stack([layer.weight.grad, layer.aux_bn[0].weight.grad])
    return x.detach(), dy, x.grad, weights


@pytest.mark.parametrize("sizes", [[(2, 3)], [(2, 3), (4, 1)], [(0, 0), (3, 4)]], ids=str)
def test_second_derivatives_over_ranks_equal_one_process(sizes, tmp_path):
    """create_graph through an in-place sum over ranks is silently wrong elsewhere."""
    ranks = run_ranks(penalized, len(sizes), tmp_path, sizes)
    x = torch.cat([r[0] for r in ranks]).requires_grad_()
    dy = torch.cat([r[1] for r in ranks])
    state = oracle.State.initial(len(sizes), 2, 3)
    state.weight = torch.ones_like(state.weight).requires_grad_()
    state.bias = torch.zeros_like(state.bias)
    rank = torch.repeat_interleave(torch.tensor([sum(s) for s in sizes]))
    split = torch.cat([torch.repeat_interleave(torch.tensor(s)) for s in sizes])
    y = oracle.forward(x, split, rank, state)
    (dx,) = torch.autograd.grad((y.tanh() * dy).sum(), x, create_graph=True)
    scale = [torch.linspace(0.5, 2, r[0].numel()).view(r[0].shape) for r in ranks if len(r[0])]
    (dx.square() * torch.cat(scale)).sum().backward()
    torch.testing.assert_close(torch.cat([r[2] for r in ranks]), x.grad, rtol=1e-7, atol=1e-7)
    # Of second order, which rank's copy of a weight a gradient falls to is a matter of taste:
    # DDP sums them, and the sum is what must be right.
    weights = sum(r[3] for r in ranks)
    torch.testing.assert_close(weights, state.weight.grad.sum(0), rtol=1e-7, atol=1e-7)

"""Small batches of one rank, which ATen's batch norm normalizes split by split."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sync_splitbn import SyncSplitBatchNorm, _alone, assign_splits, frozen_stats, layer

FORMATS = [torch.contiguous_format, torch.channels_last]


def steps(norm, batches, sizes):
    """Train on batches; return outputs and gradients, those of the parameters too."""
    found = []
    for x, dy in batches:
        x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        with assign_splits(norm, sizes=sizes):
            y = norm(x)
        y.backward(dy)
        found += [y.detach(), x.grad, *(p.grad.clone() for p in norm.parameters())]
    return found


@pytest.fixture
def path(monkeypatch):
    """Record who normalized each batch."""
    taken = []

    def normalize(*args, by_splits=_alone.normalize):
        output = by_splits(*args)
        taken.append("alone" if output is not None else "refused")
        return output

    def kernels(*args, by_kernels=layer.sync_split_batch_norm, **options):
        taken.append("kernels")
        return by_kernels(*args, **options)

    monkeypatch.setattr(_alone, "normalize", normalize)
    monkeypatch.setattr(layer, "sync_split_batch_norm", kernels)
    return taken


@pytest.mark.parametrize("options", [{}, {"share_affine": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("far", [0, 1, 0.6 * _alone.NEAR])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_both_ways_give_the_same_outputs_gradients_and_buffers(
    memory_format, far, options, path, monkeypatch
):
    torch.manual_seed(0)
    norm = SyncSplitBatchNorm(5, num_splits=3, **options)
    twin = copy.deepcopy(norm).double()
    x, dy = torch.randn(2, 12, 5, 9, 7) + far, torch.randn(2, 12, 5, 9, 7)
    batches = [
        tuple(t.contiguous(memory_format=memory_format) for t in pair)
        for pair in zip(x, dy, strict=True)
    ]
    found = steps(norm, batches, (2, 7, 3))
    monkeypatch.setattr(_alone, "SMALL", 0)
    expected = steps(twin, [(x.double(), dy.double()) for x, dy in batches], (2, 7, 3))
    assert path == ["alone", "alone", "kernels", "kernels"]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)
    for (name, a), b in zip(norm.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("features", [3, _alone.FEW + 1])
@pytest.mark.parametrize("tracking", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_batch_far_from_the_origin_keeps_its_digits(memory_format, tracking, features, path):
    """One channel of one split is enough; and what was moved for it is put back."""
    torch.manual_seed(0)
    x = torch.randn(8, features, 6, 6)
    x[4:, -1] += 1e4
    x = x.contiguous(memory_format=memory_format)
    norm = SyncSplitBatchNorm(features, track_running_stats=tracking, momentum=1.0)
    y = norm(x)
    assert path == ["refused", "kernels"]
    part = x[4:, -1].double()
    expected = (part - part.mean()) / (part.var(correction=0) + norm.eps).sqrt()
    torch.testing.assert_close(y[4:, -1].double(), expected, rtol=1e-5, atol=1e-5)
    if tracking:
        running = norm.aux_bn[0].running_var[-1].double()
        torch.testing.assert_close(running, part.var(), rtol=1e-6, atol=0)
        assert norm.aux_bn[0].num_batches_tracked == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_only_float32_has_digits_to_lose(dtype, path):
    """Others have more, or fewer than float32 leaves."""
    torch.manual_seed(0)
    norm = SyncSplitBatchNorm(3, dtype=torch.promote_types(dtype, torch.float32))
    norm((torch.randn(8, 3, 6, 6) + 100).to(dtype))
    assert path == ["alone"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_forward_is_run_again_alone_and_moves_nothing(reentrant, path):
    torch.manual_seed(0)
    norm, x = SyncSplitBatchNorm(3), torch.randn(8, 3, 6, 6, requires_grad=True)
    y = checkpoint(norm, x, use_reentrant=reentrant)
    once = copy.deepcopy(norm.state_dict())
    y.sum().backward()
    # Without re-entrance it stops as soon as all is there that backward needs.
    assert path == ["alone", "alone"][: 1 + reentrant]
    for name, value in norm.state_dict().items():
        assert value.equal(once[name]), name


def test_running_statistics_move_once_where_digits_would_be_lost(path):
    torch.manual_seed(0)
    norm, near = (SyncSplitBatchNorm(2, momentum=0.5) for _ in range(2))
    x = torch.randn(4, 2, 3, 3)
    norm(x + torch.tensor([0, 1e4]).view(2, 1, 1))
    near(x)
    assert path == ["refused", "kernels", "alone"]
    torch.testing.assert_close(norm.running_mean[0], near.running_mean[0])
    torch.testing.assert_close(norm.running_var[0], near.running_var[0])


def test_statistics_that_move_otherwise_before_backward_do_no_harm(path):
    """ATen saves the running statistics for a backward that does not read them."""
    torch.manual_seed(0)
    norm = SyncSplitBatchNorm(3)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    y = norm(x)
    with assign_splits(norm, index=torch.tensor([0, 1, 1, 0])):
        norm(x)
    norm(x + 1e4)
    norm.reset_running_stats()
    (y * torch.randn_like(y)).sum().backward()
    assert path == ["alone", "kernels", "refused", "kernels"]
    assert x.grad.norm() > 0


@pytest.mark.parametrize(
    ("shape", "options", "way"),
    [
        ((4, 3, 2, 2), {}, "alone"),
        ((40, 3), {}, "alone"),
        ((4, 3, 2, 2, 2), {}, "alone"),
        ((4, 3, 2, 2), {"track_running_stats": False}, "alone"),
        ((4, 3, 2, 2), {"affine": False}, "alone"),
        ((4, 3, 2, 2), {"momentum": None}, "kernels"),
        ((4, 3, 2, 2), {"dtype": torch.float64}, "kernels"),
        ((2, 3), {}, "kernels"),  # one element has no variance
        ((4, 3, 300, 300), {}, "kernels"),
    ],
    ids=str,
)
def test_small_batches_with_plain_splits_are_normalized_alone(shape, options, way, path):
    torch.manual_seed(0)
    norm = SyncSplitBatchNorm(3, **options)
    norm(torch.randn(shape))
    assert path == [way]


def test_many_rows_with_channels_innermost_keep_the_digits_of_the_kernels(path):
    torch.manual_seed(0)
    rows = 2 * _alone.ROWS * torch.get_num_threads()
    norm = SyncSplitBatchNorm(3)
    norm(torch.randn(rows, 3))
    norm(torch.randn(rows + 2, 3))
    assert path == ["alone", "kernels"]


def test_splits_that_do_not_fit_raise_as_in_the_kernels(path):
    norm = SyncSplitBatchNorm(3, num_splits=2)
    with pytest.raises(ValueError, match=r"input.shape\[0\] must be divisible by num_splits=2"):
        norm(torch.randn(5, 3, 2, 2))
    with assign_splits(norm, sizes=(1, 2)), pytest.raises(ValueError, match="sizes must sum to"):
        norm(torch.randn(5, 3, 2, 2))
    norm.eps = 0
    with pytest.raises(ValueError, match="eps must be positive"):
        norm(torch.randn(4, 3, 2, 2))


def test_frozen_statistics_stay(path):
    torch.manual_seed(0)
    norm = SyncSplitBatchNorm(3)
    before = copy.deepcopy(norm.state_dict())
    with frozen_stats(norm):
        norm(torch.randn(4, 3, 2, 2))
    assert path == ["alone"]
    for name, value in norm.state_dict().items():
        assert value.equal(before[name]), name


def test_second_derivatives_alone_are_those_of_the_kernels(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    norm = SyncSplitBatchNorm(3).double()

    def second():
        (dx,) = torch.autograd.grad((norm(x).square() * dy).sum(), x, create_graph=True)
        return torch.autograd.grad((dx * dy).sum(), [x, norm.weight])

    alone = second()
    monkeypatch.setattr(_alone, "SMALL", 0)
    for a, b in zip(alone, second(), strict=True):
        torch.testing.assert_close(a, b)


def test_training_step_in_inference_mode_moves_the_running_statistics(path):
    torch.manual_seed(0)
    norm, twin = SyncSplitBatchNorm(3), SyncSplitBatchNorm(3)
    x = torch.randn(8, 3, 6, 6)
    with torch.inference_mode():
        y = norm(x)
    assert y.equal(twin(x).detach())
    assert path == ["alone", "alone"]
    assert norm.running_var.equal(twin.running_var)

"""A rank without others, which has each way in one call, and its running statistics in another."""

import copy

import pytest
import torch
from compiled import COMPILED
from torch.utils.checkpoint import checkpoint

from sync_splitbn import SyncSplitBatchNorm, _kernels, assign_splits
from sync_splitbn._kernels import cpu

pytestmark = COMPILED

FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture
def taken(monkeypatch):
    """Record what was done in one call."""
    names = []

    def recorded(name, function):
        def record(*args):
            names.append(name)
            return function(*args)

        return record

    for name in ("alone", "grad_alone", "follow"):
        monkeypatch.setattr(cpu, name, recorded(name, getattr(cpu, name)))
    return names


def step(norm, x, dy, sizes):
    """Train on a batch; return its output and gradients, those of the parameters too."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with assign_splits(norm, sizes=sizes):
        y = norm(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad.clone() for p in norm.parameters())]


@pytest.mark.parametrize("sizes", [(4, 4, 4), (2, 9, 1), (12, 0, 0)], ids=str)
@pytest.mark.parametrize("options", [{}, {"share_affine": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(12, 5, 3, 7), (12, 5, 1, 1)], ids=str)
def test_both_ways_give_the_same_outputs_gradients_and_buffers(
    shape, memory_format, options, sizes, taken, monkeypatch
):
    torch.manual_seed(0)
    norm = SyncSplitBatchNorm(5, num_splits=3, **options)
    twin = copy.deepcopy(norm)
    for far in (0, 100):
        x, dy = torch.randn(2, *shape) + torch.tensor([far, 0]).view(2, 1, 1, 1, 1)
        batch = [t.contiguous(memory_format=memory_format) for t in (x, dy)]
        found = step(norm, *batch, sizes)
        with monkeypatch.context() as patch:
            patch.setattr(_kernels, "of_alone", lambda kernels, group: None)
            patch.setattr(cpu, "follow", lambda *args: False)
            expected = step(twin, *batch, sizes)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert taken == ["alone", "follow", "grad_alone"] * 2
    for (name, a), b in zip(norm.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)


def test_input_without_gradient_leaves_the_parameters_theirs(taken):
    torch.manual_seed(0)
    norm, x, dy = SyncSplitBatchNorm(3), *torch.randn(2, 8, 3, 6, 6)
    norm(x).backward(dy)
    part = x[4:].double()
    centred = part - part.mean((0, 2, 3), keepdim=True)
    centred /= (part.var((0, 2, 3), correction=0, keepdim=True) + norm.eps).sqrt()
    expected = (dy[4:].double() * centred).sum((0, 2, 3))
    torch.testing.assert_close(norm.aux_bn[0].weight.grad.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.bias.grad, dy[:4].sum((0, 2, 3)))
    assert taken == ["alone", "follow"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_forward_is_run_again_and_moves_nothing(reentrant, taken):
    torch.manual_seed(0)
    norm, x = SyncSplitBatchNorm(3), torch.randn(8, 3, 6, 6, requires_grad=True)
    y = checkpoint(norm, x, use_reentrant=reentrant)
    once = copy.deepcopy(norm.state_dict())
    y.sum().backward()
    assert taken.count("follow") == 1
    for name, value in norm.state_dict().items():
        assert value.equal(once[name]), name


def test_statistics_saved_for_a_backward_pass_are_guarded(taken):
    """As an operator would: autograd refuses what has been moved since."""
    torch.manual_seed(0)
    norm, x = SyncSplitBatchNorm(3), torch.randn(4, 3, 5, 5)
    y = norm.eval()(x)
    norm.train()(x)
    assert "follow" in taken
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_running_statistics_of_any_type_follow(dtype):
    torch.manual_seed(0)
    norm, x = SyncSplitBatchNorm(3, momentum=0.5).to(dtype), torch.randn(8, 3, 6, 6) + 2
    norm(x.to(dtype))
    part = x.to(dtype)[4:].double()
    for found, expected in (
        (norm.aux_bn[0].running_mean, part.mean((0, 2, 3)) / 2),
        (norm.aux_bn[0].running_var, part.var((0, 2, 3)) / 2 + 0.5),
    ):
        tolerance = 1e-12 if dtype == torch.float64 else 1e-2
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    assert norm.aux_bn[0].num_batches_tracked == 1


def test_training_step_in_inference_mode_moves_the_running_statistics(taken):
    torch.manual_seed(0)
    norm, twin = SyncSplitBatchNorm(3), SyncSplitBatchNorm(3)
    x = torch.randn(8, 3, 6, 6)
    with torch.inference_mode():
        y = norm(x)
        SyncSplitBatchNorm(3)(x)
    assert y.equal(twin(x).detach())
    assert norm.running_var.equal(twin.running_var)
    assert taken == ["alone", "follow"] * 3

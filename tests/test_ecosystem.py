"""Averaging, export and functional transforms of models with the layer."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, update_bn

from sync_splitbn import (
    SyncSplitBatchNorm,
    assign_splits,
    convert_sync_split_batchnorm,
    revert_sync_split_batchnorm,
)

# torch.func and the exporters use what torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def trained_model(num_splits=3):
    """A converted model whose splits differ."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    convert_sync_split_batchnorm(model, num_splits)
    for split in range(num_splits):
        with assign_splits(model, only=split):
            model(torch.randn(6, 3, 5, 5) * (split + 1) + split)
    return model


def test_averaged_model_averages_every_split():
    model = trained_model()
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.5), use_buffers=True)
    average.update_parameters(model)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for value in model.state_dict().values():
            value += 1
    average.update_parameters(model)
    for name, value in average.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, before[name] + 0.5)


def test_averaged_model_is_recalibrated_split_by_split():
    model = trained_model()
    average = AveragedModel(model)
    data = [[torch.randn(4, 3, 5, 5) for _ in range(3)] for _ in range(2)]
    with assign_splits(average, only=2):
        update_bn(data[0], average)
    features = torch.cat([average.module[0](x) for x in data[0]])
    torch.testing.assert_close(
        average.module[1].aux_bn[1].running_mean, features.mean((0, 2, 3)), rtol=1e-5, atol=1e-5
    )
    assert average.module[1].running_mean.equal(torch.zeros(4))


VARIANTS = {
    "default": lambda model: (model, contextlib.nullcontext()),
    "only=1": lambda model: (model, assign_splits(model, only=1)),
    "reverted": lambda model: (revert_sync_split_batchnorm(model, 2), contextlib.nullcontext()),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluated_model_is_exported(variant):
    model, context = VARIANTS[variant](trained_model().eval())
    x = torch.randn(2, 3, 5, 5)
    batch = torch.export.Dim("batch", min=2)
    with context, torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
        expected = model(more := torch.randn(7, 3, 5, 5))
    torch.testing.assert_close(program.module()(more), expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_evaluated_model_is_exported_to_onnx(variant, tmp_path):
    reference = pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")
    model, context = VARIANTS[variant](trained_model().eval())
    x = torch.randn(2, 3, 5, 5)
    path = tmp_path / "model.onnx"
    with context, torch.no_grad():
        expected = model(x)
        torch.onnx.export(model, (x,), str(path), dynamo=True, verbose=False)
    evaluator = reference.ReferenceEvaluator(str(path))
    (output,) = evaluator.run(None, {evaluator.input_names[0]: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=1e-5)


def test_functional_call_takes_other_parameters_and_buffers():
    model = trained_model()
    twin = copy.deepcopy(model)
    state = {name: value.clone() for name, value in trained_model().state_dict().items()}
    for value in state.values():
        value += 1
    twin.load_state_dict(state)
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(6, 3, 5, 5)
    output = torch.func.functional_call(model, state, (x,))
    torch.testing.assert_close(output, twin(x))
    parts = F.conv2d(x, state["0.weight"], state["0.bias"]).chunk(3)
    for part, here, own in zip(
        parts, output.chunk(3), ("1.", "1.aux_bn.0.", "1.aux_bn.1."), strict=True
    ):
        norm = F.batch_norm(
            part, None, None, state[own + "weight"], state[own + "bias"], training=True
        )
        torch.testing.assert_close(here, norm.relu(), rtol=1e-4, atol=1e-5)
    for name, value in model.state_dict().items():
        assert value.equal(before[name]), "the module's own buffers must stay"
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(state[name], value)


def test_vmap_is_right_in_evaluation_and_refused_in_training():
    model = trained_model()
    x = torch.randn(5, 3, 3, 4, 4)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.vmap(model)(x)
    model.eval()
    with torch.no_grad():
        expected = torch.stack([model(part) for part in x])
        torch.testing.assert_close(torch.func.vmap(model)(x), expected)


def test_forward_mode_differentiation_is_refused():
    layer = SyncSplitBatchNorm(3).double()
    x, direction = torch.randn(2, 8, 3, dtype=torch.float64).unbind()
    with pytest.raises(RuntimeError, match=r"(?i)forward mode|jvp|setup_context"):
        torch.func.jvp(layer, (x,), (direction,))


@pytest.mark.parametrize("shape", [(6, 4, 5, 5), (96, 16, 40, 40)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_fake_tensors_pass_through_a_training_step(shape, memory_format):
    """Tools that estimate memory run models without values, which nothing may look at."""
    layer = SyncSplitBatchNorm(shape[1])
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(shape).contiguous(memory_format=memory_format).requires_grad_()
        y = layer(x)
        y.sum().backward()
    assert y.shape == x.grad.shape == shape

"""timm's models, layers and checkpoints: converted without loss, equal to timm's own splits."""

import copy

import pytest
import torch
from ranks import run_ranks
from timm_environment import timm
from torch import nn

from sync_splitbn import (
    SyncSplitBatchNorm,
    convert_sync_split_batchnorm,
    revert_sync_split_batchnorm,
)

MODELS = {
    "resnet18": 64,
    "efficientnet_b0": 64,
    "regnety_002": 64,
    "mobilenetv3_small_100": 64,
    "densenet121": 64,
    "resnetv2_50": 64,
    "levit_128s": 224,
}
# timm's split layer is two-dimensional: it fails on the BatchNorm1d of these.
WITHOUT_PEER = {"levit_128s"}
SPLITS = 3


def model_of(name, seed=0):
    """A model with parameters and statistics of its own, without dropout."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=5)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.1)
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
            if isinstance(module, (nn.Dropout, timm.layers.DropPath)):
                module.p = module.drop_prob = 0.0
    return model


def images(name, rows=6):
    return torch.randn(rows, 3, MODELS[name], MODELS[name])


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_of_a_converted_model_is_bitwise_the_same(name):
    model = model_of(name).eval()
    x = images(name, rows=2)
    with torch.no_grad():
        expected = model(x)
        converted = convert_sync_split_batchnorm(copy.deepcopy(model), SPLITS)
        assert not any(type(m) in (nn.BatchNorm1d, nn.BatchNorm2d) for m in converted.modules())
        assert converted(x).equal(expected)
        reverted = revert_sync_split_batchnorm(copy.deepcopy(converted), split=2)
        assert reverted(x).equal(expected)
    assert [type(m) for m in reverted.modules()] == [type(m) for m in model.modules()]
    assert list(reverted.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("name", [name for name in MODELS if name not in WITHOUT_PEER])
def test_training_equals_timm_split_layer(name):
    # float64: the models multiply a rounding of float32 by more than a tolerance would bear.
    model = model_of(name).double()
    ours = convert_sync_split_batchnorm(copy.deepcopy(model), SPLITS)
    theirs = timm.layers.convert_splitbn_model(copy.deepcopy(model), SPLITS)
    theirs = theirs.double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = images(name).double()
    dy = torch.randn(6, 5, dtype=torch.float64)
    a, b = ours(x), theirs(x)
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    a.backward(dy)
    b.backward(dy)
    peers = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, peers[key].grad, rtol=1e-6, atol=1e-7, msg=key)
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[key], rtol=1e-8, atol=1e-8, msg=key)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_checkpoints_are_exchanged_strictly_both_ways(name):
    theirs = timm.layers.convert_splitbn_model(model_of(name, seed=1), SPLITS)
    ours = convert_sync_split_batchnorm(model_of(name), SPLITS)
    for parameter in theirs.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict())
    back = timm.layers.convert_splitbn_model(model_of(name, seed=2), SPLITS)
    back.load_state_dict(ours.state_dict())
    for key, value in theirs.state_dict().items():
        assert back.state_dict()[key].equal(value)


def test_plain_checkpoint_fills_every_split_of_a_model():
    plain = model_of("resnet18", seed=1)
    ours = convert_sync_split_batchnorm(model_of("resnet18"), SPLITS)
    ours.load_state_dict(plain.state_dict())
    assert ours.layer4[1].bn2.aux_bn[1].running_var.equal(plain.layer4[1].bn2.running_var)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_timm_split_model_converts_and_keeps_every_split(name):
    theirs = timm.layers.convert_splitbn_model(model_of(name), SPLITS).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    state, parameters = copy.deepcopy(theirs.state_dict()), set(theirs.parameters())
    x = images(name, rows=2)
    with torch.no_grad():
        expected = theirs(x)
        ours = convert_sync_split_batchnorm(theirs, SPLITS)
        assert ours(x).equal(expected)
    assert set(ours.parameters()) == parameters, "an optimizer made before must stay valid"
    for key, value in ours.state_dict().items():
        assert value.equal(state[key])
    plain = revert_sync_split_batchnorm(ours, split=1)
    assert [type(m) for m in plain.modules()] == [type(m) for m in model_of(name).modules()]
    with pytest.raises(ValueError, match=r"must have num_splits=2 .*got SplitBatchNorm2d"):
        convert_sync_split_batchnorm(timm.layers.convert_splitbn_model(model_of(name), 3), 2)


def hooked(norm):
    norm.aux_bn[0].register_forward_hook(lambda *args: None)


def scaled(norm):
    norm.aux_bn[0].eps = 0.1


def frozen(norm):
    norm.aux_bn[0].eval()


def replaced(norm):
    norm.aux_bn[0] = nn.Identity()


def without_drop(norm):
    norm.act = nn.ReLU()


def own_forward(norm):
    norm.aux_bn[0].forward = norm.aux_bn[0].forward


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (hooked, TypeError, r"module '0\.aux_bn\.0' must have no hooks"),
        (scaled, ValueError, r"module '0\.aux_bn\.0' must have eps=1e-05 .*, got 0\.1"),
        (frozen, ValueError, r"module '0\.aux_bn\.0' must have training=True .*, got False"),
        (replaced, TypeError, r"module '0\.aux_bn\.0' must be a batch norm, got Identity"),
        (own_forward, TypeError, r"module '0\.aux_bn\.0' must have the methods .*its own forward"),
        (without_drop, TypeError, r"module '0' must have both drop and act or neither"),
    ],
)
def test_split_layer_that_would_lose_something_is_refused(change, error, message):
    model = timm.layers.convert_splitbn_model(nn.Sequential(nn.BatchNorm2d(4)), 2)
    change(model[0])
    with pytest.raises(error, match=message):
        convert_sync_split_batchnorm(model, 2)
    assert type(model[0]) is timm.layers.SplitBatchNorm2d


def test_split_layer_that_another_converter_took_is_refused():
    model = timm.layers.convert_splitbn_model(nn.Sequential(nn.BatchNorm2d(4)), 2)
    model = timm.layers.convert_sync_batchnorm(model)
    with pytest.raises(TypeError, match="must have no child aux_bn, got SyncBatchNorm"):
        convert_sync_split_batchnorm(model, 2)


def test_activation_that_is_a_function_is_kept():
    norm = timm.layers.SplitBatchNorm2d(4)
    norm.drop, norm.act = nn.Identity(), torch.relu
    x = torch.randn(4, 4, 2, 2)
    expected = copy.deepcopy(norm)(x)
    torch.testing.assert_close(convert_sync_split_batchnorm(norm)(x), expected)


def test_every_batch_norm_class_of_timm_converts():
    classes, waiting = set(), [nn.modules.batchnorm._BatchNorm]
    while waiting:
        waiting += (found := waiting.pop().__subclasses__())
        classes.update(kind for kind in found if kind.__module__.startswith("timm."))
    assert {kind.__name__ for kind in classes} >= {"BatchNormAct2d", "SyncBatchNormAct"}
    for kind in classes:
        norm = convert_sync_split_batchnorm(kind(4))
        assert isinstance(norm, SyncSplitBatchNorm), kind


@pytest.mark.parametrize("converter", ["convert_sync_batchnorm", "convert_splitbn_model"])
@pytest.mark.parametrize("kind", ["BatchNorm2d", "BatchNormAct2d"])
def test_conversion_by_timm_is_refused(converter, kind):
    norm = (nn.BatchNorm2d if kind == "BatchNorm2d" else timm.layers.BatchNormAct2d)(4)
    model = convert_sync_split_batchnorm(nn.Sequential(norm), 2)
    with pytest.raises(RuntimeError, match="must not be converted by another converter, got its"):
        getattr(timm.layers, converter)(model)


def test_freezing_by_timm_passes_over_a_converted_layer():
    """It looks for two classes by name, and ours is neither: freeze first, or by requires_grad."""
    model = convert_sync_split_batchnorm(nn.Sequential(nn.BatchNorm2d(4)), 2)
    assert timm.layers.freeze_batch_norm_2d(model)[0] is model[0]
    assert isinstance(model[0], SyncSplitBatchNorm)


def test_activation_needs_the_forward_of_timm():
    class Named(nn.BatchNorm2d):
        def __init__(self):
            super().__init__(4)
            self.act, self.drop = nn.ReLU(), nn.Identity()

    x = torch.randn(3, 4, 2, 2)
    expected = (norm := Named().eval())(x)
    assert convert_sync_split_batchnorm(norm)(x).equal(expected)


def test_activation_and_dropout_of_timm_layers_are_kept():
    """The stock converters dropped the activation silently (timm#1254, pytorch#187298)."""
    drop = lambda: nn.Hardtanh(-0.5, 0.5)  # noqa: E731  (stands for a dropout, without chance)
    norm = timm.layers.BatchNormAct2d(4, act_layer=nn.SiLU, drop_layer=drop)
    synchronized = timm.layers.convert_sync_batchnorm(copy.deepcopy(norm))
    x = torch.randn(6, 4, 3, 3)
    expected = norm.act(norm.drop(nn.BatchNorm2d(4)(x)))
    for source in (norm, synchronized):
        kind, act = type(source), source.act
        layer = convert_sync_split_batchnorm(source, num_splits=1)
        assert layer.act is act
        torch.testing.assert_close(layer(x), expected)
        assert isinstance(layer, SyncSplitBatchNorm)
        assert type(revert_sync_split_batchnorm(layer)) is kind


def test_frozen_timm_norms_are_left_alone():
    model = timm.layers.freeze_batch_norm_2d(model_of("efficientnet_b0"))
    before = [type(m) for m in model.modules()]
    with pytest.warns(UserWarning, match="must contain a batch norm"):
        convert_sync_split_batchnorm(model)
    assert [type(m) for m in model.modules()] == before


def test_timm_ema_follows_every_split():
    model = convert_sync_split_batchnorm(model_of("resnet18"), SPLITS)
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for value in model.state_dict().values():
            value += 1
    average.update(model)
    for key, value in average.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, before[key] + 0.5)


def ddp_step(rank, world_size):
    model = model_of("efficientnet_b0").double()
    whole = convert_sync_split_batchnorm(copy.deepcopy(model), 2)
    ddp = nn.parallel.DistributedDataParallel(convert_sync_split_batchnorm(model, 2))
    torch.manual_seed(1)
    x = torch.randn(2, 2, 2, 3, 64, 64, dtype=torch.float64)  # [rank, split, row, ...]
    ddp(x[rank].flatten(0, 1)).square().sum().backward()
    # One process, all rows, split by split; it runs on each rank alone.
    layers = [m for m in whole.modules() if isinstance(m, SyncSplitBatchNorm)]
    alone = torch.distributed.new_group([0]), torch.distributed.new_group([1])
    for layer in layers:
        layer.process_group = alone[rank]
    whole(x.transpose(0, 1).flatten(0, 2)).square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(2 * a.grad, b.grad, rtol=1e-6, atol=1e-7, msg=name)
    for (name, a), b in zip(model.state_dict().items(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


def test_model_under_ddp_equals_one_process_with_all_rows(tmp_path):
    run_ranks(ddp_step, 2, tmp_path)

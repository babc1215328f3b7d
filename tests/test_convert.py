"""Conversion keeps all there is, refuses what it cannot keep, and is undone exactly."""

import copy
import subprocess
import sys

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.nn.utils import parametrize

from sync_splitbn import (
    SyncSplitBatchNorm,
    convert_sync_split_batchnorm,
    revert_sync_split_batchnorm,
    sync_group,
)

PLAIN = {"1d": nn.BatchNorm1d, "2d": nn.BatchNorm2d, "3d": nn.BatchNorm3d}
SHAPES = {"1d": (6, 4, 3), "2d": (6, 4, 3, 2), "3d": (6, 4, 2, 3, 2)}
OPTIONS = [
    {},
    {"affine": False},
    {"track_running_stats": False},
    {"momentum": None, "eps": 0.01},
    {"dtype": torch.float64},
]


def used(norm, shape):
    """Return `norm` with parameters and statistics that tell it from a fresh one."""
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(0.5, 1.5)
        dtype = norm.weight.dtype if norm.affine else torch.float32
        norm(torch.randn(shape, dtype=dtype) * 2 + 1)
    return norm


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", PLAIN)
def test_conversion_keeps_evaluation_and_every_split_starts_equal(kind, options):
    torch.manual_seed(0)
    plain = used(PLAIN[kind](4, **options), SHAPES[kind]).eval()
    x = torch.randn(SHAPES[kind], dtype=options.get("dtype", torch.float32))
    expected, state = plain(x), copy.deepcopy(plain.state_dict())
    layer = convert_sync_split_batchnorm(plain, num_splits=3)
    assert type(layer) is SyncSplitBatchNorm
    assert not layer.training
    assert not layer.aux_bn[0].training
    # Without running statistics both take the batch, in kernels that round differently.
    torch.testing.assert_close(
        layer(x),
        expected,
        rtol=0 if layer.track_running_stats else 1e-5,
        atol=0 if layer.track_running_stats else 1e-5,
    )
    for stats in (layer, *layer.aux_bn):
        for name, value in state.items():
            assert getattr(stats, name).equal(value)
            assert getattr(stats, name).dtype == value.dtype
    for name in ("eps", "momentum", "affine", "track_running_stats"):
        assert getattr(layer, name) == options.get(name, getattr(PLAIN[kind](1), name))


@pytest.mark.parametrize("split", [0, 1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", PLAIN)
def test_revert_returns_the_class_and_the_state_of_one_split(kind, options, split):
    torch.manual_seed(0)
    plain = used(PLAIN[kind](4, **options), SHAPES[kind])
    before = vars(copy.deepcopy(plain)).keys()
    layer = convert_sync_split_batchnorm(plain, num_splits=3)
    for value in layer.state_dict(keep_vars=True).values():
        value.data.add_(torch.rand(value.shape).to(value.dtype))
    stats = layer if split == 0 else layer.aux_bn[split - 1]
    state = {k: v.clone() for k, v in stats.state_dict().items() if "aux_bn" not in k}
    back = revert_sync_split_batchnorm(layer, split=split)
    assert type(back) is PLAIN[kind]
    assert vars(back).keys() == before
    assert list(back.state_dict()) == list(PLAIN[kind](4, **options).state_dict())
    for name, value in state.items():
        assert back.state_dict()[name].equal(value)
    back.train()(torch.randn(SHAPES[kind], dtype=options.get("dtype", torch.float32)))


class Tagged(nn.BatchNorm2d):
    """A subclass without a forward of its own."""


def test_conversion_keeps_identity_hooks_attributes_and_the_graph():
    norm = Tagged(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Sequential(nn.ReLU(), norm))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norm.weight.requires_grad_(False)
    norm.note, norm.qconfig = "kept", None
    seen = []
    norm.register_forward_hook(lambda module, args, output: seen.append("forward"))
    norm.register_full_backward_hook(lambda module, grads, outs: seen.append("backward"))
    norm._register_state_dict_hook(lambda *args: seen.append("state"))
    weight, bias, place = norm.weight, norm.bias, norm.running_mean
    converted = convert_sync_split_batchnorm(model, num_splits=2)
    layer = converted[1]
    assert converted is model
    assert layer is norm is model[2][1]
    assert layer.weight is weight
    assert layer.bias is bias
    assert layer.running_mean is place
    assert (layer.note, layer.qconfig) == ("kept", None)
    assert not layer.weight.requires_grad
    assert not layer.aux_bn[0].weight.requires_grad
    assert layer.aux_bn[0].bias.requires_grad
    pointers = [value.data_ptr() for value in layer.state_dict().values()]
    assert len(set(pointers)) == len(pointers), "splits must not share memory"
    model(torch.randn(4, 3, 2, 2)).sum().backward()
    model.state_dict()
    assert {"forward", "backward", "state"} <= set(seen)
    before = bias.detach().clone()
    optimizer.step()
    assert not bias.equal(before), "an optimizer made before stays valid for split 0"
    assert type(revert_sync_split_batchnorm(model)[1]) is Tagged


def test_parameter_shared_between_norms_stays_shared_in_every_split():
    a, b = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    b.weight = a.weight
    convert_sync_split_batchnorm(nn.ModuleList([a, b]), num_splits=3)
    assert a.aux_bn[1].weight is b.aux_bn[1].weight
    assert a.aux_bn[0].weight is not a.aux_bn[1].weight
    assert a.aux_bn[0].bias is not b.aux_bn[0].bias


def test_conversion_twice_changes_nothing():
    model = convert_sync_split_batchnorm(nn.Sequential(nn.BatchNorm1d(4)), num_splits=3)
    state = model.state_dict(keep_vars=True)
    again = convert_sync_split_batchnorm(model, num_splits=3)
    assert again is model
    for name, value in again.state_dict(keep_vars=True).items():
        assert value is state[name] or value.data_ptr() == state[name].data_ptr()
    assert list(again.state_dict()) == list(state)


def test_other_norms_are_left_alone():
    others = [
        nn.InstanceNorm2d(4, affine=True),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        nn.LocalResponseNorm(2),
    ]
    model = nn.Sequential(*others, nn.BatchNorm2d(4))
    convert_sync_split_batchnorm(model)
    assert [type(module) for module in model[:4]] == [type(module) for module in others]
    assert type(model[4]) is SyncSplitBatchNorm


def test_stock_synchronized_norm_converts_and_reverts():
    stock = nn.SyncBatchNorm(4, eps=0.1)
    layer = convert_sync_split_batchnorm(stock)
    assert layer(torch.randn(6, 4)).shape == (6, 4)
    back = revert_sync_split_batchnorm(layer, split=1)
    assert type(back) is nn.SyncBatchNorm
    assert back.process_group is None
    assert back.eval()(torch.randn(3, 4)).shape == (3, 4)


def test_norm_without_bias_and_norm_on_meta_convert():
    plain = nn.BatchNorm2d(4, device="meta")
    plain.register_parameter("bias", None)
    layer = convert_sync_split_batchnorm(plain, num_splits=3)
    assert layer.aux_bn[1].weight.is_meta
    assert layer.aux_bn[1].bias is None
    assert layer(torch.empty(3, 4, 2, 2, device="meta")).is_meta


def test_shared_affine_conversion_keeps_one_weight():
    model = nn.Sequential(nn.BatchNorm1d(4))
    names = [name for name, _ in model.named_parameters()]
    convert_sync_split_batchnorm(model, num_splits=3, share_affine=True)
    assert [name for name, _ in model.named_parameters()] == names
    model(torch.randn(6, 4))
    mean = model[0].aux_bn[1].running_mean.clone()
    back = revert_sync_split_batchnorm(model, split=2)[0]
    assert back.running_mean.equal(mean)


class Act(nn.BatchNorm2d):
    """Stands for a batch norm with more in its forward than we know."""

    def forward(self, input):
        return super().forward(input).relu()


class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.first = nn.BatchNorm2d(4)
        self.block = nn.Sequential(nn.Identity(), norm)


def parametrized():
    class Double(nn.Module):
        def forward(self, value):
            return 2 * value

    norm = nn.BatchNorm2d(4)
    parametrize.register_parametrization(norm, "weight", Double())
    return norm


def patched():
    norm = nn.BatchNorm2d(4)
    norm.forward = norm.forward
    return norm


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (lambda: Act(4), "forward of a known batch norm, got a Act with one of its own"),
        (patched, "forward of a known batch norm"),
        (lambda: nn.LazyBatchNorm2d(), "know its number of features, got an uninitialized Lazy"),
        (parametrized, "hold weight and bias as parameters, got a parametrized"),
    ],
)
def test_norm_that_would_lose_something_is_refused_by_path_and_nothing_is_converted(norm, message):
    model = Net(norm())
    with pytest.raises(TypeError, match=rf"^module 'block\.1' must .*{message}"):
        convert_sync_split_batchnorm(model)
    assert type(model.first) is nn.BatchNorm2d


def test_initialized_lazy_norm_converts():
    norm = nn.LazyBatchNorm2d()
    norm(torch.randn(2, 4, 3, 3))
    assert type(convert_sync_split_batchnorm(norm)) is SyncSplitBatchNorm


def test_other_number_of_splits_is_refused():
    model = convert_sync_split_batchnorm(nn.Sequential(nn.BatchNorm1d(4)), num_splits=3)
    with pytest.raises(ValueError, match=r"module '0' must have num_splits=2 .*num_splits=3"):
        convert_sync_split_batchnorm(model, num_splits=2)
    with pytest.raises(ValueError, match=r"share_affine=True as asked, got .*share_affine=False"):
        convert_sync_split_batchnorm(model, num_splits=3, share_affine=True)
    with pytest.raises(ValueError, match="num_splits must be at least 1, got 0"):
        convert_sync_split_batchnorm(model, num_splits=0)


def test_model_without_batch_norm_warns():
    with pytest.warns(UserWarning, match="must contain a batch norm to be converted, got Linear"):
        convert_sync_split_batchnorm(nn.Linear(2, 2))
    with pytest.warns(UserWarning, match="must contain a SyncSplitBatchNorm to be reverted"):
        revert_sync_split_batchnorm(nn.BatchNorm1d(2))


@pytest.mark.parametrize("function", [convert_sync_split_batchnorm, revert_sync_split_batchnorm])
def test_what_is_no_module_is_refused(function):
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got dict"):
        function({})


def test_revert_needs_a_split_and_a_class_to_return_to():
    model = convert_sync_split_batchnorm(nn.Sequential(nn.BatchNorm1d(4)))
    with pytest.raises(ValueError, match=r"from 0 to num_splits - 1 = 1 in module '0', got 2"):
        revert_sync_split_batchnorm(model, split=2)
    with pytest.raises(TypeError, match="split must be an int, got float"):
        revert_sync_split_batchnorm(model, split=0.5)
    with pytest.raises(TypeError, match="must be converted from a plain batch norm to be reverted"):
        revert_sync_split_batchnorm(SyncSplitBatchNorm(4))


def wrapped(rank, world_size):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    ddp = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match="or prepared yet, got DistributedDataPara"):
        convert_sync_split_batchnorm(ddp)
    with pytest.raises(RuntimeError, match="module 'inner' must not be wrapped"):
        convert_sync_split_batchnorm(nn.ModuleDict({"inner": ddp}))
    from torch.distributed.fsdp import fully_shard

    sharded = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    fully_shard(sharded)
    with pytest.raises(RuntimeError, match="or prepared yet, got FSDPSequential"):
        convert_sync_split_batchnorm(sharded)


def test_wrapped_model_is_refused(tmp_path):
    run_ranks(wrapped, 2, tmp_path)


def test_data_parallel_is_refused():
    layer = SyncSplitBatchNorm(4)
    with pytest.raises(RuntimeError, match=r"one process per device, got nn\.DataParallel"):
        layer._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="must not be wrapped or prepared yet, got DataParallel"):
        convert_sync_split_batchnorm(nn.DataParallel(nn.BatchNorm1d(3)))


def with_group(rank, world_size):
    group = sync_group(1)
    stock = nn.SyncBatchNorm(4, process_group=group)
    model = convert_sync_split_batchnorm(nn.Sequential(stock, nn.Sequential(nn.BatchNorm1d(4))))
    kept = model[0].process_group is group and model[1][0].process_group is None
    convert_sync_split_batchnorm(model, process_group=group)
    return kept and model[0].process_group is model[1][0].process_group is group


def test_process_group_is_kept_and_reaches_every_layer(tmp_path):
    assert run_ranks(with_group, 2, tmp_path) == [True, True]


def test_converter_does_not_import_timm():
    code = (
        "import sys, torch; from sync_splitbn import convert_sync_split_batchnorm as convert\n"
        "convert(torch.nn.BatchNorm2d(4)); assert 'timm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

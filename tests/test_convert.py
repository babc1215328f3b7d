"""Conversion keeps everything, refuses what it would lose, and can be reverted exactly."""

import copy
import pickle
import re
import subprocess
import sys
from typing import Generic, TypeVar

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
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
    norm.bias._no_weight_decay = True
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
    assert layer.aux_bn[0].bias._no_weight_decay
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


class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.first = nn.BatchNorm2d(4)
        self.block = nn.Sequential(nn.Identity(), norm)


def assert_refused(norm, error, message):
    """`norm` is refused with its path, and nothing else in its model is converted."""
    model = Net(norm)
    before, state = type(norm), list(model.state_dict())
    with pytest.raises(error, match=message):
        convert_sync_split_batchnorm(model)
    assert type(model.first) is nn.BatchNorm2d
    assert type(norm) is before
    assert list(model.state_dict()) == state


class Frozen(nn.BatchNorm2d):
    """A batch norm that stays in evaluation, as detection models have it."""

    def train(self, mode=True):
        return super().train(False)


def test_frozen_batch_norm_is_refused():
    """Its `forward` is the stock one: it became a layer that trains, without a word."""
    assert_refused(
        Frozen(4),
        TypeError,
        r"module 'block\.1' must have the methods of a known .*got "
        r"Frozen with its own train, which conversion would drop; replace that layer",
    )


REDEFINED = [
    *("forward", "train", "eval", "to", "half", "_apply", "state_dict", "load_state_dict"),
    *("_load_from_state_dict", "_save_to_state_dict", "set_extra_state", "reset_running_stats"),
    *("reset_parameters", "named_parameters", "parameters", "requires_grad_", "register_parameter"),
    *("_call_impl", "__call__", "__setattr__", "__getattr__", "__getattribute__", "__delattr__"),
    *("__setstate__", "__getstate__", "__reduce_ex__", "__eq__"),
]


@pytest.mark.parametrize("base", [nn.BatchNorm2d, nn.SyncBatchNorm], ids=lambda base: base.__name__)
@pytest.mark.parametrize("name", REDEFINED)
def test_subclass_that_redefines_a_method_is_refused_by_its_name(name, base):
    def method(self, *args, **kwargs):
        return getattr(base, name)(self, *args, **kwargs)

    own = type("Own", (base,), {name: method, "__hash__": base.__hash__})
    assert_refused(own(4), TypeError, rf"module 'block\.1' .* got Own with its own {name}, ")


class Freeze:
    def train(self, mode=True):
        return super().train(False)


SUBCLASSES = {
    "train": type("Mixed", (Freeze, nn.BatchNorm2d), {}),
    "__deepcopy__": type("Copied", (nn.BatchNorm2d,), {"__deepcopy__": lambda self, memo: self}),
    "eval": type("Without", (nn.BatchNorm2d,), {"eval": None}),
    "training": type("Off", (nn.BatchNorm2d,), {"training": property(bool, lambda *_: None)}),
    "forward": type("Plain", (_BatchNorm,), {"forward": nn.Module.forward}),
    "eval, train": type("Two", (Frozen,), {"eval": Frozen.train}),
}


@pytest.mark.parametrize("names", SUBCLASSES)
def test_mixin_property_and_deleted_method_count_as_redefined(names):
    assert_refused(SUBCLASSES[names](4), TypeError, rf"with its own {names}, which")


@pytest.mark.parametrize("name", ["forward", "train", "eval", "_apply", "state_dict"])
def test_method_replaced_on_the_instance_is_refused(name):
    norm = nn.BatchNorm2d(4)
    setattr(norm, name, getattr(norm, name))
    assert_refused(norm, TypeError, rf"got BatchNorm2d with its own {name}, which")


T = TypeVar("T")


class Harmless(nn.BatchNorm2d, Generic[T]):
    """What no training, evaluation or state depends on."""

    __constants__ = ("extra",)
    momentum: float = 0.3
    factor = 2.0

    def __init__(self, num_features, extra=None):
        super().__init__(num_features)
        self.extra = extra

    def __repr__(self):
        return "Harmless()"

    def extra_repr(self):
        return "nothing"

    def _get_name(self):
        return "Name"

    def _check_input_dim(self, input):
        return None

    def __len__(self):
        return self.num_features

    def fused_weight(self):
        return self.weight / (self.running_var + self.eps).sqrt()

    @property
    def width(self):
        return self.num_features


class AnyRank(_BatchNorm):
    """As mmengine has it."""

    def _check_input_dim(self, input):
        return None


@pytest.mark.parametrize("kind", [Harmless, AnyRank, type("Deep", (Harmless, AnyRank), {})])
def test_subclass_without_a_method_of_its_own_converts_and_reverts(kind):
    norm = used(kind(4), (6, 4, 3, 3)).eval()
    x = torch.randn(3, 4, 2, 2)
    expected = norm(x)
    layer = convert_sync_split_batchnorm(norm)
    assert type(layer) is SyncSplitBatchNorm
    assert layer(x).equal(expected)
    assert type(revert_sync_split_batchnorm(layer)) is kind


def test_class_derived_from_the_layer_is_left_as_it_is():
    class Own(SyncSplitBatchNorm):
        def forward(self, input):
            return super().forward(input).relu()

    model = convert_sync_split_batchnorm(nn.Sequential(nn.BatchNorm2d(4), Own(4)))
    assert [type(module) for module in model] == [SyncSplitBatchNorm, Own]


def parametrized():
    class Double(nn.Module):
        def forward(self, value):
            return 2 * value

    norm = nn.BatchNorm2d(4)
    parametrize.register_parametrization(norm, "weight", Double())
    return norm


def loaded_lazy():
    """It has parameters, but num_features is 0."""
    norm = nn.LazyBatchNorm2d()
    norm.load_state_dict(nn.BatchNorm2d(4).state_dict())
    return norm


def nested():
    norm = nn.BatchNorm2d(4)
    norm.aux_bn = nn.ModuleList([nn.BatchNorm2d(4)])
    return norm


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (nn.LazyBatchNorm2d, "must know its number of features, got LazyBatchNorm2d; run one"),
        (loaded_lazy, "must know its number of features, got LazyBatchNorm2d; run one"),
        (parametrized, "must hold weight and bias as parameters, got a parametrized Par"),
        (nested, "must have no child aux_bn, got BatchNorm2d"),
    ],
    ids=["lazy", "loaded-lazy", "parametrized", "aux_bn"],
)
def test_norm_that_would_lose_something_is_refused(norm, message):
    assert_refused(norm(), TypeError, rf"^module 'block\.1' {message}")


@pytest.mark.parametrize("eps", [0, 0.0, -1e-5, float("nan"), float("inf")])
def test_eps_must_be_positive_in_construction_and_conversion(eps):
    assert_refused(
        nn.BatchNorm2d(4, eps=eps), ValueError, rf"eps must be positive.* got {eps}.*'block\.1'"
    )
    with pytest.raises(ValueError, match=f"eps must be positive.* got {eps}"):
        SyncSplitBatchNorm(4, eps=eps)
    model = convert_sync_split_batchnorm(nn.Sequential(nn.BatchNorm2d(4)))
    model[0].eps = eps
    with pytest.raises(ValueError, match=r"eps must be positive.*module '0'"):
        convert_sync_split_batchnorm(model)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_tensor_that_does_not_fit_num_features_is_refused(name):
    """Pruning of channels forgets the number; zero.Init of DeepSpeed empties parameters."""
    norm = nn.BatchNorm2d(4)
    getattr(norm, name).data = torch.ones(3)
    message = rf"{name} must have shape \[num_features\] = \[4\] in module 'block\.1', got \[3\]"
    assert_refused(norm, ValueError, message)


@pytest.mark.parametrize("left", [0, 4])
@pytest.mark.parametrize("name", ["weight", "running_var", "num_batches_tracked"])
def test_tensor_with_freed_storage_is_refused(name, left):
    """To copy it crashes the process, or reads what is another's."""
    norm = nn.BatchNorm2d(4)
    getattr(norm, name).untyped_storage().resize_(left)
    message = rf"{name} must have memory in module 'block\.1', got a tensor whose storage was"
    assert_refused(norm, ValueError, message)


@pytest.mark.parametrize("which", [0, 1])
def test_parametrized_layer_is_not_reverted(which):
    """It left a batch norm without its weight."""
    model = convert_sync_split_batchnorm(nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    holder = model[1] if which == 0 else model[1].aux_bn[0]
    nn.utils.parametrize.register_parametrization(holder, "weight", nn.Softplus())
    path = "1" if which == 0 else "1.aux_bn.0"
    with pytest.raises(TypeError, match=f"module '{path}' must hold weight and bias as parameters"):
        revert_sync_split_batchnorm(model, split=which)
    assert all(isinstance(layer, SyncSplitBatchNorm) for layer in model)


class Unique(torch.Tensor):
    def clone(self):
        raise RuntimeError("there is one of me")


def test_nothing_is_converted_where_a_copy_fails():
    norm = nn.BatchNorm2d(4)
    norm.running_mean = torch.ones(4).as_subclass(Unique)
    assert_refused(norm, RuntimeError, "there is one of me")


def test_layer_is_made_and_converted_with_fake_tensors():
    """Stock batch norm is made so too; copy.deepcopy fails on its counter."""
    with FakeTensorMode():
        for layer in (SyncSplitBatchNorm(4), convert_sync_split_batchnorm(nn.BatchNorm1d(4))):
            assert isinstance(layer.aux_bn[0].num_batches_tracked, FakeTensor)


def test_buffer_with_a_graph_behind_it_is_copied_without():
    norm = nn.BatchNorm1d(4)
    norm.running_mean = norm.running_mean * torch.ones(4, requires_grad=True)
    layer = convert_sync_split_batchnorm(norm)
    assert layer.running_mean.requires_grad
    assert not layer.aux_bn[0].running_mean.requires_grad


def test_layer_without_counters_is_copied_reset_saved_and_loaded():
    """Stock batch norm computes without them, but cannot be reset."""
    plain = nn.BatchNorm1d(4)
    plain.num_batches_tracked = None
    plain(torch.randn(5, 4))
    state = copy.deepcopy(plain.state_dict())
    layer = convert_sync_split_batchnorm(plain, num_splits=3)
    assert not any("num_batches" in name for name in layer.state_dict())
    twin = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert twin.aux_bn[1].num_batches_tracked is None
    twin.reset_running_stats()
    assert twin.aux_bn[1].running_mean.equal(torch.zeros(4))
    twin.load_state_dict(layer.state_dict())
    assert twin.aux_bn[1].running_mean.equal(layer.running_mean)
    twin.load_state_dict(state)
    back = revert_sync_split_batchnorm(twin, split=2)
    assert list(back.state_dict()) == list(state)
    assert back.num_batches_tracked is None


def test_split_checkpoint_without_counters_loads_as_in_timm():
    """A state dict without metadata counts as version 1 of batch norm, which had no counter."""
    layer = SyncSplitBatchNorm(4, num_splits=3)
    layer.num_batches_tracked += 5
    layer.aux_bn[1].running_mean += 1
    state = {k: v for k, v in layer.state_dict().items() if "num_batches" not in k}
    fresh = SyncSplitBatchNorm(4, num_splits=3)
    fresh.load_state_dict(state)
    assert fresh.aux_bn[1].running_mean.equal(torch.ones(4))
    assert fresh.num_batches_tracked == fresh.aux_bn[1].num_batches_tracked == 0
    current = layer.state_dict()
    del current["aux_bn.1.num_batches_tracked"]
    with pytest.raises(RuntimeError, match=r"Missing key.*aux_bn\.1\.num_batches_tracked"):
        fresh.load_state_dict(current)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_conversion_by_another_converter_is_refused(num_splits):
    """The splits would be lost: the other layer has no use for `aux_bn`."""
    model = convert_sync_split_batchnorm(nn.Sequential(nn.BatchNorm2d(4)), num_splits)
    message = "must not be converted by another.* auxiliaries moved to a SyncBatchNorm; it is sync"
    with pytest.raises(RuntimeError, match=message):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[0]) is SyncSplitBatchNorm
    other = nn.BatchNorm2d(4)
    with pytest.raises(RuntimeError, match="auxiliaries moved to a BatchNorm2d"):
        other.aux_bn = model[0].aux_bn


def test_layers_and_their_children_go_into_other_modules_as_ever():
    model = convert_sync_split_batchnorm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    nn.ModuleList(model.modules())
    nn.Sequential(*model.children())
    nn.ModuleDict(dict(model[1].named_children()))
    for twin in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert list(twin.state_dict()) == list(model.state_dict())
        assert isinstance(twin[1].aux_bn, nn.ModuleList)
    model[1].aux_bn = model[1].aux_bn[:]
    plain = nn.BatchNorm1d(4)
    plain.aux_bn = nn.ModuleList()
    assert list(plain.children()) == [plain.aux_bn]


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
    for split in (2, -1):
        message = rf"from 0 to num_splits - 1 = 1 in module '0', got {split}"
        with pytest.raises(ValueError, match=message):
            revert_sync_split_batchnorm(model, split=split)
    for split in (0.5, True):
        with pytest.raises(TypeError, match=f"split must be an int, got {type(split).__name__}"):
            revert_sync_split_batchnorm(model, split=split)
    with pytest.raises(TypeError, match="must have been converted from a plain batch"):
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


def test_model_that_accelerate_has_prepared_is_reverted_and_not_converted():
    """Its mark stays on the model that `unwrap_model` returns."""
    model = convert_sync_split_batchnorm(nn.Sequential(nn.BatchNorm2d(4)))
    model._is_accelerate_prepared = True
    assert type(revert_sync_split_batchnorm(model)[0]) is nn.BatchNorm2d
    with pytest.raises(RuntimeError, match="must not be wrapped or prepared yet, got Sequential"):
        convert_sync_split_batchnorm(model)


def test_process_group_of_another_kind_is_refused_before_any_layer_changes():
    model = nn.Sequential(nn.BatchNorm2d(4))
    with pytest.raises(TypeError, match="process_group must be a torch"):
        convert_sync_split_batchnorm(model, process_group="all")
    assert type(model[0]) is nn.BatchNorm2d


def test_batch_norm_inside_a_batch_norm_is_left_alone():
    outer = nn.BatchNorm2d(4)
    outer.inner = nn.BatchNorm2d(4)
    convert_sync_split_batchnorm(outer)
    assert type(outer) is SyncSplitBatchNorm
    assert type(outer.inner) is nn.BatchNorm2d


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


@pytest.mark.parametrize(
    ("plain", "shape"),
    [
        (nn.BatchNorm1d, (4, 3, 2, 2)),
        (nn.BatchNorm2d, (4, 3, 2)),
        (nn.BatchNorm3d, (4, 3, 2, 2)),
    ],
)
def test_converted_layer_refuses_the_dimensions_that_the_plain_one_refuses(plain, shape):
    x = torch.randn(shape)
    with pytest.raises(ValueError, match=r"expected .* input") as expected:
        plain(3)(x)
    with pytest.raises(ValueError, match=re.escape(str(expected.value))):
        convert_sync_split_batchnorm(plain(3), 2)(x)
    # A layer that was none before takes them all.
    SyncSplitBatchNorm(3, num_splits=2)(x)


def test_wrong_group_is_refused_before_anything_is_converted():
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(TypeError, match="process_group must be"):
        convert_sync_split_batchnorm(model, process_group="nccl")
    assert type(model[0]) is nn.BatchNorm1d

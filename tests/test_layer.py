"""The layer in one process: options, layouts, types, evaluation, state dict, copies."""

import contextlib
import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import CheckpointError, checkpoint

from sync_splitbn import SyncSplitBatchNorm, _kernels, assign_splits, frozen_stats

PLAIN = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
SHAPES = [(6, 5), (6, 5, 1), (6, 5, 7), (6, 5, 3, 4), (6, 5, 2, 3, 2), (6, 1, 3, 3)]
HALF = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # one rounding of an output near 2


@pytest.fixture(params=["default", "aten"], autouse=True)
def kernels(request, monkeypatch):
    """Run each test with the kernels that serve here by default, and with ATen's."""
    if request.param == "aten":
        monkeypatch.setattr(_kernels, "default_unavailable", lambda x: "not in this test")


def randomized(layer, seed=0):
    """Give every split its own parameters and statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in layer.state_dict(keep_vars=True).items():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            assert name
    return layer


def plain_parts(layer, dim):
    """Return a plain batch norm with the state of each split."""
    parts = []
    for stats in (layer, *layer.aux_bn):
        options = {"affine": layer.affine, "track_running_stats": layer.track_running_stats}
        part = PLAIN[dim](layer.num_features, layer.eps, layer.momentum, **options)
        own = {k: v for k, v in stats.state_dict().items() if "aux_bn" not in k}
        if layer.affine and layer.bias is None:
            part.register_parameter("bias", None)
        part.load_state_dict(own)
        parts.append(part.train(layer.training))
    return parts


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"affine": False},
        {"bias": False},
        {"track_running_stats": False},
        {"eps": 0.1, "momentum": 0.5},
        {"num_splits": 1},
    ],
    ids=str,
)
def test_layer_equals_a_plain_batch_norm_per_chunk(shape, options):
    torch.manual_seed(0)
    layer = randomized(SyncSplitBatchNorm(shape[1], **{"num_splits": 3, **options}))
    parts = plain_parts(layer, len(shape))
    for _ in range(2):
        x = torch.randn(shape, requires_grad=True)
        dy = torch.randn(shape)
        ours = layer(x)
        chunks = x.chunk(layer.num_splits)
        theirs = torch.cat([part(chunk) for part, chunk in zip(parts, chunks, strict=True)])
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=5e-6)
        leaves = [x, *layer.parameters()], [x, *(p for part in parts for p in part.parameters())]
        for a, b in zip(
            *(torch.autograd.grad(y, ls, dy) for y, ls in zip((ours, theirs), leaves, strict=True)),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for stats, part in zip((layer, *layer.aux_bn), parts, strict=True):
        for name, value in part.named_buffers():
            torch.testing.assert_close(getattr(stats, name), value, rtol=1e-5, atol=1e-6)


def test_layer_with_one_split_equals_plain_batch_norm_in_float64():
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(4).double()
    layer = SyncSplitBatchNorm(4, num_splits=1, dtype=torch.float64)
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-13, atol=1e-13)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value, rtol=1e-13, atol=1e-13)


def test_shared_affine_sums_the_gradients_of_all_splits():
    torch.manual_seed(0)
    x, dy = torch.randn(6, 4, 3), torch.randn(6, 4, 3)
    shared = SyncSplitBatchNorm(4, share_affine=True)
    apart = SyncSplitBatchNorm(4)
    torch.testing.assert_close(shared(x), apart(x))
    shared(x).backward(dy)
    apart(x).backward(dy)
    torch.testing.assert_close(shared.weight.grad, apart.weight.grad + apart.aux_bn[0].weight.grad)
    torch.testing.assert_close(shared.bias.grad, apart.bias.grad + apart.aux_bn[0].bias.grad)
    assert sorted(shared.aux_bn.state_dict()) == [
        "0.num_batches_tracked",
        "0.running_mean",
        "0.running_var",
    ]
    assert shared.aux_bn[0].running_mean.equal(apart.aux_bn[0].running_mean)


def layouts():
    torch.manual_seed(1)
    image, volume = torch.randn(4, 3, 5, 6), torch.randn(4, 3, 2, 5, 6)
    return {
        "contiguous": image,
        "channels_last": image.contiguous(memory_format=torch.channels_last),
        "channels_last_3d": volume.contiguous(memory_format=torch.channels_last_3d),
        "transposed": torch.randn(4, 6, 3).transpose(1, 2),
        "columns first": torch.randn(3, 4).t(),
        "columns first, one position": torch.randn(3, 16).t().unsqueeze(2),
        "broadcast rows": torch.randn(1, 3).expand(4, -1),
        "every other": torch.randn(4, 6, 5, 12)[:, ::2, :, ::2],
        "expanded": torch.randn(4, 3, 1, 1).expand(-1, -1, 5, 6),
    }


@pytest.mark.parametrize("layout", layouts())
def test_layout_does_not_change_the_result(layout):
    x = layouts()[layout].requires_grad_()
    dense = x.detach().contiguous().requires_grad_()
    dy = torch.randn(x.shape)  # contiguous: the gradient's layout may differ from the input's
    for module in (SyncSplitBatchNorm(3), SyncSplitBatchNorm(3).eval()):
        y, expected = module(x), copy.deepcopy(module)(dense)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
        (dx,) = torch.autograd.grad(y, x, dy)
        torch.testing.assert_close(
            dx, *torch.autograd.grad(expected, dense, dy), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("how", ["equal", "index"])
@pytest.mark.parametrize("layout", ["channels_last", "channels_last_3d", "contiguous"])
def test_memory_format_of_input_is_kept(layout, how):
    x = layouts()[layout].requires_grad_()
    memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()]
    layer = SyncSplitBatchNorm(3)
    index = {"index": torch.tensor([0, 1, 1, 0])} if how == "index" else {"sizes": (2, 2)}
    with assign_splits(layer, **index):
        y = layer(x)
        (dx,) = torch.autograd.grad(y, x, torch.randn_like(x))
    for tensor in (y, dx, layer.eval()(x)):
        assert tensor.is_contiguous(memory_format=memory_format) == ("last" in layout)


def test_strides_of_input_are_kept_where_no_memory_format_has_them():
    x = layouts()["transposed"].requires_grad_()
    y = SyncSplitBatchNorm(3)(x)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(x))
    assert y.stride() == dx.stride() == x.stride()


@pytest.mark.parametrize("parameters", ["same", "float32"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_half_precision_input_differs_by_one_rounding(dtype, parameters, training):
    torch.manual_seed(0)
    layer = randomized(SyncSplitBatchNorm(4)).train(training)
    layer = layer.to(dtype) if parameters == "same" else layer
    exact = copy.deepcopy(layer).double()
    x = torch.randn(6, 4, 8, 8).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    dy = torch.randn_like(x)
    y, truth = layer(x), exact(wide)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), truth, rtol=HALF[dtype], atol=HALF[dtype])
    y.backward(dy)
    truth.backward(dy.double())
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=4 * HALF[dtype], atol=HALF[dtype])
    for a, b in zip(layer.parameters(), exact.parameters(), strict=True):
        assert a.grad is None or a.grad.dtype == a.dtype
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=2 * HALF[dtype], atol=HALF[dtype])
    for a, b in zip(layer.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=HALF[dtype], atol=HALF[dtype])


@pytest.mark.parametrize("training", [True, False])
def test_any_parameter_type_goes_with_any_input_type(training):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5)
    for parameter in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        layer = SyncSplitBatchNorm(3, dtype=parameter).train(training)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            y = layer(x.to(dtype))
            assert y.dtype == dtype
            expected = SyncSplitBatchNorm(3).train(training)(x)
            torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)


def test_half_precision_counts_are_exact_and_do_not_overflow():
    """Counts in half precision are wrong above 2,048 and infinite above 65,504 (pytorch#70901)."""
    layer = SyncSplitBatchNorm(1, num_splits=2, dtype=torch.float16)
    x = torch.randn(2, 1, 70001).half()
    layer(x)
    expected = 0.9 + 0.1 * x[1].double().var()
    torch.testing.assert_close(
        layer.aux_bn[0].running_var.double(), expected.view(1), rtol=1e-3, atol=0
    )


def test_autocast_changes_neither_statistics_nor_output_type():
    torch.manual_seed(0)
    layer, twin = SyncSplitBatchNorm(4), SyncSplitBatchNorm(4)
    x = torch.randn(6, 4, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.equal(twin(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.bfloat16()).dtype == torch.bfloat16
        assert (
            SyncSplitBatchNorm(4, track_running_stats=False)(x.bfloat16()).dtype == torch.bfloat16
        )


def test_evaluation_takes_split_0_unless_assigned():
    torch.manual_seed(0)
    layer = randomized(SyncSplitBatchNorm(4, eps=0.1, num_splits=3)).eval()
    parts = plain_parts(layer, 4)
    x = torch.randn(6, 4, 3, 3)
    alone = [part(x) for part in parts]
    assert layer(x).equal(alone[0])
    for k in range(3):
        with assign_splits(layer, only=k):
            assert layer(x).equal(alone[k])
            with torch.no_grad():
                assert layer(x).equal(alone[k])
    with assign_splits(layer, sizes=(1, 0, 5)):
        torch.testing.assert_close(layer(x), torch.cat([alone[0][:1], alone[2][1:]]))
    index = torch.tensor([2, 0, 1, 1, 0, 2])
    with assign_splits(layer, index=index):
        expected = torch.stack([alone[k][i] for i, k in enumerate(index)])
        torch.testing.assert_close(layer(x), expected)


def test_evaluation_without_running_statistics_uses_the_batch_as_split_0():
    torch.manual_seed(0)
    layer = randomized(SyncSplitBatchNorm(4, track_running_stats=False)).eval()
    x = torch.randn(5, 4, 3)
    expected = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (4, 3, 0), (0, 3, 0)], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_empty_on_all_ranks_changes_nothing(shape, momentum):
    """Others let running statistics decay here, or fill them with NaN (pytorch#36530)."""
    layer = randomized(SyncSplitBatchNorm(3, momentum=momentum))
    before = copy.deepcopy(layer.state_dict())
    x = torch.zeros(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert layer.weight.grad.equal(torch.zeros(3))
    for name, value in layer.state_dict().items():
        assert value.equal(before[name]), name
    assert layer.eval()(x).shape == shape


def test_one_element_per_channel_leaves_running_var_alone():
    """n / (n - 1) makes NaN or infinity of it elsewhere."""
    layer = randomized(SyncSplitBatchNorm(3))
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(2, 3, 1, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y[0, :, 0], layer.bias)
    y.sum().backward()
    assert x.grad.equal(torch.zeros_like(x))
    assert layer.running_var.equal(before["running_var"])
    torch.testing.assert_close(
        layer.running_mean, 0.9 * before["running_mean"] + 0.1 * x.detach()[0, :, 0]
    )
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("num_splits", [16, 70])
def test_many_splits_and_many_rows_fit(num_splits):
    layer = SyncSplitBatchNorm(2, num_splits=num_splits)
    x = torch.randn(num_splits * 1000, 2, requires_grad=True)
    layer(x).square().sum().backward()
    expected = 0.1 * x.detach()[-1000:].mean(0)
    torch.testing.assert_close(layer.aux_bn[-1].running_mean, expected)


def test_layer_whose_running_statistics_were_taken_away_uses_the_batch():
    layer = SyncSplitBatchNorm(3)
    for stats in (layer, *layer.aux_bn):
        stats.running_mean = stats.running_var = stats.num_batches_tracked = None
    x = torch.randn(6, 3)
    assert layer(x).equal(SyncSplitBatchNorm(3)(x))


def test_nan_stays_in_its_split():
    for assigned in ({"sizes": (2, 2)}, {"index": torch.tensor([1, 0, 1, 0])}):
        layer = SyncSplitBatchNorm(3)
        x = torch.randn(4, 3, 2)
        x[0] = float("nan")
        with assign_splits(layer, **assigned):
            y = layer(x)
        split = 0 if "sizes" in assigned else 1
        sick = (layer, layer.aux_bn[0])[split]
        assert sick.running_mean.isnan().all()
        assert y.isnan().any(dim=(1, 2)).sum() == 2
        assert not (layer, layer.aux_bn[0])[1 - split].running_mean.isnan().any()


def test_frozen_stats_uses_the_batch_and_remembers_nothing():
    torch.manual_seed(0)
    layer = randomized(SyncSplitBatchNorm(4))
    before, twin = copy.deepcopy(layer.state_dict()), copy.deepcopy(layer)
    x = torch.randn(6, 4)
    with frozen_stats(layer), frozen_stats(layer):
        assert layer(x).equal(twin(x))
    for name, value in layer.state_dict().items():
        assert value.equal(before[name]), name
    layer(x)
    assert layer.num_batches_tracked == layer.aux_bn[0].num_batches_tracked == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_counts_a_batch_once(reentrant):
    """Its second forward updates running statistics again elsewhere (pytorch#96136)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), SyncSplitBatchNorm(4), nn.Tanh(), nn.Linear(4, 1))
    twin = copy.deepcopy(model)
    x = torch.randn(40, 4, requires_grad=True)
    y = checkpoint(model, x, use_reentrant=reentrant)
    once = copy.deepcopy(model.state_dict())
    y.square().sum().backward()
    for name, value in model.state_dict().items():
        assert value.equal(once[name]), f"the second forward moved {name}"
    twin(x).square().sum().backward()
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert a.equal(b), name
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert model[1].num_batches_tracked == 1


ROWS = {
    "equal": {"sizes": (4, 4)},
    "uneven": {"sizes": (3, 5)},
    "uneven otherwise": {"sizes": (5, 3)},
    "index": {"index": torch.tensor([0, 1] * 4)},
}


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(ROWS, 2)))
def test_second_forward_of_checkpointing_with_other_rows_is_refused(first, second):
    model, x = nn.Sequential(nn.Linear(4, 4), SyncSplitBatchNorm(4), nn.Tanh()), torch.randn(8, 4)
    with assign_splits(model, **ROWS[first]):
        y = checkpoint(model, x, use_reentrant=False)
    with pytest.raises(CheckpointError), assign_splits(model, **ROWS[second]):
        y.sum().backward()


def test_input_without_gradient_leaves_the_parameters_theirs():
    torch.manual_seed(0)
    norm, x, dy = SyncSplitBatchNorm(3), *torch.randn(2, 8, 3, 6, 6)
    norm(x).backward(dy)
    part = x[4:].double()
    centred = part - part.mean((0, 2, 3), keepdim=True)
    centred /= (part.var((0, 2, 3), correction=0, keepdim=True) + norm.eps).sqrt()
    expected = (dy[4:].double() * centred).sum((0, 2, 3))
    torch.testing.assert_close(norm.aux_bn[0].weight.grad.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.bias.grad, dy[:4].sum((0, 2, 3)))


def test_frozen_parameters_get_no_gradient_and_leave_the_others_theirs():
    torch.manual_seed(0)
    layer, x, dy = SyncSplitBatchNorm(3), *torch.randn(2, 8, 3, 4)
    twin, leaves = copy.deepcopy(layer), [x.clone().requires_grad_() for _ in range(2)]
    layer.bias.requires_grad_(False)
    layer.aux_bn[0].weight.requires_grad_(False)
    for norm, leaf in ((layer, leaves[0]), (twin, leaves[1])):
        norm(leaf).backward(dy)
    assert layer.bias.grad is None
    assert layer.aux_bn[0].weight.grad is None
    assert leaves[0].grad.equal(leaves[1].grad)
    assert layer.weight.grad.equal(twin.weight.grad)
    assert layer.aux_bn[0].bias.grad.equal(twin.aux_bn[0].bias.grad)


def test_statistics_saved_for_a_backward_pass_are_guarded():
    """Autograd refuses to use what a training step has moved since."""
    torch.manual_seed(0)
    norm, x = SyncSplitBatchNorm(3), torch.randn(4, 3, 5, 5)
    y = norm.eval()(x)
    norm.train()(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_running_statistics_of_any_type_are_updated(dtype):
    torch.manual_seed(0)
    norm, x = SyncSplitBatchNorm(3, momentum=0.5).to(dtype), torch.randn(8, 3, 6, 6) + 2
    norm(x.to(dtype))
    part = x.to(dtype)[4:].double()
    for found, expected in (
        (norm.aux_bn[0].running_mean, part.mean((0, 2, 3)) / 2),
        (norm.aux_bn[0].running_var, part.var((0, 2, 3)) / 2 + 0.5),
    ):
        tolerance = {8: 1e-12, 4: 1e-6, 2: 1e-2}[dtype.itemsize]
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    assert norm.aux_bn[0].num_batches_tracked == 1


def test_training_step_in_inference_mode_updates_the_running_statistics():
    torch.manual_seed(0)
    norm, twin, x = SyncSplitBatchNorm(3), SyncSplitBatchNorm(3), torch.randn(8, 3, 6, 6)
    with torch.inference_mode():
        y = norm(x)
        made_here = SyncSplitBatchNorm(3)
        made_here(x)
    assert y.equal(twin(x).detach())
    for layer in (norm, made_here):
        for (name, a), b in zip(layer.named_buffers(), twin.buffers(), strict=True):
            assert a.equal(b), name


@pytest.mark.parametrize("momentum", [0.1, None])
def test_layer_without_counters_counts_nothing(momentum):
    """As plain batch norm, which then has no average to take: momentum None moves nothing."""
    torch.manual_seed(0)
    layer, plain = SyncSplitBatchNorm(3, momentum=momentum), nn.BatchNorm1d(3, momentum=momentum)
    for stats in (layer, *layer.aux_bn, plain):
        stats.num_batches_tracked = None
    x = torch.randn(8, 3)
    layer(x)
    plain(x[:4])
    assert layer.num_batches_tracked is None
    torch.testing.assert_close(layer.running_mean, plain.running_mean)
    torch.testing.assert_close(layer.running_var, plain.running_var)


def test_layer_told_not_to_track_leaves_its_statistics():
    """As plain batch norm, which keeps the buffers it has."""
    layer = randomized(SyncSplitBatchNorm(3))
    before = copy.deepcopy(layer.state_dict())
    layer.track_running_stats = False
    layer(torch.randn(8, 3))
    for name, value in layer.state_dict().items():
        assert value.equal(before[name]), name


def test_counters_of_some_splits_alone_are_refused():
    layer = SyncSplitBatchNorm(3)
    layer.aux_bn[0].num_batches_tracked = None
    with pytest.raises(RuntimeError, match=r"num_batches_tracked must be .* in 1 of 2"):
        layer(torch.randn(4, 3))


def test_two_forwards_before_one_backward_give_the_gradients_of_both():
    """Buffers updated in place broke the first graph elsewhere (pytorch#22095)."""
    torch.manual_seed(0)
    layer, x = SyncSplitBatchNorm(3), torch.randn(4, 3, requires_grad=True)
    upstream = torch.randn(2, 4, 3)
    a, b = layer(x), layer(2 * x)
    (both,) = torch.autograd.grad((a * upstream[0]).sum() + (b * upstream[1]).sum(), x)
    (one,) = torch.autograd.grad((layer(x) * upstream[0]).sum(), x)
    (two,) = torch.autograd.grad((layer(2 * x) * upstream[1]).sum(), x)
    torch.testing.assert_close(both, one + two)


def test_activation_in_place_on_the_output_keeps_gradients():
    torch.manual_seed(0)
    layer, x, dy = SyncSplitBatchNorm(3), torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    grads = []
    for inplace in (True, False):
        leaf = x.clone().requires_grad_()
        nn.ReLU(inplace)(layer(leaf)).backward(dy)
        grads.append(leaf.grad)
    assert grads[0].equal(grads[1])


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("how", ["default", "sizes", "only", "index"])
def test_training_step_never_waits_for_the_device(how, momentum):
    """Meta tensors hold no numbers: an `.item()` or a boolean mask raises on them."""
    layer = SyncSplitBatchNorm(4, momentum=momentum, device="meta")
    x = torch.randn(6, 4, 2, device="meta", requires_grad=True)
    index = torch.zeros(6, dtype=torch.int64, device="meta")
    ways = {"sizes": {"sizes": (1, 5)}, "only": {"only": 1}, "index": {"index": index}}
    with assign_splits(layer, **ways[how]) if how in ways else contextlib.nullcontext():
        layer(x).sum().backward()
    assert x.grad.shape == x.shape


def test_state_dict_has_the_keys_of_timm():
    keys = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    auxiliary = [f"aux_bn.{i}.{key}" for i in range(2) for key in keys]
    assert list(SyncSplitBatchNorm(4, num_splits=3).state_dict()) == keys + auxiliary


@pytest.mark.parametrize("assign", [False, True])
def test_plain_checkpoint_loads_strictly_into_every_split(assign):
    plain = randomized(nn.BatchNorm2d(4))
    plain.num_batches_tracked += 7
    model = nn.Sequential(nn.Identity(), SyncSplitBatchNorm(4, num_splits=3))
    state = {f"1.{name}": value for name, value in plain.state_dict().items()}
    model.load_state_dict(state, assign=assign)
    for stats in (model[1], *model[1].aux_bn):
        for name, value in plain.state_dict().items():
            assert getattr(stats, name).equal(value)
    pointers = {value.data_ptr() for value in model.state_dict().values()}
    assert len(pointers) == 15, "the splits must not share memory"
    assert set(state) == {f"1.{name}" for name in plain.state_dict()}


def test_plain_checkpoint_without_a_counter_loads():
    state = nn.BatchNorm2d(4).state_dict()
    del state["num_batches_tracked"], state._metadata
    SyncSplitBatchNorm(4).load_state_dict(state)


def test_half_missing_checkpoint_is_refused():
    layer = SyncSplitBatchNorm(4, num_splits=3)
    state = layer.state_dict()
    del state["aux_bn.1.running_var"]
    with pytest.raises(RuntimeError, match=r"aux_bn\.1\.running_var"):
        layer.load_state_dict(state)


@pytest.mark.parametrize(("own", "given"), [(3, 2), (2, 3), (1, 2)])
def test_checkpoint_of_another_number_of_splits_is_refused_by_it(own, given):
    model = nn.Sequential(nn.Linear(3, 4), SyncSplitBatchNorm(4, num_splits=own))
    state = nn.Sequential(nn.Linear(3, 4), SyncSplitBatchNorm(4, num_splits=given)).state_dict()
    for strict in (True, False):
        with pytest.raises(RuntimeError) as refused:
            model.load_state_dict(state, strict)
        assert str(refused.value) == (
            f"state_dict must hold num_splits={own} splits of module '1', got {given}; convert the "
            f"model with num_splits={given}"
        )


@pytest.mark.parametrize(
    "given", [{}, *({name: torch.ones(4)} for name in ("weight", "aux_bn.0.bias", "aux_bn.1.bias"))]
)
def test_part_of_a_state_changes_what_it_holds_and_nothing_else(given):
    layer = randomized(SyncSplitBatchNorm(4, num_splits=3))
    for number, stats in enumerate(layer._splits()):
        stats.num_batches_tracked += 10 * number
    before = copy.deepcopy(layer.state_dict())
    layer.load_state_dict(given, strict=False)
    for name, value in layer.state_dict().items():
        assert value.equal(given.get(name, before[name])), name


def test_reset_reaches_every_split():
    layer = randomized(SyncSplitBatchNorm(4, num_splits=3))
    layer(torch.randn(6, 4))
    fresh = SyncSplitBatchNorm(4, num_splits=3)
    layer.reset_parameters()
    for (name, a), b in zip(layer.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert a.equal(b), name


def test_update_bn_recalibrates_the_split_it_is_given():
    """swa_utils.update_bn once left auxiliaries at their old mean."""
    layer = randomized(SyncSplitBatchNorm(3))
    data = [torch.randn(5, 3), torch.randn(5, 3)]
    with assign_splits(layer, only=1):
        torch.optim.swa_utils.update_bn(data, layer)
    torch.testing.assert_close(layer.aux_bn[0].running_mean, torch.cat(data).mean(0))
    assert layer.running_mean.equal(torch.zeros(3))
    assert layer.momentum == 0.1


def test_gradient_of_shared_bfloat16_parameters_is_rounded_once():
    layer = SyncSplitBatchNorm(1, num_splits=3, share_affine=True, dtype=torch.bfloat16)
    layer(torch.randn(6, 1)).backward(torch.full((6, 1), 128.5))
    # 771 becomes 772; each split's 257 by itself would become 256, and the sum 768.
    assert layer.bias.grad.item() == 772


def test_copies_forget_open_contexts_and_pickles_the_group():
    layer = SyncSplitBatchNorm(3)
    with assign_splits(layer, only=1), frozen_stats(layer):
        copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    for twin in copies:
        twin(torch.randn(4, 3))
        assert twin.num_batches_tracked == twin.aux_bn[0].num_batches_tracked == 1
        assert twin.process_group is None
        assert twin.weight is not layer.weight
    with assign_splits(layer, only=1), frozen_stats(layer):
        twin = copy.copy(layer)
    assert twin.weight is layer.weight
    assert twin(torch.randn(4, 3)).shape == (4, 3)
    assert twin.aux_bn[0].num_batches_tracked == twin.num_batches_tracked == 1


def test_parametrized_layer_is_copied():
    layer = SyncSplitBatchNorm(3)
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    twin = copy.deepcopy(layer)
    assert twin.parametrizations.weight.original is not layer.parametrizations.weight.original
    x = torch.randn(4, 3)
    assert twin(x).equal(layer(x))


def test_layer_without_channels_trains_on_nothing():
    layer, x = SyncSplitBatchNorm(0), torch.empty(4, 0, 2, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    assert layer.aux_bn[0].weight.grad.shape == (0,)


def test_evaluation_without_running_variance_is_refused():
    layer = SyncSplitBatchNorm(3).eval()
    layer.running_var = layer.aux_bn[0].running_var = None
    with pytest.raises(RuntimeError, match="running_var must be a tensor where running_mean is"):
        layer(torch.randn(4, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinite_running_variance_stays_infinite_as_in_stock(dtype):
    layer, x = SyncSplitBatchNorm(3, num_splits=1, dtype=dtype), torch.randn(8, 3)
    plain = nn.BatchNorm1d(3)
    for each in (layer, plain):
        each.running_var[1] = math.inf
        each(x)
    torch.testing.assert_close(layer.running_var.float(), plain.running_var, rtol=1e-2, atol=0)
    assert layer.eval()(x)[:, 1].equal(torch.zeros(8))


def test_layer_that_refers_to_itself_is_copied_with_its_reference():
    layer = SyncSplitBatchNorm(3)
    layer.layers = [layer]
    twin = copy.deepcopy(layer)
    assert twin.layers[0] is twin is not layer


def test_layer_is_made_on_meta_and_moved():
    layer = SyncSplitBatchNorm(3, device="meta")
    assert layer(torch.empty(4, 3, device="meta")).shape == (4, 3)
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.aux_bn[0].running_var.equal(torch.ones(3))


def test_layer_is_a_batch_norm_but_no_stock_synchronized_one():
    layer = SyncSplitBatchNorm(3)
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert not isinstance(layer, nn.SyncBatchNorm)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in layer.aux_bn.modules())
    assert all(parameter.ndim == 1 for parameter in layer.parameters())

"""W ranks equal one process with all their rows: outputs, gradients, buffers, collectives."""

import copy
import pickle

import oracle
import pytest
import torch
from ranks import Collectives, run_ranks
from torch import nn

from sync_splitbn import SyncSplitBatchNorm, assign_splits, frozen_stats, sync_group
from sync_splitbn._collectives import differentiable_all_reduce

SHAPE = (5, 3, 4)  # C, H, W
STEPS = 3

# The rows of each split on each rank.
SIZES = {
    "one rank": [(3, 5)],
    "equal": [(4, 4), (4, 4)],
    "uneven": [(1, 6), (5, 2)],
    "empty rank": [(0, 0), (5, 3)],
    "split empty on a rank": [(4, 0), (2, 3)],
    "split empty on all": [(4, 0, 1), (2, 0, 3)],
    "one element in a split": [(4, 1), (2, 0)],
    "one rank one split": [(6, 0), (0, 6)],
    "three ranks four splits": [(1, 2, 3, 4), (4, 3, 2, 1), (0, 5, 0, 5)],
    "one split": [(4,), (3,)],
}


def batches(sizes, step, shape=SHAPE):
    """Every rank's rows and upstream gradients at a step, different everywhere."""
    generator = torch.Generator().manual_seed(step)
    rows = [sum(rank_sizes) for rank_sizes in sizes]
    x = torch.randn(sum(rows), *shape, generator=generator)
    x = x * torch.linspace(0.5, 3, shape[0]).view(-1, *(1 for _ in shape[1:])) + 2
    dy = torch.randn(x.shape, generator=generator)
    return list(zip(x.split(rows), dy.split(rows), strict=True))


def layer_of(state, num_splits, **options):
    layer = SyncSplitBatchNorm(state.weight.shape[2], num_splits=num_splits, **options)
    with torch.no_grad():
        for s, stats in enumerate((layer, *layer.aux_bn)):
            stats.weight.copy_(state.weight[0, s])
            stats.bias.copy_(state.bias[0, s])
    return layer


def train(rank, world_size, sizes, how, options, shape):
    """Some steps of a layer; all that is to be compared."""
    state = oracle.State.initial(world_size, len(sizes[0]), shape[0])
    layer = layer_of(state, len(sizes[0]), **options)
    steps = []
    for step in range(STEPS):
        x, dy = batches(sizes, step, shape)[rank]
        ids = torch.repeat_interleave(torch.tensor(sizes[rank]))
        if how == "index":
            order = torch.randperm(len(x))
            x, dy, ids = x[order], dy[order], ids[order]
            assigned = {"index": ids}
        else:
            assigned = {"sizes": sizes[rank]}
        x = x.contiguous(memory_format=torch.channels_last) if how == "channels_last" else x
        x.requires_grad_()
        layer.zero_grad()
        with Collectives() as forward, assign_splits(layer, **assigned):
            y = layer(x)
        with Collectives() as backward:
            y.backward(dy)
        y, dx = y.detach(), x.grad
        if how == "index":
            y, dx = y[order.argsort()], dx[order.argsort()]
        splits = (layer, *layer.aux_bn)
        steps.append(
            {
                "y": y,
                "dx": dx,
                "dweight": torch.stack([stats.weight.grad for stats in splits]),
                "dbias": torch.stack([stats.bias.grad for stats in splits]),
                "running_mean": torch.stack([stats.running_mean.clone() for stats in splits]),
                "running_var": torch.stack([stats.running_var.clone() for stats in splits]),
                "tracked": torch.stack([stats.num_batches_tracked.clone() for stats in splits]),
                "calls": (forward.calls, backward.calls),
            }
        )
    return steps


def expected(sizes, options, shape):
    """The oracle's account of the same steps."""
    state = oracle.State.initial(len(sizes), len(sizes[0]), shape[0])
    rank = torch.repeat_interleave(torch.tensor([sum(s) for s in sizes]))
    ids = torch.cat([torch.repeat_interleave(torch.tensor(s)) for s in sizes])
    for step in range(STEPS):
        x, dy = (torch.cat(parts) for parts in zip(*batches(sizes, step, shape), strict=True))
        x = x.double().requires_grad_()
        y = oracle.forward(x, ids, rank, state, **options)
        dx, dweight, dbias = torch.autograd.grad(y, (x, state.weight, state.bias), dy.double())
        rows = [sum(s) for s in sizes]
        yield {
            "y": y.detach().split(rows),
            "dx": dx.split(rows),
            "dweight": dweight,
            "dbias": dbias,
            "running_mean": state.running_mean,
            "running_var": state.running_var,
            "tracked": state.num_batches_tracked,
        }


def check(sizes, how, tmp_path, options=None, shape=SHAPE):
    options = options or {}
    ranks = run_ranks(train, len(sizes), tmp_path, sizes, how, options, shape)
    for step, truth in enumerate(expected(sizes, options, shape)):
        for rank, steps in enumerate(ranks):
            for name in ("y", "dx", "dweight", "dbias"):
                torch.testing.assert_close(
                    steps[step][name].double(), truth[name][rank], rtol=1e-5, atol=2e-6
                )
            for name in ("running_mean", "running_var", "tracked"):
                torch.testing.assert_close(
                    steps[step][name], truth[name].to(steps[step][name].dtype), rtol=1e-6, atol=1e-6
                )
                assert steps[step][name].equal(ranks[0][step][name]), f"ranks differ in {name}"
    return ranks


@pytest.mark.parametrize("how", ["sizes", "index", "channels_last"])
@pytest.mark.parametrize("case", SIZES)
def test_ranks_equal_one_process_with_all_rows(case, how, tmp_path):
    check(SIZES[case], how, tmp_path)


@pytest.mark.parametrize("case", ["equal", "empty rank", "three ranks four splits"])
def test_layer_sends_one_all_reduce_each_way(case, tmp_path):
    sizes, splits, features = SIZES[case], len(SIZES[case][0]), SHAPE[0]
    for steps in check(sizes, "sizes", tmp_path):
        forward, backward = steps[0]["calls"]
        assert forward == [("allreduce_", splits * (2 * features + 1), torch.float64)]
        assert backward == [("allreduce_", 2 * splits * features, torch.float32)]


def test_group_of_one_sends_nothing(tmp_path):
    steps = check(SIZES["one rank"], "sizes", tmp_path)[0]
    assert steps[0]["calls"] == ([], [])


@pytest.mark.parametrize("shape", [(7,), (4, 1), (1, 3), (65, 2), (3, 2, 3, 2)], ids=str)
def test_ranks_equal_one_process_for_every_rank_of_input(shape, tmp_path):
    check(SIZES["uneven"], "sizes", tmp_path, shape=shape)


@pytest.mark.parametrize("options", [{"momentum": None}, {"momentum": 1.0}, {"eps": 0.1}], ids=str)
def test_ranks_equal_one_process_with_options(options, tmp_path):
    check(SIZES["split empty on all"], "sizes", tmp_path, options=options)


def default_chunks(rank, world_size):
    torch.manual_seed(rank)
    x = torch.randn(6, 4)
    layer = SyncSplitBatchNorm(4, num_splits=3)
    y = layer(x)
    return x, y.detach(), layer.aux_bn[1].running_mean


def test_default_is_equal_contiguous_chunks_of_each_rank(tmp_path):
    ranks = run_ranks(default_chunks, 2, tmp_path)
    last = torch.cat([x[4:] for x, _, _ in ranks])
    torch.testing.assert_close(ranks[1][2], 0.1 * last.mean(0))
    var, mean = torch.var_mean(last, 0, correction=0)
    torch.testing.assert_close(ranks[0][1][4:], (ranks[0][0][4:] - mean) / (var + 1e-5).sqrt())


def quiet_modes(rank, world_size):
    layer = SyncSplitBatchNorm(4)
    untracked = SyncSplitBatchNorm(4, track_running_stats=False)
    x = torch.randn(4 + 2 * rank, 4, requires_grad=True)
    counts = {}
    for name, module in (("eval", layer.eval()), ("eval untracked", untracked.eval())):
        with Collectives() as seen:
            module(x).sum().backward()
        counts[name] = len(seen.calls)
    layer.train()
    with Collectives() as seen, torch.no_grad():
        layer(x)
    counts["no_grad"] = len(seen.calls)
    with Collectives() as seen, frozen_stats(layer):
        layer(x)
    counts["frozen"] = len(seen.calls)
    return counts, layer.num_batches_tracked.item()


def test_evaluation_never_communicates_and_training_without_grad_does(tmp_path):
    for counts, tracked in run_ranks(quiet_modes, 2, tmp_path):
        assert counts == {"eval": 0, "eval untracked": 0, "no_grad": 1, "frozen": 1}
        assert tracked == 1


def disagreeing_ranks(rank, world_size):
    """Each rank tells of its rows in its own way, in one step."""
    torch.manual_seed(rank)
    layer = SyncSplitBatchNorm(3, num_splits=2)
    x = torch.randn(4, 3, 2)
    ways = [{"only": 1}, {"index": torch.tensor([1, 0, 0, 1])}, {"sizes": (3, 1)}]
    with assign_splits(layer, **ways[rank]):
        layer(x)
    return x, layer.running_mean, layer.aux_bn[0].running_mean


def test_ranks_may_assign_rows_differently(tmp_path):
    ranks = run_ranks(disagreeing_ranks, 3, tmp_path)
    (a, *_), (b, *_), (c, *_) = ranks
    first, second = torch.cat([b[1:3], c[:3]]), torch.cat([a, b[[0, 3]], c[3:]])
    for _, mean, aux_mean in ranks:
        torch.testing.assert_close(mean, 0.1 * first.mean((0, 2)))
        torch.testing.assert_close(aux_mean, 0.1 * second.mean((0, 2)))


def grouped(rank, world_size):
    group = sync_group(2)
    layer = SyncSplitBatchNorm(2, process_group=group)
    twin = copy.deepcopy(layer)
    x = torch.full((2, 2), float(rank)) + torch.randn(2, 2)
    layer(x)
    twin(x)
    assert sync_group(world_size) is torch.distributed.group.WORLD
    assert pickle.loads(pickle.dumps(layer)).process_group is None
    assert copy.copy(layer).process_group is group
    with pytest.raises(TypeError, match="size must be an int, got float"):
        sync_group(2.0)
    for size in (0, -2, 3):
        with pytest.raises(ValueError, match=f"size must divide the world size 4, got {size}"):
            sync_group(size)
    torch.distributed.destroy_process_group()
    with pytest.raises(RuntimeError, match="must be initialized to sum over a process_group"):
        layer(x)
    return x, layer.running_mean, twin.running_mean


def test_sync_group_sums_over_neighbouring_ranks_alone(tmp_path):
    ranks = run_ranks(grouped, 4, tmp_path)
    for first in (0, 2):
        for member in (first, first + 1):
            both = torch.stack([ranks[first][0][0], ranks[first + 1][0][0]]).mean(0)
            torch.testing.assert_close(ranks[member][1], 0.1 * both)
            assert ranks[member][2].equal(ranks[member][1]), "deepcopy must share the group"


def ddp_steps(rank, world_size, broadcast):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 5), SyncSplitBatchNorm(5, num_splits=3), nn.ReLU(), nn.Linear(5, 1)
    )
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped.broadcast_buffers = wrapped.require_forward_param_sync = broadcast
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    data = torch.Generator().manual_seed(rank)
    for only in (0, 2, 0):  # whole splits stay unused, in turns
        optimizer.zero_grad()
        with assign_splits(wrapped, only=only):
            wrapped(torch.randn(4 + rank, 6, generator=data)).square().mean().backward()
        assert model[1].aux_bn[0].weight.grad.abs().max() == 0
        optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_ddp_gives_one_model_with_buffer_broadcast_and_without(tmp_path):
    states = [state for b in (True, False) for state in run_ranks(ddp_steps, 2, tmp_path, b)]
    for state in states[1:]:
        for name, value in state.items():
            assert value.equal(states[0][name]), name


def ddp_in_eval_mode(rank, world_size):
    model = SyncSplitBatchNorm(5, num_splits=3).eval()
    wrapped = nn.parallel.DistributedDataParallel(model)
    for _ in range(3):  # the reducer complains at the step after a parameter got no gradient
        wrapped(torch.randn(4, 5)).sum().backward()
    return model.aux_bn[1].weight.grad


def summed(rank, world_size):
    packed = torch.ones(2, 3, requires_grad=True)
    total = differentiable_all_reduce(packed, torch.distributed.group.WORLD)
    grad = torch.arange(6.0).view(3, 2).t()
    total.backward(grad * (rank + 1))
    return packed.grad


def test_gradient_of_the_sum_over_ranks_may_be_strided(tmp_path):
    """Of second derivatives autograd brings gradients in any layout; gloo takes one."""
    for grad in run_ranks(summed, 2, tmp_path):
        assert grad.equal(3 * torch.arange(6.0).view(3, 2).t())


def test_fine_tuning_in_evaluation_leaves_no_parameter_without_gradient(tmp_path):
    for grad in run_ranks(ddp_in_eval_mode, 2, tmp_path):
        assert grad.equal(torch.zeros(5))


def poisoned(rank, world_size, skip, value, how):
    """Two steps, the second with a value in one row of split 1 on rank 1; then another one."""
    layer = SyncSplitBatchNorm(3, num_splits=2)
    layer.skip_nonfinite_stats = skip
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if how == "compiled" else layer
    states = []
    for step in range(3):
        torch.manual_seed(10 * step + rank)
        x = torch.randn(6, 3, 4, 4)
        if step == 1 and rank == 1:
            x[4, 2, 1, 3] = value
        y = run(x)
        states.append(copy.deepcopy(layer.state_dict()))
        if step == 1:
            finite = y.isfinite().flatten(1).all(dim=1).tolist()
    return states, finite


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_running_stats_of_a_split_that_is_not_finite_are_held_back_on_all_ranks(
    value, how, tmp_path
):
    ranks = run_ranks(poisoned, 2, tmp_path, True, value, how)
    for states, finite in ranks:
        # The split's own output is poisoned on both ranks, and that of no other.
        assert finite == [True] * 3 + [False] * 3
        before, during, after = states
        for name, kept in during.items():
            if "weight" in name or "bias" in name:
                continue
            assert torch.equal(kept, before[name]) == name.startswith("aux_bn.0"), name
            assert after[name].isfinite().all()
        assert (during["num_batches_tracked"], after["num_batches_tracked"]) == (2, 3)
        assert (during["aux_bn.0.num_batches_tracked"], after["aux_bn.0.num_batches_tracked"]) == (
            1,
            2,
        )
    for name, stored in ranks[0][0][2].items():
        assert torch.equal(stored, ranks[1][0][2][name])


def test_running_stats_that_their_type_cannot_hold_are_held_back():
    """In half precision a finite batch had an infinite variance, then a NaN."""
    layer = SyncSplitBatchNorm(2, dtype=torch.float16)
    layer.skip_nonfinite_stats = True
    x = torch.randn(8, 2, 50)
    x[4:] *= 1000
    for _ in range(2):
        layer(x.half())
    assert (layer.num_batches_tracked, layer.aux_bn[0].num_batches_tracked) == (2, 0)
    assert layer.aux_bn[0].running_var.equal(torch.ones(2).half())


def test_running_stats_keep_a_nan_unless_asked_not_to(tmp_path):
    for states, _ in run_ranks(poisoned, 2, tmp_path, False, float("nan"), "eager"):
        assert states[2]["aux_bn.0.running_mean"].isnan().any()
        assert states[2]["running_mean"].isfinite().all()

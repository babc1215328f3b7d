"""What PyTorch and accelerate wrap around a model leaves its numbers as they are."""

import copy

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import TorchDynamoPlugin
from ranks import Collectives, run_ranks
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from sync_splitbn import (
    SyncSplitBatchNorm,
    assign_splits,
    convert_sync_split_batchnorm,
    frozen_stats,
    revert_sync_split_batchnorm,
    sync_group,
)

SPLITS, STEPS = 4, 4


def model_of():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)
    )
    return convert_sync_split_batchnorm(model, SPLITS)


def batch(rank, step):
    """Rows differ in number and content from rank to rank; splits 2 and 3 take turns."""
    generator = torch.Generator().manual_seed(100 * rank + step)
    sizes = (2 + rank, 3, 2 * (step % 2), 0 if step % 2 else 1)
    x = torch.randn(sum(sizes), 3, 2, 2, generator=generator)
    return x, torch.randn(sum(sizes), 4, generator=generator), sizes


def train(rank, model, wrapped, *, accumulate=1):
    """Train some steps; return the whole state, sharded or not."""
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
    for step in range(STEPS):
        x, dy, sizes = batch(rank, step)
        with assign_splits(wrapped, sizes=sizes):
            (wrapped(x) * dy).sum().backward()
        if (step + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return state_of(model)


def state_of(model):
    state = model.state_dict()
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}


def assert_same(state, truth, **close):
    assert state.keys() == truth.keys()
    for name, value in truth.items():
        torch.testing.assert_close(state[name].to(value.dtype), value, **close)


def ddp_variants(rank, world_size):
    truth = None
    for options in (
        {},
        {"static_graph": True},
        {"gradient_as_bucket_view": True},
        {"find_unused_parameters": True},
    ):
        model = model_of()
        state = train(rank, model, DistributedDataParallel(model, **options))
        if truth is None:
            truth = copy.deepcopy(state)
        assert_same(state, truth, rtol=1e-6, atol=1e-7)
    return truth


def test_ddp_options_do_not_change_training(tmp_path):
    states = run_ranks(ddp_variants, 2, tmp_path)
    assert_same(states[1], states[0], rtol=0, atol=0)
    assert states[0]["1.num_batches_tracked"] == STEPS
    assert states[0]["1.aux_bn.1.num_batches_tracked"] == STEPS // 2, "splits 2 and 3 take turns"


def fsdp2(rank, world_size, unit):
    model = model_of()
    truth = train(rank, model, DistributedDataParallel(model))
    sharded = model_of()
    if unit:
        fully_shard(sharded[1])
    fully_shard(sharded)
    assert_same(train(rank, sharded, sharded), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unit", [True, False])
def test_fsdp2_trains_like_ddp(unit, tmp_path):
    run_ranks(fsdp2, 2, tmp_path, unit)


def fsdp2_mixed(rank, world_size):
    model = model_of()
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    seen = []
    model[1].register_forward_hook(lambda m, args, y: seen.append((args[0].dtype, y.dtype)))
    x, dy, sizes = batch(rank, 0)
    with assign_splits(model, sizes=sizes):
        (model(x) * dy).sum().backward()
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    assert model[1].running_mean.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    means = [torch.empty(8) for _ in range(world_size)]
    dist.all_gather(means, model[1].running_mean)
    assert means[0].equal(means[1])


def test_fsdp2_mixed_precision_keeps_statistics_in_float32(tmp_path):
    run_ranks(fsdp2_mixed, 2, tmp_path)


def fsdp1(rank, world_size):
    model = model_of()
    truth = train(rank, model, DistributedDataParallel(model))
    sharded = FullyShardedDataParallel(
        model_of(), device_id=torch.device("cpu"), use_orig_params=True
    )
    train(rank, sharded, sharded)
    with FullyShardedDataParallel.summon_full_params(sharded):
        assert_same(sharded.module.state_dict(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_fsdp1_trains_like_ddp(tmp_path):
    run_ranks(fsdp1, 2, tmp_path)


def two_forwards(rank, world_size):
    """Two forwards before one backward, with DDP's buffer broadcast on (pytorch#22095)."""
    model, twin = model_of(), model_of()
    ddp = DistributedDataParallel(model)
    x, dy, _ = batch(rank, 0)
    with assign_splits(ddp, only=0):
        a = ddp(x)
    with assign_splits(ddp, only=1), frozen_stats(ddp):
        b = ddp(2 * x)
    ((a + b) * dy).sum().backward()
    with assign_splits(twin, only=0):
        a = twin(x)
    with assign_splits(twin, only=1):
        b = twin(2 * x)
    ((a + b) * dy).sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        dist.all_reduce(q.grad)
        torch.testing.assert_close(2 * p.grad, q.grad, rtol=1e-4, atol=1e-5)
    assert model[1].aux_bn[0].num_batches_tracked == 0


def test_two_forwards_before_one_backward_under_ddp(tmp_path):
    run_ranks(two_forwards, 2, tmp_path)


class Checkpointed(nn.Module):
    """A model whose body is run again in the backward pass."""

    def __init__(self, body, reentrant):
        super().__init__()
        self.body, self.reentrant = body, reentrant

    def forward(self, x):
        return checkpoint(self.body, x.requires_grad_(), use_reentrant=self.reentrant)


def checkpointed(rank, world_size, reentrant, compiled):
    plain, body = model_of(), model_of()
    module = Checkpointed(body, reentrant)
    module = torch.compile(module, backend="aot_eager") if compiled else module
    for step in range(2):
        x, dy, sizes = batch(rank, step)
        for model, call in ((plain, plain), (body, module)):
            model.zero_grad()
            with assign_splits(model, sizes=sizes):
                (call(x.clone()) * dy).sum().backward()
        for p, q in zip(body.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    assert_same(body.state_dict(), plain.state_dict(), rtol=1e-6, atol=1e-7)
    assert body[1].num_batches_tracked == 2


@pytest.mark.parametrize(
    ("reentrant", "compiled"), [(True, False), (False, False), (False, True)], ids=str
)
def test_activation_checkpointing_over_ranks_counts_once(reentrant, compiled, tmp_path):
    run_ranks(checkpointed, 2, tmp_path, reentrant, compiled, seconds=100)


def test_second_forward_with_another_assignment_is_refused():
    """backward() outside assign_splits would silently recompute with other rows."""
    model = model_of()
    x, dy, sizes = batch(0, 0)
    with assign_splits(model, sizes=sizes):
        y = checkpoint(model, x.requires_grad_(), use_reentrant=False)
    with pytest.raises(torch.utils.checkpoint.CheckpointError), assign_splits(model, only=0):
        (y * dy).sum().backward()


def reset_accelerate():
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def mixed(rank, world_size, options):
    """accelerate's bfloat16, the second rank empty."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    norm = nn.BatchNorm1d(6, **options)
    model = nn.Sequential(nn.Linear(4, 6), norm, nn.ReLU(), nn.Linear(6, 2))
    model = convert_sync_split_batchnorm(model, 2)
    layer, seen = model[1], []
    layer.register_forward_hook(lambda m, args, y: seen.append((args[0].dtype, y.dtype)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(2):
        x = torch.randn(8 * (1 - rank), 4)
        accelerator.backward(prepared(x).sum())
        optimizer.step()
        optimizer.zero_grad()
    assert seen == [(torch.bfloat16, torch.bfloat16)] * 2
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in layer.parameters())
    if layer.running_mean is not None:
        assert layer.running_mean.dtype == torch.float32
        assert layer.num_batches_tracked == 2
    return layer.state_dict()


@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}], ids=str)
def test_accelerate_mixed_precision_with_an_empty_rank(options, tmp_path):
    first, second = run_ranks(mixed, 2, tmp_path, options)
    assert_same(first, second, rtol=0, atol=0)


def accumulated(rank, world_size):
    states = []
    for ours in (True, False):
        reset_accelerate()
        model = model_of()
        if ours:
            accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            prepared, optimizer = accelerator.prepare(model, optimizer)
            counts = []
            for step in range(STEPS):
                x, dy, sizes = batch(rank, step)
                with accelerator.accumulate(prepared), assign_splits(prepared, sizes=sizes):
                    with Collectives() as seen:
                        y = prepared(x)
                    counts.append(sum(call[2] == torch.float64 for call in seen.calls))
                    # accelerate divides by the accumulation steps itself.
                    accelerator.backward((y * dy).sum() * 2)
                    optimizer.step()
                    optimizer.zero_grad()
            assert counts == [1] * STEPS, "no_sync is about gradients, not statistics"
            states.append(state_of(model))
        else:
            states.append(train(rank, model, DistributedDataParallel(model), accumulate=2))
    assert_same(*states, rtol=1e-5, atol=1e-6)


def test_accelerate_accumulation_synchronizes_every_micro_batch(tmp_path):
    run_ranks(accumulated, 2, tmp_path)


def dynamo_plugin(rank, world_size):
    eager = model_of()
    truth = train(rank, eager, DistributedDataParallel(eager))
    plugin = TorchDynamoPlugin(backend="aot_eager")
    accelerator = Accelerator(cpu=True, dynamo_plugin=plugin)
    model = model_of()
    prepared = accelerator.prepare(model)
    assert_same(train(rank, model, prepared), truth, rtol=1e-4, atol=1e-5)


def test_accelerate_dynamo_plugin_trains_like_eager(tmp_path):
    run_ranks(dynamo_plugin, 2, tmp_path, seconds=100)


def after_prepare(rank, world_size):
    accelerator = Accelerator(cpu=True)
    with pytest.raises(RuntimeError, match=r"must not be wrapped or prepared .*Distributed"):
        convert_sync_split_batchnorm(accelerator.prepare(nn.Sequential(nn.BatchNorm1d(2))))


def test_conversion_after_prepare_is_refused(tmp_path):
    run_ranks(after_prepare, 2, tmp_path)
    reset_accelerate()
    prepared = Accelerator(cpu=True).prepare(nn.Sequential(nn.BatchNorm1d(2)))
    with pytest.raises(RuntimeError, match=r"must not be wrapped or prepared yet, got Sequential"):
        convert_sync_split_batchnorm(prepared)
    reset_accelerate()


def test_prepared_model_is_reverted_after_training():
    reset_accelerate()
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(convert_sync_split_batchnorm(nn.Sequential(nn.BatchNorm1d(2))))
    plain = revert_sync_split_batchnorm(copy.deepcopy(accelerator.unwrap_model(prepared)), split=1)
    assert type(plain[0]) is nn.BatchNorm1d
    reset_accelerate()


def test_stock_synchronized_converter_is_refused():
    """It made a SyncBatchNorm with dead auxiliaries of our layer, silently."""
    with pytest.raises(RuntimeError, match="auxiliaries moved to a SyncBatchNorm"):
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(SyncSplitBatchNorm(3)))


def uneven_groups(rank, world_size):
    """Groups take different numbers of steps: a message that left its group would hang."""
    layer = SyncSplitBatchNorm(3, process_group=sync_group(2))
    steps = 3 if rank < 2 else 1
    for step in range(steps):
        generator = torch.Generator().manual_seed(10 * step + rank)
        x = torch.randn(4, 3, generator=generator, requires_grad=True)
        layer(x).square().sum().backward()
    return layer.num_batches_tracked.item(), layer.running_mean


def test_collectives_stay_inside_their_group(tmp_path):
    ranks = run_ranks(uneven_groups, 4, tmp_path)
    assert [tracked for tracked, _ in ranks] == [3, 3, 1, 1]
    means = [mean for _, mean in ranks]
    assert means[0].equal(means[1])
    assert means[2].equal(means[3])
    assert not means[0].equal(means[2])


def outsider(rank, world_size):
    group = dist.new_group([0])
    if rank == 0:
        convert_sync_split_batchnorm(nn.BatchNorm1d(3), process_group=group)
    else:
        with pytest.raises(ValueError, match="process_group must contain this rank"):
            convert_sync_split_batchnorm(nn.BatchNorm1d(3), process_group=group)
        model = nn.Sequential(nn.BatchNorm1d(3), nn.SyncBatchNorm(3, process_group=group))
        with pytest.raises(ValueError, match=r"must contain this rank, .*, in module '1'"):
            convert_sync_split_batchnorm(model)
        assert type(model[0]) is nn.BatchNorm1d
        with pytest.raises(ValueError, match="size must divide the world size 2, got 3"):
            sync_group(3)
        with pytest.raises(TypeError, match="size must be an int, got bool"):
            sync_group(True)


def test_rank_outside_its_group_is_refused(tmp_path):
    run_ranks(outsider, 2, tmp_path)

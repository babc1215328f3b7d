"""What check_replicas names, and the Accelerator that believes it is alone; real gloo ranks."""

import time
import warnings

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from ranks import Collectives, run_ranks
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from sync_splitbn import SyncSplitBatchNorm, check_replicas, frozen_stats, sync_group


def model_of(**options):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 4), SyncSplitBatchNorm(4, **options), nn.Linear(4, 4), SyncSplitBatchNorm(4)
    )


def complaint(model, process_group=None):
    """What the check says, and that it says it soon."""
    start = time.monotonic()
    try:
        check_replicas(model, process_group)
    except ValueError as error:
        # Far below the time-out of the process group, 50 s: nobody was left waiting.
        assert time.monotonic() - start < 10
        return str(error)
    return None


# What rank 1 of three does otherwise, and what all ranks are then told.


def another_num_splits():
    return model_of(num_splits=3)


def another_eps():
    return model_of(eps=1e-3)


def another_momentum():
    return model_of(momentum=None)


def another_treatment_of_nan():
    model = model_of()
    model[3].skip_nonfinite_stats = True
    return model


def another_mode():
    model = model_of()
    model[3].eval()
    return model


def other_channels():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 5), SyncSplitBatchNorm(5), nn.Linear(5, 4), SyncSplitBatchNorm(4)
    )


def fewer_layers():
    return model_of()[:3]


def another_order():
    linear, norm, *rest = model_of()
    return nn.Sequential(norm, linear, *rest)


def another_class():
    class Norm(SyncSplitBatchNorm):
        pass

    model = model_of()
    model[1].__class__ = Norm
    return model


def a_shared_layer():
    model = model_of()
    model[3] = model[1]
    return model


def a_shared_parameter():
    model = model_of()
    model[3].aux_bn[0].weight = model[3].weight
    return model


def a_wider_linear():
    model = model_of()
    model[0] = nn.Linear(7, 4)
    return model


def a_frozen_parameter():
    model = model_of()
    model[2].bias.requires_grad_(False)
    return model


def another_dtype():
    model = model_of()
    model[0].to(torch.bfloat16)
    return model


def another_buffer():
    model = model_of()
    model.register_buffer("scale", torch.ones(()))
    return model


def one_bit_of_a_parameter():
    model = model_of()
    model[2].weight.data[1, 2].view(torch.int32).bitwise_xor_(1)
    return model


def swapped_values_of_a_parameter():
    model = model_of()
    model[2].bias.data = model[2].bias.data.flip(0)
    return model


def another_running_mean():
    model = model_of()
    model[3].aux_bn[0].running_mean[:2] = torch.tensor([1.0, -1.0])  # the same sum
    return model


DISAGREEMENTS = {
    another_num_splits: "num_splits of 1 must be the same on all ranks, got 2 on ranks 0, 2, "
    "3 on rank 1; construct the layers",
    another_eps: "eps of 1 must be the same on all ranks, got 1e-05 on ranks 0, 2, 0.001 on rank 1",
    another_momentum: "momentum of 1 must be the same on all ranks, got 0.1 on ranks 0, 2, None on",
    another_treatment_of_nan: "skip_nonfinite_stats of 3 must be the same on all ranks, got False",
    another_mode: "training of 3 must be the same on all ranks, got True on ranks 0, 2, False on",
    other_channels: "num_features of 1 must be the same on all ranks, got 4 on ranks 0, 2, 5 on",
    fewer_layers: "SyncSplitBatchNorm number 2 must be the same on all ranks, got 3 on ranks 0, 2, "
    "none on rank 1; build and convert",
    another_order: "SyncSplitBatchNorm number 1 must be the same on all ranks, got 1 on ranks 0, "
    "2, 0 on rank 1",
    another_class: "class of 1 must be the same on all ranks, got SyncSplitBatchNorm on ranks 0, "
    "2, Norm on rank 1",
    a_shared_layer: "SyncSplitBatchNorm number 2 must be the same on all ranks, got 3 on ranks 0, "
    "2, 3 (the layer 1) on rank 1",
    a_shared_parameter: "shared with 3.weight) on rank 1; build the model",
    a_wider_linear: "parameter number 1 must be the same on all ranks, got (0.weight, "
    "torch.float32, cpu, shape [4, 6], requires_grad) on ranks 0, 2, (0.weight, torch.float32, "
    "cpu, shape [4, 7], requires_grad) on rank 1",
    a_frozen_parameter: "(2.bias, torch.float32, cpu, shape [4]) on rank 1; build the model",
    another_dtype: "(0.weight, torch.bfloat16, cpu, shape [4, 6], requires_grad) on rank 1",
    another_buffer: "buffer number 1 must be the same on all ranks, got (1.running_mean, ",
    one_bit_of_a_parameter: "content of 2.weight must be the same on all ranks, got checksum ",
    swapped_values_of_a_parameter: "content of 2.bias must be the same on all ranks, got checksum ",
    another_running_mean: "content of 3.aux_bn.0.running_mean must be the same on all ranks, got",
}


def disagreeing(rank, world_size):
    """Every disagreement in turn: the group must stay usable after each."""
    told = [complaint(change() if rank == 1 else model_of()) for change in DISAGREEMENTS]
    with frozen_stats(model := model_of()) if rank == 2 else torch.no_grad():
        told.append(complaint(model if rank == 2 else model_of()))
    return [*told, complaint(model_of())]


def test_every_disagreement_is_named_on_all_ranks(tmp_path):
    ranks = run_ranks(disagreeing, 3, tmp_path)
    *told, frozen, agreeing = ranks[0]
    for change, said in zip(DISAGREEMENTS, told, strict=True):
        assert said is not None, change.__name__
        assert DISAGREEMENTS[change] in said, change.__name__
    assert "frozen_stats of 1 must be the same on all ranks, got off on ranks 0, 1, on on" in frozen
    assert agreeing is None
    assert ranks[1] == ranks[2] == ranks[0]


def step(model, rank):
    """One training step on rows of this rank's own."""
    data = torch.Generator().manual_seed(rank)
    model(torch.randn(4, 6, generator=data)).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def drifting(rank, world_size):
    alone, together = model_of(), DistributedDataParallel(model_of())
    before = complaint(alone), complaint(together)
    step(together, rank)
    step(alone, rank)
    return before, complaint(together), complaint(alone)


def test_parameters_that_drift_without_averaged_gradients_are_found(tmp_path):
    for before, together, alone in run_ranks(drifting, 2, tmp_path):
        assert before == (None, None)
        assert together is None
        assert "content of 0.weight must be the same on all ranks, got checksum" in alone
        assert "wrap the model by DistributedDataParallel or accelerator.prepare" in alone


def crossed(rank, world_size):
    """Two layers of equal size, which rank 1 calls in another order."""
    layers = nn.ModuleList([SyncSplitBatchNorm(4), SyncSplitBatchNorm(4)])
    before = complaint(layers)
    data = torch.Generator().manual_seed(rank)
    for layer in layers if rank == 0 else reversed(layers):
        layer(torch.randn(4, 4, generator=data))
    return before, complaint(layers)


def test_layers_called_in_another_order_are_found_after_a_step(tmp_path):
    for before, after in run_ranks(crossed, 2, tmp_path):
        assert before is None
        assert "content of 0.running_mean must be the same on all ranks, got checksum" in after
        assert "run the same layers in the same order" in after


def with_sub_groups(rank, world_size):
    """Groups of two with statistics of their own; then one rank sums over another group."""
    group = sync_group(2)
    model = DistributedDataParallel(model_of(process_group=group), broadcast_buffers=False)
    step(model, rank)
    told = [complaint(model)]
    model.module[1].running_mean += rank % 2
    told.append(complaint(model))
    contradicting = model_of(process_group=None if rank == 3 else group)
    return [*told, complaint(contradicting), complaint(contradicting, group)]


def test_statistics_of_sub_groups_are_compared_inside_them(tmp_path):
    ranks = run_ranks(with_sub_groups, 4, tmp_path)
    for agreeing, drifted, contradicting, _ in ranks:
        assert agreeing is None
        assert "content of module.1.running_mean must be the same on all ranks" in drifted
        assert "process_group of 1 must be the same on all ranks, got [2, 3] on rank 2" in (
            contradicting.replace("[0, 1] on ranks 0, 1, ", "")
        )
    first, *_, last = [inside for *_, inside in ranks]
    assert first is None
    assert "process_group of 1 must be the same on all ranks, got [2, 3] on rank 2, all on" in last


def own_statistics(rank, world_size):
    """A plain batch norm beside the layer keeps the statistics of its rank."""
    model = DistributedDataParallel(nn.Sequential(nn.BatchNorm1d(6), model_of()))
    step(model, rank)
    assert not torch.equal(*gathered(model.module[0].running_mean))
    return complaint(model)


def gathered(tensor):
    both = [torch.empty_like(tensor), torch.empty_like(tensor)]
    dist.all_gather(both, tensor)
    return both


def test_statistics_of_plain_batch_norms_may_differ(tmp_path):
    assert run_ranks(own_statistics, 2, tmp_path) == [None, None]


def sharded(rank, world_size):
    told = []
    cpu = torch.device("cpu")
    for model in (
        fully_shard(model_of()),
        FullyShardedDataParallel(model_of(), device_id=cpu),
        FullyShardedDataParallel(model_of(), device_id=cpu, use_orig_params=True),
    ):
        step(model, rank)
        told.append(complaint(model))
        next(iter(model.buffers())).add_(rank)
        told.append(complaint(model))
    return told


@pytest.mark.filterwarnings("ignore")
def test_shards_are_not_compared_and_their_buffers_are(tmp_path):
    for told in run_ranks(sharded, 2, tmp_path):
        assert told[::2] == [None] * 3
        assert all("1.running_mean must be the same" in drifted for drifted in told[1::2])


class Odd(nn.Module):
    """Parameters and buffers of unusual kinds, one of which differs between ranks if asked for."""

    def __init__(self, value=0.0):
        super().__init__()
        self.lazy = nn.LazyLinear(3)
        conjugate = torch.complex(torch.ones(3), torch.full((3,), value)).conj()
        for name, buffer in {
            "sparse": torch.eye(3).to_sparse(),
            "conjugate": conjugate,
            "negative": conjugate.imag,
            "quantized": torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8),
            "expanded": torch.ones(1).expand(5),
            "freed": torch.ones(3),
        }.items():
            self.register_buffer(name, buffer)
        self.freed.untyped_storage().resize_(0)


def odd(rank, world_size):
    warnings.simplefilter("ignore")
    return complaint(Odd()), complaint(Odd(float(rank)))


def test_unusual_tensors_are_compared_as_far_as_they_can_be(tmp_path):
    for agreeing, differing in run_ranks(odd, 2, tmp_path):
        assert agreeing is None
        assert "content of conjugate must be the same" in differing


def sent(rank, world_size):
    with Collectives() as agreeing:
        check_replicas(model_of())
    with Collectives() as differing:
        complaint(model_of(eps=1e-3 * (rank + 1)))
    return [[name for name, *_ in seen.calls] for seen in (agreeing, differing)]


def test_replicas_that_agree_gather_one_digest(tmp_path):
    for agreeing, differing in run_ranks(sent, 2, tmp_path):
        # all_gather_object gathers the sizes, then the objects.
        assert len(agreeing) == 2
        assert len(differing) == 4


TRAP = r"accelerate must see all 2 ranks, got .* construct Accelerator\(cpu=True\)"


def alone_in_accelerate(rank, world_size, kind):
    """An accelerator made beside a group of two, then a first training step."""
    if kind == "state alone":
        assert PartialState().num_processes == 1
        assert not AcceleratorState._shared_state
    else:
        assert Accelerator(cpu=kind == "cpu").num_processes == (2 if kind == "cpu" else 1)
    layer = SyncSplitBatchNorm(4)
    x = torch.randn(4, 4)
    layer.eval()(x)
    layer.train()
    if kind != "plain":
        check_replicas(layer)
        return layer(x).shape
    model = torch.compile(layer, backend="eager")
    for call in (layer, layer, check_replicas, model):
        with pytest.raises(RuntimeError, match=TRAP):
            call(layer if call is check_replicas else x)
    return None


@pytest.mark.parametrize("kind", ["plain", "cpu", "state alone"])
def test_accelerator_that_believes_it_is_alone_is_refused(kind, tmp_path):
    run_ranks(alone_in_accelerate, 2, tmp_path, kind)


def compiled_alone(rank, world_size):
    """The first step of all is compiled, without a warning that Dynamo traces the check."""
    warnings.simplefilter("error")
    Accelerator()
    model = torch.compile(SyncSplitBatchNorm(4), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="accelerate must see all 2 ranks"):
        model(torch.randn(4, 4))


def test_first_step_that_is_compiled_tells_too(tmp_path):
    run_ranks(compiled_alone, 2, tmp_path)


def test_one_rank_has_nothing_to_compare():
    check_replicas(model_of())
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        check_replicas([])

"""All communication: which ranks take part, the sum over them, and what they tell each other.

No other file of the package calls torch.distributed.
"""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def check_group(process_group: Any) -> None:
    """Raise unless `process_group` is None or a group that this rank belongs to."""
    if process_group is None or not dist.is_available():
        return
    if process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "process_group must contain this rank, got GroupMember.NON_GROUP_MEMBER; "
            "give each rank the group that it belongs to, as sync_group does"
        )
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup or None, "
            f"got {type(process_group).__name__}; make one by sync_group"
        )


def resolve_group(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Return the group to sum over, the default one for None, or None where a rank is alone."""
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is not None:
            raise RuntimeError(
                "torch.distributed must be initialized to sum over a process_group, got none; "
                "make a new group after a new init_process_group, or set process_group to None"
            )
        return None
    group = dist.group.WORLD if process_group is None else process_group
    if dist.get_world_size(group) == 1:
        return None
    if _is_alone_in_accelerate():
        raise RuntimeError(
            f"accelerate must see all {dist.get_world_size()} ranks, got an Accelerator with "
            "num_processes=1, which averages no gradients; on CPUs construct "
            "Accelerator(cpu=True), on GPUs start the ranks by accelerate launch or torchrun"
        )
    return group


def _constant_when_compiled(function: Callable[[], T]) -> Callable[[], T]:
    """Have Dynamo call a function when it traces, and take the answer for a constant."""
    # As torch.compiler.assume_constant_result does, which imports Dynamo, and that takes seconds.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_is_accelerate_right = False


@_constant_when_compiled
def _is_alone_in_accelerate() -> bool:
    """Return whether an `Accelerator` takes this rank for the only one; asked until it does not."""
    global _is_accelerate_right
    if not _is_accelerate_right:
        # A PartialState by itself, as loggers make one, trains nothing: it may say what it likes.
        state: Any = sys.modules.get("accelerate.state")
        has_accelerator = state is not None and state.is_initialized()
        _is_accelerate_right = not has_accelerator or state.PartialState().num_processes > 1
    return not _is_accelerate_right


_generators_at_work = 0
_is_loader_known = False


@contextlib.contextmanager
def ends_may_differ() -> Iterator[None]:
    """Allow loaders to end when they like, because `until_all_done` is at work."""
    global _generators_at_work
    _generators_at_work += 1
    try:
        yield
    finally:
        _generators_at_work -= 1


@_constant_when_compiled
def warn_of_uneven_batches() -> None:
    """Warn if the first loader of accelerate in which a layer trains ends earlier on some ranks."""
    global _is_loader_known
    state: Any = sys.modules.get("accelerate.state")
    if _is_loader_known or _generators_at_work or state is None or not state.is_initialized():
        return
    loader = state.GradientState().active_dataloader
    if loader is None:
        return
    _is_loader_known = True
    shards: Any = getattr(loader, "batch_sampler", None)
    if not hasattr(shards, "even_batches"):
        # skip_first_batches wraps it; other loaders say less about their ends.
        shards = getattr(shards, "batch_sampler", None)
    if getattr(shards, "even_batches", True) or shards.split_batches or shards.drop_last:
        return
    batches, ranks = shards.total_length, shards.num_processes
    if batches % ranks:
        warnings.warn(
            f"accelerate's loader must yield as many batches on each rank, got {batches} batches "
            f"for {ranks} ranks and even_batches=False: at its end some ranks wait for ever; "
            "iterate over sync_splitbn.data.until_all_done(loader)",
            stacklevel=2,
        )


def all_reduce_(packed: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum `packed` over the ranks of `group`, in place; without a group it is the sum already."""
    if group is not None:
        dist.all_reduce(packed, group=group)
    return packed


def all_reduce_copy(packed: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the sum of `packed` over the ranks of `group`, leaving `packed` as it is."""
    return packed if group is None else all_reduce_(packed.clone(), group)


def differentiable_all_reduce(packed: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the same sum as a differentiable function of every rank's `packed`."""
    total: Tensor = _AllReduce.apply(packed, group)  # type: ignore[no-untyped-call]
    return total


class _AllReduce(torch.autograd.Function):
    """The sum over ranks; its gradient is the sum of gradients over ranks."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        """Return the sum in a new tensor."""
        ctx.group = group
        return all_reduce_(packed.clone(), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Every rank's loss depends on every rank's `packed`, so gradients sum over ranks too."""
        return differentiable_all_reduce(grads[0].contiguous(), ctx.group), None


def gather_objects(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """Return the `value` of every rank of `group`, in their order; it is pickled."""
    if group is None:
        return [value]
    values = cast(list[T], [None] * dist.get_world_size(group))
    dist.all_gather_object(values, value, group=group)
    return values


def ranks_of(process_group: dist.ProcessGroup | None) -> tuple[int, ...]:
    """Return the global ranks of a group, None being the default one."""
    return tuple(dist.get_process_group_ranks(process_group))


def sharded_parameters(model: torch.nn.Module) -> set[int]:
    """Return the ids of parameters of which each rank holds another part, as FSDP cuts them."""
    # Looked up, not imported: what has cut a parameter has imported its module.
    tensors: Any = sys.modules.get("torch.distributed.tensor")
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    found = set()
    if tensors is not None:
        found |= {id(each) for each in model.parameters() if isinstance(each, tensors.DTensor)}
    if fsdp is not None:
        for module in fsdp.FullyShardedDataParallel.fsdp_modules(model):
            found |= {id(each) for each in module.parameters()}
    return found


def sync_group(size: int) -> dist.ProcessGroup:
    """Return this rank's process group of `size` neighbouring ranks.

    Statistics over some ranks cost less latency than over thousands, and hundreds of images per
    split estimate them well. Ranks 0 to `size - 1` form the first group, the next `size` ranks
    the second, and so on: with `size` ranks a node, no batch-norm message leaves its node.

    Args:
        size: ranks per group, a divisor of the world size.

    Returns:
        The group that holds this rank; the default group where `size` is the world size.

    Raises:
        RuntimeError: `torch.distributed` is not initialized.
        TypeError: `size` is no int.
        ValueError: `size` does not divide the world size.

    Communication:
        Makes all the groups on all ranks: call it once, on every rank, in the same order.

    Example:
        Of 1,024 ranks, sum over 8: ``convert_sync_split_batchnorm(model,
        process_group=sync_group(8))``.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "torch.distributed must be initialized before sync_group, got no process group; "
            "create accelerate's Accelerator or call init_process_group first"
        )
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"size must be an int, got {type(size).__name__}")
    world_size = dist.get_world_size()
    if size < 1 or world_size % size:
        raise ValueError(f"size must divide the world size {world_size}, got {size}")
    if size == world_size:
        return cast(dist.ProcessGroup, dist.group.WORLD)
    own, _ = dist.new_subgroups(group_size=size)
    return cast(dist.ProcessGroup, own)

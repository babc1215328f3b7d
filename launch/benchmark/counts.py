"""What the benchmark counts instead of timing: messages, bytes moved, bytes held."""

import contextlib
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# Of what the operators touch, this much is taken to stay in the cache of a CPU's cores, so that
# a kernel that works block by block is not charged for each look at a block.
CACHE_BYTES = 4 * 2**20
_ALLOCATE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
_TWO_PASSES = {
    "native_batch_norm",
    "native_batch_norm_backward",
    "cudnn_batch_norm",
    "cudnn_batch_norm_backward",
}
_OVERWRITE = {"copy_", "fill_", "zero_"}


@dataclass(frozen=True)
class Message:
    """One collective as it was posted."""

    operation: Any
    arguments: tuple[Any, ...]

    @property
    def bytes(self) -> int:
        """Size of the largest tensor, which is what travels or is gathered."""
        leaves = tree_leaves(self.arguments)
        return max(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))


class Messages(TorchDispatchMode):
    """Records every collective that is posted inside."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Message] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Keep a copy of the call with zeros, which may be summed forever."""
        if func.namespace == "c10d":
            self.sent.append(Message(func, tree_map_only(Tensor, torch.zeros_like, args)))
        return func(*args, **(kwargs or {}))


def messages_of(step: Callable[[], object]) -> list[Message]:
    """Return the collectives of one call of an eager `step`, on this rank."""
    with Messages() as messages:
        step()
    return messages.sent


def post(messages: list[Message]) -> None:
    """Post recorded collectives again, one after the other, each awaited as by its caller."""
    for message in messages:
        *_, work = message.operation(*message.arguments)
        if work is not None:
            work.wait()


def count_messages(step: Callable[[], object]) -> int:
    """Return how many collectives a call posts as the process group sees it, compiled or not."""
    with _profile() as profiled:
        step()
    return sum(event.name.startswith(("gloo:", "nccl:")) for event in profiled.events())


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operators read and write.

    Batch norm's operators are counted with the passes they make: statistics before the output,
    sums before the input gradient. Kernels that are no operators, as Triton's, are not seen.

    Args:
        cache: bytes touched last that cost nothing to touch again.
    """

    def __init__(self, cache: int) -> None:
        super().__init__()
        self.bytes, self.cache = 0, cache
        self.resident: OrderedDict[tuple[int, int], int] = OrderedDict()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Charge the tensors of one operator."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name, schema = func._schema.name.partition("::")[2], func._schema
        outputs = {arg.name for arg in schema.arguments if arg.is_out}
        reads = _tensors([args[1:] if name in _OVERWRITE else args, _without(kwargs, outputs)])
        writes = _tensors(result)
        storages = {tensor.untyped_storage().data_ptr() for tensor in reads}
        alias = all(tensor.untyped_storage().data_ptr() in storages for tensor in writes)
        if name in _ALLOCATE or (alias and not schema.is_mutable):
            return result
        for tensor in _second_pass(name, schema, args, kwargs) + reads + writes:
            self._touch(tensor)
        return result

    def _touch(self, tensor: Tensor) -> None:
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        size = tensor.element_size()
        for length, stride in sizes:
            size *= length if stride else 1
        key = tensor.data_ptr(), size
        if key in self.resident:
            self.resident.move_to_end(key)
            return
        self.bytes += size
        if size > self.cache:
            self.resident.clear()
            return
        self.resident[key] = size
        while sum(self.resident.values()) > self.cache:
            self.resident.popitem(last=False)


def bytes_moved(step: Callable[[], object], device: torch.device) -> int:
    """Return the bytes that the operators of one call of `step` move to and from memory."""
    # A GPU's operators stream through tensors that are larger than its cache.
    with Traffic(CACHE_BYTES if device.type == "cpu" else 0) as traffic:
        step()
    return traffic.bytes


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that a call of `step` holds beyond what was held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _profile(profile_memory=True) as profiled:
        step()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profiled.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, change in sorted(changes, key=lambda event: event[0]):
        held += change
        peak = max(peak, held)
    return peak


def _second_pass(name: str, schema: Any, args: tuple[Any, ...], kwargs: Any) -> list[Tensor]:
    """Return the tensors that a batch norm operator reads a second time."""
    if name not in _TWO_PASSES:
        return []
    given = dict(zip((arg.name for arg in schema.arguments), args, strict=False)) | kwargs
    if not given.get("training", given.get("train", True)):
        return []
    if "backward" not in name:
        return [given["input"]]
    dy = given.get("grad_out", given.get("grad_output"))
    return [dy, given["input"]] if given.get("output_mask", (True,))[0] else []


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _without(kwargs: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in names}


@contextlib.contextmanager
def _profile(**options: Any) -> Iterator[Any]:
    """Profile the CPU without the lines that the profiler writes past Python's stderr."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        with profile(activities=[ProfilerActivity.CPU], **options) as profiled:
            yield profiled
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)

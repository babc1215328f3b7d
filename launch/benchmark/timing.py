"""How time is taken: torch.utils.benchmark, every implementation in turn, the slowest rank."""

import ctypes
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Measurement, Timer

from .implementations import reason

Step = Callable[[], object]
# A timed block lasts at least this long, so that the clock's resolution does not matter.
_SECONDS = 0.02
# Parameters of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def warm_up(makers: Mapping[str, Callable[[], Step]]) -> tuple[dict[str, Step], dict[str, str]]:
    """Make and call every step; return them, or why they failed on any rank."""
    steps, failed = {}, {}
    for name, make in makers.items():
        try:
            steps[name] = make()
            for _ in range(3):
                steps[name]()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
        except Exception as error:  # whatever it is, it belongs in the report
            failed[name] = reason(error)
    for other in over_ranks(failed):
        failed = other | failed
    return {name: step for name, step in steps.items() if name not in failed}, failed


def in_turn(
    steps: Mapping[str, Step], rounds: int, tick: Callable[[], object] = lambda: None
) -> dict[str, Measurement]:
    """Time every step once in each of several rounds, so that a slow moment hits all of them.

    All ranks call it with the same names; the slowest counts. `tick` is called after each.
    """
    timers = {
        name: Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
        for name, step in steps.items()
    }
    first = {name: timer.timeit(1).median for name, timer in timers.items()}
    # All ranks must call as often, because a step may communicate.
    slowest = {name: max(each[name] for each in over_ranks(first)) for name in steps}
    numbers = {name: max(1, math.ceil(_SECONDS / slowest[name])) for name in steps}
    taken: dict[str, list[Measurement]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(rounds):
        # Each follows another one in every round.
        for name in (names * 2)[turn % (len(names) or 1) :][: len(names)]:
            timer = timers[name]
            if dist.is_initialized():
                dist.barrier()
            taken[name].append(timer.timeit(numbers[name]))
            tick()
    ranks = over_ranks({name: [m.median for m in each] for name, each in taken.items()})
    results = {}
    for name, measurements in taken.items():
        times = [max(each) for each in zip(*(rank[name] for rank in ranks), strict=True)]
        results[name] = Measurement(1, times, measurements[0].task_spec)
    return results


def as_json(measurement: Measurement, prefix: str = "") -> dict[str, float]:
    """Return median and interquartile range in ms."""
    median, iqr = measurement.median * 1e3, measurement.iqr * 1e3
    return {f"{prefix}median_ms": median, f"{prefix}iqr_ms": iqr}


def over_ranks(value: Any) -> list[Any]:
    """Return what every rank gave, here and on all others."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            self.sent.append(max(tensors, key=lambda tensor: tensor.nbytes))
        return func(*args, **(kwargs or {}))


def messages_of(step: Step) -> list[Tensor]:
    """Return what one call of an eager step sends, on this rank: the tensor of each collective."""
    with _Recorder() as recorder:
        step()
    return recorder.sent


def keep_memory() -> bool:
    """Have the C library keep what is freed, as caching allocators do; return whether it could.

    Otherwise large tensors come from the system page by page, as slowly as what is measured.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))

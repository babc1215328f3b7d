"""How the benchmark takes time: contenders in turn, medians, the slowest rank's clock."""

import ctypes
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

WARM_UP = 3
# Parameters of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
# Ticks of a GPU's clock per second, rather too many than too few.
_TICKS = 2.5e9

Step = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """The middle of repeated times, and how far they are apart, ms."""

    median: float
    iqr: float
    least: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """Return median, interquartile range and minimum of `samples`."""
        low, median, high = np.percentile(samples, [25, 50, 75])
        return cls(float(median), float(high - low), float(min(samples)))

    def as_json(self, prefix: str = "") -> dict[str, float]:
        """Return the three under names with their unit."""
        return {f"{prefix}{name}_ms": value for name, value in asdict(self).items()}


class Stopwatch:
    """Times one call at a time, from a common start of all ranks.

    On a CPU that is wall time. On a GPU it is the time between two events with the L2 cache
    overwritten before; the host's time for the call is taken apart, in a call of its own. By
    default the GPU is held up until the host has queued the whole call, so that its time has no
    gaps in which it waits for the host: inside a model that is bound by the GPU there are none.

    Args:
        device: where the calls compute.
        ahead: hold the GPU up as described; if not, and on a CPU, time is what passes.
    """

    def __init__(self, device: torch.device, *, ahead: bool = True) -> None:
        self.device, self.ahead = device, ahead
        self.several = dist.is_initialized() and dist.get_world_size() > 1
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.empty(2 * cache, dtype=torch.int8, device=device)

    def __call__(self, step: Step) -> tuple[float, float]:
        """Return the time of one call of `step` and the host's part in it, both in ms."""
        host = self._host(step)
        if self.device.type == "cpu":
            return host, host
        # All ranks are held up for as long as the slowest host needs.
        return self._device(step, max(over_ranks(host))), host

    def _host(self, step: Step) -> float:
        self._line_up()
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e3

    def _device(self, step: Step, host: float) -> float:
        self._line_up()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.ahead:
            self.flush.zero_()
            torch.cuda._sleep(int(1.5e-3 * host * _TICKS))
        start.record()
        step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def _line_up(self) -> None:
        """Let all ranks come to this point, with nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.several:
            dist.barrier()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)


def keep_memory() -> bool:
    """Have the C library keep what is freed, as caching allocators do; return whether it could.

    Otherwise large tensors come from the system and go back to it every time, page by page, which
    takes as long as what is measured and depends on who freed what before.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))


def warm_up(
    makers: dict[str, Callable[[], Step]], tick: Callable[[], object]
) -> tuple[dict[str, Step], dict[str, str]]:
    """Make every step and call it a few times.

    Args:
        makers: what makes each step, by name.
        tick: called after each.

    Returns:
        The steps, and for those that failed on any rank the reason instead.
    """
    steps, failed = {}, {}
    for name, make in makers.items():
        try:
            steps[name] = make()
            for _ in range(WARM_UP):
                steps[name]()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
        except Exception as error:  # whatever it is, it belongs in the report
            failed[name] = reason(error)
        tick()
    for other in over_ranks(failed):
        failed = other | failed
    return {name: step for name, step in steps.items() if name not in failed}, failed


def over_ranks(value: Any) -> list[Any]:
    """Return what every rank gave, here and on all others."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def reason(error: Exception) -> str:
    """Return an exception as one line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def in_turn(
    steps: dict[str, Step], stopwatch: Stopwatch, repeats: int, tick: Callable[[], object]
) -> dict[str, tuple[Spread, Spread]]:
    """Time every step `repeats` times, all steps once before any is timed again.

    So a machine that slows down slows all of them, and each follows another one every time.

    Args:
        steps: what to call, by name.
        stopwatch: takes the time; of several ranks the slowest counts, call by call.
        repeats: calls of each step.
        tick: called after each timed call.

    Returns:
        For each name the spread of the time and that of the host's part.
    """
    names = list(steps)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for turn in range(repeats):
            for i in range(len(names)):
                name = names[(i + turn) % len(names)]
                samples[name].append(stopwatch(steps[name]))
                tick()
    finally:
        gc.enable()
    ranks = over_ranks(samples)
    samples = {name: _slowest([rank[name] for rank in ranks]) for name in names}
    return {
        name: (Spread.of([time for time, _ in taken]), Spread.of([host for _, host in taken]))
        for name, taken in samples.items()
    }


def _slowest(ranks: list[list[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Return the larger time of all ranks, sample by sample."""
    return [
        (max(time for time, _ in sample), max(host for _, host in sample))
        for sample in zip(*ranks, strict=True)
    ]

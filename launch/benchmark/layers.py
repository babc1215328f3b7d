"""The layer level: every contender on every shape, forward alone or with backward.

V bytes of the input, S splits.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .cases import FLOOR, Case, Setting
from .contenders import Contender
from .counts import Message, bytes_moved, count_messages, messages_of, peak_bytes, post
from .measure import Spread, Step, Stopwatch, in_turn, warm_up

# Large enough that nothing but a kernel's own blocks stays in a cache.
_TRAFFIC_SHAPE = (64, 56, 56)
_TRAFFIC_BYTES = 32 * 2**20
# A short step is timed more often: it is noisier, and costs nothing.
_SHORT_BYTES = 2**20
_SHORT_REPEATS = 10


@dataclass
class Bench:
    """Where and how often to measure.

    Args:
        device: where the tensors are.
        stopwatch: takes the time.
        repeats: timed calls of each contender.
        tick: called for each, and for each warm-up, to move a bar.
    """

    device: torch.device
    stopwatch: Stopwatch
    repeats: int
    tick: Callable[[], object] = lambda: None

    @property
    def ranks(self) -> int:
        """W."""
        return dist.get_world_size() if dist.is_initialized() else 1

    def repeats_of(self, case: Case) -> int:
        """Return how often to time each contender on `case`."""
        return self.repeats * (_SHORT_REPEATS if case.tensor_bytes < _SHORT_BYTES else 1)

    def ticks(self, cases: Iterable[Case], contenders: int) -> int:
        """Return how often `measure` ticks for `cases`, the copies included."""
        return sum((contenders + 1) * (self.repeats_of(case) + 1) for case in cases)


def measure(case: Case, contenders: list[Contender], bench: Bench) -> dict[str, Any]:
    """Return all that is known of one case, as it goes into the JSON file."""
    torch.manual_seed(0)
    x, dy = (case.tensor(bench.device) for _ in range(2))
    target = torch.empty_like(x)
    # A limit on graphs per function would have the ninth shape run uncompiled, in silence.
    if any(one.compiled for one in contenders):
        torch._dynamo.reset()
    makers: dict[str, Callable[[], Step]] = {"copy": lambda: functools.partial(target.copy_, x)}
    for one in contenders:
        leaf = x.detach().requires_grad_()
        makers[one.name] = functools.partial(layer_step, one, case, leaf, dy)
    steps, failed = warm_up(makers, bench.tick)
    repeats = bench.repeats_of(case)
    times = in_turn(steps, bench.stopwatch, repeats, bench.tick)
    for _ in range(len(failed) * repeats):
        bench.tick()
    copy, _ = times.pop("copy")
    copy_rate = 2 * case.tensor_bytes / copy.median / 1e6
    del steps["copy"]
    collectives = measure_messages(steps, contenders, bench)
    rows = {}
    for name, (time, host) in times.items():
        rate = case.floor_bytes / time.median / 1e6
        rows[name] = {
            **time.as_json(),
            **(host.as_json("host_") if bench.device.type == "cuda" else {}),
            "floor_gb_per_s": rate,
            "of_copy": rate / copy_rate,
            "peak_bytes": peak_bytes(steps[name], bench.device),
            **collectives[name],
        }
    return {
        "shape": case.shape,
        "layers": case.layers,
        "repeats": repeats,
        "tensor_bytes": case.tensor_bytes,
        "floor_bytes": case.floor_bytes,
        "copy": {**copy.as_json(), "gb_per_s": copy_rate},
        "contenders": rows,
        "failed": failed,
    }


def layer_step(one: Contender, case: Case, x: Tensor, dy: Tensor) -> Step:
    """Return a training step of one contender on a leaf `x`; it keeps no gradients."""
    module: nn.Module = one.build(case.shape[1], case.setting.splits).to(x.device)
    if one.compiled:
        module = torch.compile(module, fullgraph=True, dynamic=False)
    leaves = [x, *module.parameters()]
    if case.setting.direction == "forward":
        return lambda: module(x)
    return lambda: torch.autograd.grad(module(x), leaves, dy)


def measure_messages(
    steps: dict[str, Step], contenders: list[Contender], bench: Bench
) -> dict[str, dict[str, Any]]:
    """Count each step's collectives, and take the time of these alone, one after the other.

    Args:
        steps: training steps by name of the contender.
        contenders: those, and perhaps more.
        bench: where and how often.

    Returns:
        For each name the number of collectives, their bytes and the time of all of them; the
        latter two are None where a compiled step sends something else than ours does.
    """
    sent: dict[str, list[Message] | None] = {}
    counts = {}
    for one in contenders:
        if one.name not in steps:
            continue
        if not one.compiled:
            sent[one.name] = messages_of(steps[one.name])
            counts[one.name] = len(sent[one.name])
            continue
        # A compiled step hides its messages from a dispatch mode; there can be but the same.
        counts[one.name] = count_messages(steps[one.name])
        same = counts[one.name] == len(sent.get("ours") or ())
        sent[one.name] = (sent.get("ours") or []) if same else None
    posts = {name: functools.partial(post, messages) for name, messages in sent.items() if messages}
    times = in_turn(posts, bench.stopwatch, bench.repeats, lambda: None)
    none = Spread(0.0, 0.0, 0.0)
    return {
        name: {
            "collectives": counts[name],
            "collective_bytes": sum(message.bytes for message in messages),
            **times.get(name, (none, none))[0].as_json("collectives_"),
        }
        if messages is not None
        else {"collectives": counts[name], "collective_bytes": None, "collectives_median_ms": None}
        for name, messages in sent.items()
    }


def traffic(
    setting: Setting, contenders: list[Contender], device: torch.device
) -> dict[str, float | None]:
    """Return the bytes that each contender moves, in units of V; None where it cannot be seen."""
    features, height, width = _TRAFFIC_SHAPE
    row = features * height * width * getattr(torch, setting.dtype).itemsize
    rows = setting.splits * -(-_TRAFFIC_BYTES // (row * setting.splits))
    case = Case(setting, (rows, features, height, width), 1)
    x, dy = (case.tensor(device) for _ in range(2))
    moved: dict[str, float | None] = {}
    for one in contenders:
        moved[one.name] = None
        if one.compiled:
            continue
        # A contender that cannot run here is reported by its warm-up.
        with contextlib.suppress(Exception):
            step = layer_step(one, case, x.detach().requires_grad_(), dy)
            in_v = bytes_moved(step, device) / case.tensor_bytes
            # Less than the floor means kernels that are no operators.
            if in_v > 0.99 * FLOOR[setting.direction]:
                moved[one.name] = in_v
    return moved

"""The layer alone: every implementation on every shape, forward alone or with backward."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .implementations import Implementation
from .shapes import Case
from .timing import Step, as_json, in_turn, messages_of, warm_up

# Sizes of the input that must move to and from memory: x read for statistics, x read and y written;
# then dy and x read, dy and x read and dx written.
_MOVED = 8


def measure_case(
    case: Case,
    implementations: list[Implementation],
    device: torch.device,
    rounds: int,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Return all that is known of one shape; all ranks call it together."""
    torch.manual_seed(0)
    x, dy, target = (case.tensor(device) for _ in range(3))
    if any(each.compiled for each in implementations):
        # A limit on graphs for each function would have the ninth shape run uncompiled.
        torch.compiler.reset()
    makers: dict[str, Callable[[], Step]] = {"copy": lambda: functools.partial(target.copy_, x)}
    for each in implementations:
        leaf = x.detach().requires_grad_()
        makers[each.name] = functools.partial(layer_step, each, case, leaf, dy)
    steps, failed = warm_up(makers)
    times = in_turn(steps, rounds, tick)
    copy = times.pop("copy")
    copy_rate = 2 * case.tensor_bytes / copy.median
    compiled = {each.name for each in implementations if each.compiled}
    rows = {
        name: {
            **as_json(time),
            "of_copy": _MOVED * case.tensor_bytes / time.median / copy_rate,
            # A compiled step hides its messages.
            "collectives": None if name in compiled else len(messages_of(steps[name])),
        }
        for name, time in times.items()
    }
    return {
        "shape": case.shape,
        "layers": case.layers,
        "tensor_bytes": case.tensor_bytes,
        "copy": {**as_json(copy), "gb_per_s": copy_rate / 1e9},
        "contenders": rows,
        "failed": failed,
    }


def layer_step(each: Implementation, case: Case, x: Tensor, dy: Tensor) -> Step:
    """Return a training step of one implementation on a leaf `x`; it keeps no gradients."""
    module: nn.Module = each.build(case.shape[1], case.setting.splits).to(x.device)
    if each.compiled:
        module.compile(fullgraph=True, dynamic=False)
    leaves = [x, *module.parameters()]
    return lambda: torch.autograd.grad(module(x), leaves, dy)

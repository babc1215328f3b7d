"""Scaling: what a step's collectives cost over several gloo ranks of this machine."""

import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from .implementations import available
from .layers import layer_step
from .shapes import NETWORKS, Case, Setting
from .timing import Step, as_json, in_turn, messages_of

_NAMES = ["ours", "all-reduce"]


def measure_world(
    world: int, network: str, splits: list[int], repeats: int
) -> dict[str, dict[str, Any]]:
    """Return a row for each number of splits and implementation, by processes started here."""
    # Ranks of one machine reach each other by the loopback device whatever its network is like.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "rows.json"
        arguments = (world, f"file://{folder}/store", str(answer), network, splits, repeats)
        multiprocessing.spawn(_rank, arguments, nprocs=world)
        return json.loads(answer.read_text())


def _rank(
    rank: int, world: int, store: str, answer: str, network: str, splits: list[int], repeats: int
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    rows = step_messages(network, splits, repeats)
    if rank == 0:
        Path(answer).write_text(json.dumps(rows))
    dist.destroy_process_group()


def step_messages(network: str, splits: list[int], repeats: int) -> dict[str, dict[str, Any]]:
    """Return the rows of this world; every rank calls it, and all return the same.

    The layers run once on tiny inputs to have their messages recorded. Those of a whole step, all
    of the network's batch norms there and back, are then sent without any computation.
    """
    device = torch.device("cpu")
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    for count in splits:
        for each in available(device, _NAMES)[0]:
            sent: list[Tensor] = []
            for features, _, _, layers in NETWORKS[network]:
                setting = Setting(network, "float32", "nchw", count)
                case = Case(setting, (2 * count, features, 2, 2), layers)
                x, dy = case.tensor(device).requires_grad_(), case.tensor(device)
                sent += layers * messages_of(layer_step(each, case, x, dy))
            key = f"{each.name}, {count} split(s)"
            rows[key] = {"collectives": len(sent), "bytes": sum(t.nbytes for t in sent)}
            rows[key] |= {"median_ms": 0.0, "iqr_ms": 0.0}
            if sent:
                steps[key] = functools.partial(_send, [torch.zeros_like(t) for t in sent])
    for key, time in in_turn(steps, repeats).items():
        rows[key] |= as_json(time)
    return rows


def _send(messages: list[Tensor]) -> None:
    for message in messages:
        dist.all_reduce(message)

"""The scaling mode: what a step's collectives cost over W gloo ranks of this machine.

C features, S splits, W ranks.
"""

import datetime
import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from .cases import NETWORKS, Case, Setting
from .contenders import contenders
from .counts import Message, messages_of, post
from .layers import layer_step
from .measure import Spread, Step, Stopwatch, in_turn

_NAMES = ["ours", "all-reduce"]
_MINUTES = 5


def measure_world(
    world: int, network: str, splits: list[int], repeats: int
) -> list[dict[str, Any]]:
    """Return a row for each S and contender, measured over `world` processes started here.

    Args:
        world: W.
        network: one of `NETWORKS`; its batch norms make the step.
        splits: values of S.
        repeats: timed rounds.
    """
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
    dist.init_process_group(
        "gloo",
        init_method=store,
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(minutes=_MINUTES),
    )
    rows = step_messages(network, splits, repeats)
    if rank == 0:
        Path(answer).write_text(json.dumps(rows))
    dist.destroy_process_group()


def step_messages(network: str, splits: list[int], repeats: int) -> list[dict[str, Any]]:
    """Return the rows of this world; every rank calls it, and all return the same.

    The layers run once on tiny inputs to have their messages recorded. Those of a whole step, all
    of the network's batch norms there and back, are then posted without any computation.
    """
    device = torch.device("cpu")
    rows: dict[str, dict[str, Any]] = {}
    posts: dict[str, Step] = {}
    for count in splits:
        for one in contenders(device, _NAMES)[0]:
            step: list[Message] = []
            for features, _, _, layers in NETWORKS[network]:
                setting = Setting(network, "float32", "nchw", count, "both")
                case = Case(setting, (2 * count, features, 2, 2), layers)
                x, dy = case.tensor(device).requires_grad_(), case.tensor(device)
                step += layers * messages_of(layer_step(one, case, x, dy))
            key = f"{one.name}, {count} splits"
            if step:
                posts[key] = functools.partial(post, step)
            rows[key] = {
                "ranks": dist.get_world_size(),
                "splits": count,
                "contender": one.name,
                "collectives": len(step),
                "bytes": sum(message.bytes for message in step),
                **Spread(0.0, 0.0, 0.0).as_json(),
            }
    for key, (time, _) in in_turn(posts, Stopwatch(device), repeats, lambda: None).items():
        rows[key] |= time.as_json()
    return list(rows.values())

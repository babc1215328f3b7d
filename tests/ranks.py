"""Runs a function on several gloo ranks of this machine, and counts what they send.

Ranks are children of a fork server that has imported torch but never computed. They meet in a
file, answer through pipes, and end by `os._exit`: tearing a process group down beside a live DDP
model may hang.
"""

import contextlib
import datetime
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

SECONDS = 100

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "pytest"])
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


class RankError(Exception):
    """What a rank raised, with its traceback."""


def run_ranks(
    body: Callable[..., Any],
    world_size: int,
    tmp_path: Path,
    *args: Any,
    seconds: float = SECONDS,
) -> list[Any]:
    """Return `body(rank, world_size, *args)` of every rank; `body` stands at module level."""
    store = tmp_path / f"store-{time.monotonic_ns()}"
    pipes: dict[Connection, int] = {}
    processes = []
    answers: dict[int, Any] = {}
    try:
        for rank in range(world_size):
            here, there = _context.Pipe()
            call = (there, body, rank, world_size, str(store), seconds / 2, args)
            process = _context.Process(target=_rank, args=call, daemon=True)
            process.start()
            there.close()
            pipes[here] = rank
            processes.append(process)
        deadline = time.monotonic() + seconds
        while len(answers) < world_size:
            waiting = [pipe for pipe, rank in pipes.items() if rank not in answers]
            ready = wait(waiting, max(0, deadline - time.monotonic()))
            if not ready:
                late = sorted(set(range(world_size)) - answers.keys())
                raise RankError(f"ranks {late} gave no answer in {seconds} s")
            for pipe in ready:
                answers[pipes[pipe]] = _answer(pipe, pipes[pipe])
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            if len(answers) < world_size:
                process.kill()
            process.join(5)
    return [answers[rank] for rank in range(world_size)]


def _answer(pipe: Connection, rank: int) -> Any:
    try:
        error, value = pickle.loads(pipe.recv_bytes())
    except EOFError:
        raise RankError(f"rank {rank} died") from None
    if error is not None:
        raise RankError(f"rank {rank} raised\n{error}")
    return value


def _rank(
    pipe: Connection,
    body: Callable[..., Any],
    rank: int,
    world_size: int,
    store: str,
    group_seconds: float,
    args: tuple[Any, ...],
) -> None:
    try:
        torch.set_num_threads(1)
        # What torchrun tells a rank; accelerate looks for it.
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
        world |= {"LOCAL_WORLD_SIZE": world_size, "OMP_NUM_THREADS": 1}
        os.environ.update({name: str(value) for name, value in world.items()})
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=group_seconds),
        )
        answer = None, body(rank, world_size, *args)
    except BaseException:
        answer = traceback.format_exc(), None
    # Plain pickle copies tensors; a descriptor would die with this process.
    pipe.send_bytes(pickle.dumps(answer))
    with contextlib.suppress(EOFError):
        pipe.recv_bytes()
    os._exit(0)


class Collectives(TorchDispatchMode):
    """Records every collective that is issued inside, as (operation, numel, dtype)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int, torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = list(torch.utils._pytree.tree_leaves(args))
            tensor = next(leaf for leaf in tensors if isinstance(leaf, torch.Tensor))
            self.calls.append((func._opname, tensor.numel(), tensor.dtype))
        return func(*args, **(kwargs or {}))

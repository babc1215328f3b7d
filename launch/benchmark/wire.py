"""An estimate, not a measurement: the time on the wire of one training step on many GPUs.

It rests on latencies that others published for NCCL (`ONE_NODE` and `TWO_NODES`) and on one
assumption, that every doubling of the nodes costs as much as the first did, as in a tree. The
share of a message's size is that of one node. Time in which ranks wait for the slowest of them is
not in it, nor that of other traffic.

C features, S splits, W ranks.
"""

import math
from collections.abc import Sequence

import numpy as np

# Bytes and microseconds of an all_reduce through PyTorch on 8 H100 of one node:
# ByteDance-Seed/Triton-distributed#57.
ONE_NODE = ((128, 19.2), (16 * 1024, 20.7), (64 * 1024, 23.1), (512 * 1024, 25.2))
# Of 1 KB on two nodes with 8 H20 each, InfiniBand: NVIDIA/nccl#1244 has 46 to 48.
TWO_NODES = (1024, 47.0)
GPUS_PER_NODE = 8
WORLDS = (8, 64, 512, 1024, 4096, 16384)
GROUPS = (64, 8)


def within_node(size: int) -> float:
    """Return the time of an all_reduce of `size` bytes on one node, us, from the table."""
    sizes, times = zip(*ONE_NODE, strict=True)
    return float(np.interp(math.log(size), np.log(sizes), times))


def per_doubling() -> float:
    """Return what the first doubling of the nodes adds, us."""
    size, time = TWO_NODES
    return time - within_node(size)


def all_reduce_us(ranks: int, size: int) -> float:
    """Return the estimated time of an all_reduce of `size` bytes over `ranks` GPUs, us."""
    if ranks == 1:
        return 0.0
    nodes = math.ceil(ranks / GPUS_PER_NODE)
    return within_node(size) + per_doubling() * math.log2(nodes)


def our_payloads(features: int, splits: int) -> list[int]:
    """Return the bytes of our two messages: float64 moments, float32 sums of gradients."""
    return [8 * splits * (2 * features + 1), 4 * 2 * splits * features]


def per_split_payloads(features: int, splits: int) -> list[int]:
    """Return the bytes of one float32 message for each split and direction."""
    return [4 * 2 * features] * (2 * splits)


def gathered_bytes(features: int, splits: int, ranks: int) -> int:
    """Return what a rank receives if each split gathers mean, deviation and count of all ranks."""
    return splits * ranks * 4 * (2 * features + 1)


def estimate(features: Sequence[int], splits: int) -> list[dict[str, float | None]]:
    """Return a row for each number of GPUs.

    Args:
        features: C of every batch norm of the network.
        splits: S.

    Returns:
        Rows with `gpus`; with ms a step over all ranks for `ours` and, a message a split, for
        `per_split`; with ms of ours in groups of a size, `sync_group_64` and so on, None where
        there are not more GPUs; and with `gathered_bytes` that S `nn.SyncBatchNorm` receive.
    """
    ours = [size for channels in features for size in our_payloads(channels, splits)]
    split = [size for channels in features for size in per_split_payloads(channels, splits)]
    rows = []
    for gpus in WORLDS:
        row: dict[str, float | None] = {
            "gpus": gpus,
            "ours": _ms(gpus, ours),
            "per_split": _ms(gpus, split),
        }
        for size in GROUPS:
            row[f"sync_group_{size}"] = _ms(size, ours) if size < gpus else None
        row["gathered_bytes"] = sum(gathered_bytes(channels, splits, gpus) for channels in features)
        rows.append(row)
    return rows


def _ms(ranks: int, sizes: Sequence[int]) -> float:
    return sum(all_reduce_us(ranks, size) for size in sizes) / 1e3

"""Soaks the layer: thousands of steps of random uneven batches on four gloo ranks.

    python tests/soak.py --steps 20000

Three layers of three splits run forward and backward. Every thousand steps it is checked that no
rank's memory grew, that all ranks hold the same bits of every buffer, and that the running
statistics are those of a replay in float64 that has all ranks' rows and none of the package's
code. The first failure ends it with one line and exit code 1.
"""

import argparse
import hashlib
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import RankError, run_ranks
from torch import Tensor, nn
from tqdm import tqdm

from sync_splitbn import SyncSplitBatchNorm, assign_splits

RANKS, SPLITS, FEATURES = 4, 3, 8
MOMENTA = (0.1, 0.01, None)  # of the three layers; None averages all steps, and so forgets nothing
MAX_GROWTH = 4.0  # MiB a rank after the first check: 19,000 steps may not keep 220 bytes each
MAX_DRIFT = 1e-5  # in standard deviations, and of the variance


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return a rank's rows and the split of each; every fourth batch or so is empty."""
    generator = torch.Generator().manual_seed(RANKS * step + rank)
    count = max(0, int(torch.randint(-4, 13, (), generator=generator)))
    split = torch.randint(SPLITS, (count,), generator=generator)
    x = torch.randn(count, FEATURES, generator=generator)
    return x * (1 + split[:, None]) + 3 * split[:, None], split


def model() -> nn.Sequential:
    """Return the same model on every rank; it is not trained, so that a replay can follow it."""
    torch.manual_seed(0)
    blocks = []
    for momentum in MOMENTA:
        norm = SyncSplitBatchNorm(FEATURES, momentum=momentum, num_splits=SPLITS)
        blocks += [nn.Linear(FEATURES, FEATURES), norm, nn.Tanh()]
    return nn.Sequential(*blocks)


class Replay:
    """The running statistics by definition, float64: means and variances [layer, S, C]."""

    def __init__(self, net: nn.Sequential) -> None:
        self.linear = [
            (each.weight.detach().double(), each.bias.detach().double()) for each in net[::3]
        ]
        self.mean = torch.zeros(len(MOMENTA), SPLITS, FEATURES, dtype=torch.float64)
        self.var = torch.ones_like(self.mean)
        self.count = torch.zeros(len(MOMENTA), SPLITS, dtype=torch.int64)

    def step(self, x: Tensor, split: Tensor) -> None:
        """Follow the rows of all ranks."""
        x = x.double()
        for layer, (momentum, (weight, bias)) in enumerate(zip(MOMENTA, self.linear, strict=True)):
            x = x @ weight.T + bias
            normal = torch.zeros_like(x)
            for s in range(SPLITS):
                part = x[split == s]
                if not len(part):
                    continue
                self.count[layer, s] += 1
                m = 1 / self.count[layer, s] if momentum is None else momentum
                mean = part.mean(0)
                square = (part - mean).square().sum(0)
                self.mean[layer, s] += m * (mean - self.mean[layer, s])
                if len(part) > 1:
                    self.var[layer, s] += m * (square / (len(part) - 1) - self.var[layer, s])
                normal[split == s] = (part - mean) / (square / len(part) + 1e-5).sqrt()
            x = normal.tanh()

    def drift(self, net: nn.Sequential) -> float:
        """Return how far the model's running statistics are off; inf if a counter is."""
        worst = 0.0
        for layer, norm in enumerate(net[1::3]):
            for s, stats in enumerate((norm, *norm.aux_bn)):
                if stats.num_batches_tracked != self.count[layer, s]:
                    return float("inf")
                var = self.var[layer, s]
                mean_off = (stats.running_mean - self.mean[layer, s]).abs() / var.sqrt()
                var_off = (stats.running_var - var).abs() / var
                off = torch.cat([mean_off, var_off]).max().item()
                # NaN compares with nothing.
                worst = max(worst, off) if off == off else float("inf")
        return worst


def soak(rank: int, world_size: int, steps: int) -> dict[str, float | str]:
    """Run one rank; return a summary, with a reason if it failed."""
    # The lock that tqdm makes is a semaphore, which outlives a rank that ends by os._exit.
    tqdm.set_lock(threading.RLock())
    net, interval, start = model(), min(1000, -(-steps // 5)), time.monotonic()
    replay = Replay(net) if rank == 0 else None
    first, largest = 0.0, 0.0  # memory at the first check, drift
    for step in tqdm(range(1, steps + 1), unit="step", disable=rank != 0):
        x, split = batch(step, rank)
        with assign_splits(net, index=split):
            y = net(x.requires_grad_())
        net.zero_grad()
        y.square().sum().backward()
        if replay is not None:
            # A batch follows from its step and rank, so none has to be sent.
            parts = [batch(step, each) for each in range(world_size)]
            replay.step(*(torch.cat(part) for part in zip(*parts, strict=True)))
        if step % interval and step < steps:
            continue
        memory = resident_mib()
        drift = 0.0 if replay is None else replay.drift(net)
        largest = max(largest, drift)
        reports: list[tuple[str, float, float]] = [("", 0.0, 0.0)] * world_size
        dist.all_gather_object(reports, (digest(net), memory - (first or memory), drift))
        # After the gathering: the first one imports what it needs.
        first = first or resident_mib()
        if reason := failure(reports):
            return {"failure": f"step {step}: {reason}"}
    minutes = (time.monotonic() - start) / 60
    summary = {"minutes": minutes, "first": first, "last": memory}
    return {"failure": "", "drift": drift, "largest": largest, **summary}


def failure(reports: list[tuple[str, float, float]]) -> str | None:
    """Return what is wrong by all ranks' digests, growths in MiB and drifts, or None."""
    digests, growths, drifts = zip(*reports, strict=True)
    if len(set(digests)) > 1:
        return f"buffers must be the same bits on all ranks, got digests {[d[:8] for d in digests]}"
    if max(growths) > MAX_GROWTH:
        return f"memory must grow by {MAX_GROWTH} MiB at most, got {max(growths):.1f}"
    if not max(drifts) <= MAX_DRIFT:
        return f"running statistics must be within {MAX_DRIFT} of the replay, got {max(drifts):.2g}"
    return None


def digest(net: nn.Module) -> str:
    """Return a hash of the bits of every buffer."""
    whole = hashlib.sha256()
    for _, buffer in sorted(net.named_buffers()):
        whole.update(buffer.numpy().tobytes())
    return whole.hexdigest()


def resident_mib() -> float:
    """Return the memory of this process that is resident, MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """Start the ranks, print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20000, help="default: %(default)s")
    steps = parser.parse_args().steps
    if steps < 1:
        parser.error(f"--steps must be at least 1, got {steps}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            ranks = run_ranks(soak, RANKS, Path(folder), steps, seconds=60 + steps)
        except RankError as error:
            sys.exit(f"soak failed: {str(error).strip().splitlines()[-1]}")
    if ranks[0]["failure"]:
        sys.exit(f"soak failed: {ranks[0]['failure']}")
    print(f"{'rank':>6} {'RSS at first check':>20} {'RSS at the end':>16}   MiB")
    for rank, summary in enumerate(ranks):
        print(f"{rank:>6} {summary['first']:>20.1f} {summary['last']:>16.1f}")
    drift, largest, minutes = (ranks[0][name] for name in ("drift", "largest", "minutes"))
    print(f"steps {steps}, minutes {minutes:.1f}, buffers the same bits on {RANKS} ranks")
    print(f"drift {drift:.2g} at the end, largest drift {largest:.2g}, limit {MAX_DRIFT}")


if __name__ == "__main__":
    main()

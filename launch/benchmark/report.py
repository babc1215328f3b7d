"""What the benchmark tells: tables on the terminal, and a JSON file of all that it knows."""

import datetime
import json
import os
import platform
import shlex
from collections.abc import Iterable, Sequence
from importlib.metadata import distributions
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from tqdm import tqdm

from ..recipe.report import versions

_OTHERS = ("timm", "triton")
_LAUNCHER = "accelerate launch --config_file launch/configs/two_processes.yaml --num_processes"


class Report:
    """The main process's account of a run; on other ranks every method does nothing."""

    def __init__(self, path: Path, *, main: bool, header: dict[str, Any]) -> None:
        self.path, self.main, self.results = path, main, header

    def print(self, *lines: str) -> None:
        """Print lines above the bar, on the main process alone."""
        for line in lines if self.main else ():
            tqdm.write(line)

    def write(self, **results: Any) -> None:
        """Add `results` and write the file, whole or not at all."""
        self.results |= results
        if self.main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.results, indent=1) + "\n")
            os.replace(partial, self.path)


def header(device: torch.device, ranks: int, words: list[str]) -> dict[str, Any]:
    """Return what the numbers of a run depend on; `words` are those of the command line."""
    start = f"{_LAUNCHER} {ranks}" if ranks > 1 else "python"
    return {
        "command": f"{start} -m launch.benchmark {shlex.join(words)}",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device.type,
        "device_name": _device_name(device),
        "ranks": ranks,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": versions() | {d.name: d.version for d in distributions() if d.name in _OTHERS},
    }


def summarize(cases: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return, for each implementation that ran on all shapes, all layers of the network together.

    `step_ms` adds the medians of all layers. `time_by_ours` is the time over that of
    SyncSplitBatchNorm, the geometric mean over shapes, and `time_by_ours_least` the smallest.
    """
    rows: dict[str, dict[str, float]] = {}
    for name in cases[0]["contenders"]:
        if all(name in case["contenders"] for case in cases):
            times = [case["contenders"][name]["median_ms"] for case in cases]
            layers = [case["layers"] for case in cases]
            rows[name] = {"step_ms": sum(n * t for n, t in zip(layers, times, strict=True))}
            if all("ours" in case["contenders"] for case in cases):
                ours = [case["contenders"]["ours"]["median_ms"] for case in cases]
                ratios = [time / other for time, other in zip(times, ours, strict=True)]
                rows[name] |= {
                    "time_by_ours": geometric_mean(ratios),
                    "time_by_ours_least": min(ratios),
                }
    return rows


def table(title: str, columns: dict[str, str], result: dict[str, Any]) -> Iterable[str]:
    """Yield the lines of a table: a row for each of `contenders`, and why others `failed`."""
    rows = result["contenders"]
    width = max(map(len, rows), default=0)
    yield f"\n{title}"
    yield " " * (width + 2) + "".join(f"{key.replace('_', ' '):>20}" for key in columns)
    for name, row in rows.items():
        values = [(row[key], form) for key, form in columns.items()]
        cells = ["-" if value is None else format(value, form) for value, form in values]
        yield f"  {name:<{width}}" + "".join(f"{cell:>20}" for cell in cells)
    for name, why in result.get("failed", {}).items():
        yield f"  {name:<{width}}  failed: {why}"


def _device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()

"""What the benchmark tells: tables of at most 100 columns, and a JSON file of all that it knows."""

import datetime
import json
import math
import os
import platform
import shlex
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..recipe.report import versions

WIDTH = 100
_CONFIG = "launch/configs/two_processes.yaml"
_MODULE = "launch.benchmark"
_Cell = str | float | int | None


class Report:
    """The main process's account of a run; on other ranks every method does nothing.

    Args:
        path: the JSON file.
        main: whether this is the main process.
        header: what the file says first.
    """

    def __init__(self, path: Path, *, main: bool, header: dict[str, Any]) -> None:
        self.path, self.main, self.results = path, main, header

    def print(self, *lines: str) -> None:
        """Print lines above the bar, on the main process alone."""
        if self.main:
            for line in lines:
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
    launcher = ["accelerate", "launch", "--config_file", _CONFIG, "--num_processes", str(ranks)]
    return {
        "command": shlex.join([*(launcher if ranks > 1 else ["python"]), "-m", _MODULE, *words]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device.type,
        "device_name": device_name(device),
        "ranks": ranks,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": versions() | {name: _version(name) for name in ("triton", "timm")},
    }


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def summarize(setting: dict[str, Any]) -> dict[str, dict[str, float | str | None]]:
    """Return, for each contender, all layers of the network together.

    Args:
        setting: an entry of the JSON file's `settings`, with its `cases` and `traffic`.

    Returns:
        By name: `step_ms`, the medians weighted by the number of layers, and `step_iqr_ms`
        likewise; `ours_is`, how many times as fast ours is in the geometric mean over shapes, and
        `ours_is_at_least`; `collectives` and their time; None where a shape is missing.
    """
    cases = setting["cases"]
    rows: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for case in cases for name in case["contenders"]):
        found = [(case, case["contenders"].get(name)) for case in cases]
        whole = all(row is not None for _, row in found)
        ratios = [
            row["median_ms"] / case["contenders"]["ours"]["median_ms"]
            for case, row in found
            if row is not None and "ours" in case["contenders"]
        ]
        rows[name] = {
            "ours_is": math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None,
            "ours_is_at_least": min(ratios, default=None),
            "moved_v": setting["traffic"].get(name),
        }
        for key, source in (
            ("step_ms", "median_ms"),
            ("step_iqr_ms", "iqr_ms"),
            ("step_host_ms", "host_median_ms"),
            ("collectives", "collectives"),
            ("collectives_ms", "collectives_median_ms"),
        ):
            values = [row.get(source) if row else None for _, row in found]
            known = whole and None not in values
            layers = [case["layers"] for case in cases]
            rows[name][key] = (
                sum(n * value for n, value in zip(layers, values, strict=True)) if known else None
            )
    return rows


def table(
    columns: Sequence[tuple[str, int]], rows: Iterable[Sequence[_Cell]], indent: str = "  "
) -> list[str]:
    """Return lines with headings above: the first column to the left, the others to the right."""
    widths = [width for _, width in columns]
    lines = [[heading for heading, _ in columns]]
    lines += [[cell if isinstance(cell, str) else number(cell) for cell in row] for row in rows]
    return [
        indent
        + line[0].ljust(widths[0])
        + "".join(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        for line in lines
    ]


def number(value: float | int | None) -> str:
    """Return a number with three digits that count, `-` for one that is not known."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(digits, 0), 4)}f}"


def times(value: float | None, digits: int = 2) -> str:
    """Return a ratio."""
    return "-" if value is None else f"{value:.{digits}f}x"


def cut(line: str) -> str:
    """Return a line that fits the terminal."""
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

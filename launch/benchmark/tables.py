"""The benchmark's tables, each as lines.

S splits, V bytes of a layer's input.
"""

import textwrap
from collections.abc import Iterable
from typing import Any

from .cases import FLOOR
from .report import WIDTH, cut, number, summarize, table, times
from .wire import GPUS_PER_NODE, GROUPS, ONE_NODE, TWO_NODES, per_doubling

_CASE_LEGEND = (
    "ours is    how many times as fast ours is as the contender of the line",
    "GB/s       bytes that must move (3V forward, 8V with backward) over the time;",
    "of copy    the same as a part of the rate of a copy of the same tensor",
    "peak V     memory held beyond input, dy and parameters, as a multiple of the input",
    "sent       collectives of a step; their ms: the same messages posted alone",
)
_SUMMARY_LEGEND = (
    "ms a step  the medians above, each times the number of layers of its shape",
    "ours is    geometric mean over the shapes; at least: the worst of them",
    "moved V    bytes that operators read and write, as a multiple of the input; - for kernels",
    "           that are no operators (Triton's, compiled ones), which cannot be counted",
    f"of floor   the same over what must move, {FLOOR['forward']}V forward, "
    f"{FLOOR['both']}V with backward",
)


def heading(header: dict[str, Any], labels: dict[str, str], missing: dict[str, str]) -> list[str]:
    """Return who is measured where, and who is not, with the reason."""
    versions = header["versions"]
    shown = ("python", "torch", "triton", "timm", "sync_splitbn")
    ranks = f"{header['ranks']} rank{'s' * (header['ranks'] > 1)}"
    lines = [
        f"{header['device_name']} ({header['device']}), {ranks}, {header['threads']} thread(s), "
        f"{header['date']}",
        ", ".join(f"{name} {versions[name] or 'not installed'}" for name in shown),
        "",
        *(f"  {name:<16}{label}" for name, label in labels.items()),
        *(f"  {name:<16}not run: {why}" for name, why in missing.items()),
    ]
    if header["memory_kept"]:
        lines.append(
            "Freed memory is kept for the next tensor (mallopt), as caching allocators do."
        )
    if header["device"] == "cpu" and header["ranks"] > 1:
        lines.append(f"{ranks} share the {header['cores']} cores of this machine.")
    return [cut(line) for line in lines]


def case_legend(cuda: bool) -> list[str]:
    """Return what the columns of the tables of one shape mean."""
    host = ("host ms    the host's time to queue a step; the GPU's is taken with all queued",)
    return ["", *_CASE_LEGEND, *(host if cuda else ())]


def summary_legend() -> list[str]:
    """Return what the columns of the tables of a network mean."""
    return ["", *_SUMMARY_LEGEND]


def case_table(case: dict[str, Any]) -> list[str]:
    """Return the table of one shape."""
    size = case["tensor_bytes"]
    cuda = any("host_median_ms" in row for row in case["contenders"].values())
    columns = [("", 16), ("median ms", 10), ("IQR", 8), ("ours is", 9), ("GB/s", 8)]
    columns += [("of copy", 9), ("peak V", 8), ("sent", 6), ("their ms", 10)]
    columns += [("host ms", 10)] if cuda else []
    rows = [
        [
            name,
            number(row["median_ms"]),
            number(row["iqr_ms"]),
            times(_ratio(case, row)),
            number(row["floor_gb_per_s"]),
            f"{row['of_copy']:.0%}",
            number(row["peak_bytes"] / size),
            number(row["collectives"]),
            number(row["collectives_median_ms"]),
            *([number(row["host_median_ms"])] if cuda else []),
        ]
        for name, row in case["contenders"].items()
    ]
    layers = f"{case['layers']} layer{'s' * (case['layers'] > 1)}"
    return [
        "",
        f"{list(case['shape'])}, {layers}: V = {number(size / 1e6)} MB, "
        f"copied at {number(case['copy']['gb_per_s'])} GB/s",
        *table(columns, rows),
        *_failures(case["failed"]),
    ]


def summary_table(setting: dict[str, Any]) -> list[str]:
    """Return the table of all layers of a network under one setting."""
    summary = summarize(setting)
    cuda = any(row["step_host_ms"] is not None for row in summary.values())
    floor = FLOOR[setting["direction"]]
    columns = [("", 16), ("ms a step", 10), ("IQR", 8), ("ours is", 9), ("at least", 9)]
    columns += [("moved V", 9), ("of floor", 9), ("sent", 6), ("their ms", 10)]
    columns += [("host ms", 10)] if cuda else []
    rows = [
        [
            name,
            number(row["step_ms"]),
            number(row["step_iqr_ms"]),
            times(row["ours_is"]),
            times(row["ours_is_at_least"]),
            number(row["moved_v"]),
            times(row["moved_v"] and row["moved_v"] / floor),
            number(row["collectives"]),
            number(row["collectives_ms"]),
            *([number(row["step_host_ms"])] if cuda else []),
        ]
        for name, row in summary.items()
    ]
    layers = sum(case["layers"] for case in setting["cases"])
    return ["", f"{setting['title']}, all {layers} layers", *table(columns, rows)]


def model_table(setting: dict[str, Any]) -> list[str]:
    """Return the table of a model's training step."""
    rows = setting["contenders"]
    cuda = any("host_median_ms" in row for row in rows.values())
    columns = [("", 16), ("ms a step", 11), ("IQR", 8), ("ours is", 9), ("to plain", 9)]
    columns += [("images/s", 10), ("peak MB", 9), ("sent", 6), ("their ms", 10)]
    columns += [("host ms", 9)] if cuda else []
    plain = rows.get("plain", {}).get("median_ms")
    lines = [
        [
            name,
            number(row["median_ms"]),
            number(row["iqr_ms"]),
            times(_ratio(setting, row)),
            times(plain and row["median_ms"] / plain, 3),
            number(row["images_per_s"]),
            number(row["peak_bytes"] / 1e6),
            number(row["collectives"]),
            number(row["collectives_median_ms"]),
            *([number(row["host_median_ms"])] if cuda else []),
        ]
        for name, row in rows.items()
    ]
    return [
        "",
        f"{setting['title']}, images {list(setting['shape'])} a rank",
        f"  model by {setting['model']}",
        *table(columns, lines),
        *_failures(setting["failed"]),
        "  To plain: time of the step over that with plain batch norms. Their ms: the batch norms'",
        "  messages alone, without DDP's.",
    ]


def scaling_table(rows: Iterable[dict[str, Any]], title: str) -> list[str]:
    """Return the table of measured collectives, ours beside one all_reduce a split."""
    by_key = {(row["ranks"], row["splits"], row["contender"]): row for row in rows}
    columns = [("ranks", 6), ("splits", 7), ("ours: sent", 12), ("MB", 7), ("ms", 9), ("IQR", 8)]
    columns += [("per split: sent", 17), ("MB", 7), ("ms", 9), ("IQR", 8), ("ours is", 9)]
    lines = []
    for ranks, splits in dict.fromkeys((ranks, splits) for ranks, splits, _ in by_key):
        pair = [by_key[ranks, splits, name] for name in ("ours", "all-reduce")]
        cells = [str(ranks), str(splits)]
        for row in pair:
            cells += [number(row["collectives"]), number(row["bytes"] / 1e6)]
            cells += [number(row["median_ms"]), number(row["iqr_ms"])]
        ours, other = (row["median_ms"] for row in pair)
        lines.append([*cells, times(other / ours if pair[0]["collectives"] else None)])
    return ["", f"Measured: collectives of a step of {title}", *table(columns, lines, indent="")]


def wire_table(estimates: dict[int, list[dict[str, Any]]], title: str) -> list[str]:
    """Return the estimate of the wire time on many GPUs, for each number of splits."""
    points = ", ".join(f"{size / 1024:.3g} KB {time}" for size, time in ONE_NODE)
    inputs = (
        f"Inputs: an all_reduce on {GPUS_PER_NODE} H100 of one node takes, in us, {points} "
        "(Triton-distributed#57), on two nodes "
        f"{TWO_NODES[0] / 1024:.3g} KB {TWO_NODES[1]} (nccl#1244). Assumed: every doubling of the "
        f"nodes adds what that adds to one node, {per_doubling():.1f} us. Waiting for slow ranks "
        "is not in it. sync_group: ours over groups of so many GPUs. SyncBN gathers: bytes that a "
        "rank receives in the forward all_gathers of one nn.SyncBatchNorm a split; arithmetic."
    )
    columns = [("GPUs", 8), ("splits", 7), ("ours", 10), ("per split", 11)]
    columns += [(f"sync_group({size})", 17) for size in GROUPS] + [("SyncBN gathers", 18)]
    lines = [
        [
            f"{row['gpus']:,}",
            str(splits),
            number(row["ours"]),
            number(row["per_split"]),
            *(number(row[f"sync_group_{size}"]) for size in GROUPS),
            f"{number(row['gathered_bytes'] / 1e6)} MB",
        ]
        for splits, rows in estimates.items()
        for row in rows
    ]
    return [
        "",
        f"ESTIMATE, not measured: ms on the wire of a step of {title}",
        *textwrap.wrap(inputs, WIDTH, initial_indent="  ", subsequent_indent="  "),
        *table(columns, lines, indent=""),
    ]


def _ratio(case: dict[str, Any], row: dict[str, Any]) -> float | None:
    """Return how many times as fast ours is."""
    ours = case["contenders"].get("ours")
    return row["median_ms"] / ours["median_ms"] if ours else None


def _failures(failed: dict[str, str]) -> list[str]:
    return [cut(f"  {name:<16}failed: {why}") for name, why in failed.items()]

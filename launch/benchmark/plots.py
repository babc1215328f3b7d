"""The benchmark's pictures."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from .report import number, summarize, times

# Ours in blue, its kernels by name in lighter blues, peers apart from it and from each other.
_COLORS = {
    "ours": "#08519c",
    "own-group": "#6baed6",
    "aten": "#9ecae1",
    "cpu": "#4292c6",
    "triton": "#4292c6",
    "compiled": "#6a51a3",
    "timm": "#e6550d",
    "sync-bn": "#cb181d",
    "all-reduce": "#31a354",
    "plain": "#636363",
    "plain-compiled": "#bdbdbd",
}
_ROW = 3.4


def plot_layers(results: dict[str, Any], path: Path) -> None:
    """Draw bandwidth by shape and the sum over layers; settings of one shape side by side.

    Args:
        results: content of the JSON file.
        path: the picture.
    """
    many = [setting for setting in results["settings"] if len(setting["cases"]) > 1]
    single = [setting for setting in results["settings"] if len(setting["cases"]) == 1]
    rows = len(many) + (len(single) + 1) // 2
    figure = Figure(figsize=(13, _ROW * rows + 0.8), dpi=110, layout="constrained")
    grid = figure.add_gridspec(rows, 2, width_ratios=[1.7, 1] if many else None)
    for i, setting in enumerate(many):
        _bandwidth(figure.add_subplot(grid[i, 0]), setting)
        axes = figure.add_subplot(grid[i, 1])
        _bars(axes, _sums(setting))
        axes.set_title("all layers of a step", fontsize=10)
    for i, setting in enumerate(single):
        axes = figure.add_subplot(grid[len(many) + i // 2, i % 2])
        case = setting["cases"][0]
        _bars(axes, case["contenders"])
        axes.set_title(f"{setting['title']}\n{list(case['shape'])}", fontsize=10)
    _save(figure, results, path)


def plot_model(results: dict[str, Any], path: Path) -> None:
    """Draw the time of a training step, a panel a setting."""
    settings = results["settings"]
    rows = (len(settings) + 1) // 2
    columns = min(len(settings), 2)
    figure = Figure(figsize=(6.5 * columns, _ROW * rows + 0.8), dpi=110, layout="constrained")
    for i, setting in enumerate(settings):
        axes = figure.add_subplot(rows, columns, i + 1)
        _bars(axes, setting["contenders"])
        axes.set_title(f"{setting['title']}\n{list(setting['shape'])} a rank", fontsize=10)
    _save(figure, results, path)


def plot_scaling(results: dict[str, Any], path: Path) -> None:
    """Draw measured collectives of a step by splits, and the estimate by GPUs."""
    figure = Figure(figsize=(13, 4.8), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = [row for row in results["measured"] if row["ranks"] > 1]
    worlds = sorted({row["ranks"] for row in rows})
    for i, ranks in enumerate(worlds):
        for name, style in (("ours", "-"), ("all-reduce", "--")):
            line = [r for r in rows if (r["ranks"], r["contender"]) == (ranks, name)]
            left.plot(
                [row["splits"] for row in line],
                [row["median_ms"] for row in line],
                style,
                color=f"C{i}",
                marker="o",
                markersize=4,
                label=f"{ranks} ranks, {'ours' if name == 'ours' else 'a message per split'}",
            )
    left.set_title(f"measured: gloo ranks share {results['cores']} cores", fontsize=10)
    left.set(xlabel="splits", ylabel="collectives, ms a step", ylim=(0, None))
    left.xaxis.set_major_locator(FixedLocator(sorted({row["splits"] for row in rows})))
    if rows:
        left.legend(frameon=False, fontsize=8)
    _estimate(right, results["estimated"])
    _save(figure, results, path)


def _estimate(axes: Axes, estimated: dict[str, list[dict[str, Any]]]) -> None:
    splits = max(estimated, key=int)
    rows = estimated[splits]
    keys = {
        "per_split": ("a message per split", _COLORS["all-reduce"], "--"),
        "ours": ("ours, all ranks", _COLORS["ours"], "-"),
        "sync_group_64": ("ours, sync_group(64)", _COLORS["cpu"], "-"),
        "sync_group_8": ("ours, sync_group(8)", "#6baed6", "-"),
    }
    for key, (label, color, style) in keys.items():
        line = [(row["gpus"], row[key]) for row in rows if row[key] is not None]
        axes.plot(*zip(*line, strict=True), style, color=color, marker="o", markersize=4)
        axes.annotate(
            f"{label}: {number(line[-1][1])} ms",
            line[-1],
            xytext=(-6, 5),
            textcoords="offset points",
            horizontalalignment="right",
            fontsize=8,
            color=color,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator([row["gpus"] for row in rows]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{row['gpus']:,}" for row in rows])
    axes.margins(y=0.1)
    axes.set_title(f"ESTIMATE from published latencies, {splits} splits", fontsize=10)
    axes.set(xlabel="GPUs", ylabel="on the wire, ms a step")


def _bandwidth(axes: Axes, setting: dict[str, Any]) -> None:
    """Draw the share of the copy rate over the shapes."""
    cases = setting["cases"]
    for name in dict.fromkeys(name for case in cases for name in case["contenders"]):
        points = [
            (i, case["contenders"][name]["of_copy"])
            for i, case in enumerate(cases)
            if name in case["contenders"]
        ]
        axes.plot(
            *zip(*points, strict=True),
            color=_COLORS[name],
            marker="o",
            markersize=4 if name != "ours" else 6,
            linewidth=1.2 if name != "ours" else 2.6,
            zorder=3 if name == "ours" else 2,
            label=name,
        )
    labels = [f"{c}\n{h}x{w}" for _, c, h, w in (case["shape"] for case in cases)]
    axes.set_xticks(range(len(cases)), labels, fontsize=7)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    # Room for the legend above the lines.
    top = max(row["of_copy"] for case in cases for row in case["contenders"].values())
    axes.set(ylim=(0, 1.25 * top), ylabel="what must move over the time,\nof a copy's bandwidth")
    axes.set_title(f"{setting['title']}, {cases[0]['shape'][0]} rows", fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, fontsize=7, ncols=5, loc="upper center")


def _sums(setting: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the sums over layers as `_bars` takes them."""
    return {
        name: {"median_ms": row["step_ms"], "iqr_ms": row["step_iqr_ms"]}
        for name, row in summarize(setting).items()
        if row["step_ms"] is not None
    }


def _bars(axes: Axes, rows: dict[str, dict[str, Any]]) -> None:
    """Draw medians with half the interquartile range to each side, and the ratio to ours."""
    names = list(rows)
    medians = [rows[name]["median_ms"] for name in names]
    axes.barh(
        names,
        medians,
        xerr=[rows[name]["iqr_ms"] / 2 for name in names],
        color=[_COLORS[name] for name in names],
        error_kw={"linewidth": 1, "ecolor": "black"},
    )
    ours = rows.get("ours", {}).get("median_ms")
    for i, (name, median) in enumerate(zip(names, medians, strict=True)):
        ratio = f"  ({times(median / ours)})" if ours and name != "ours" else ""
        right = median + rows[name]["iqr_ms"] / 2
        axes.annotate(
            f"{number(median)}{ratio}",
            (right, i),
            xytext=(4, 0),
            textcoords="offset points",
            verticalalignment="center",
            fontsize=8,
        )
    axes.invert_yaxis()
    axes.set_xlabel("ms (how many times as fast ours is)" if ours else "ms", fontsize=9)
    axes.margins(x=0.25)
    axes.tick_params(axis="y", labelsize=8)


def _save(figure: Figure, results: dict[str, Any], path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    ranks = f"{results['ranks']} rank{'s' * (results['ranks'] > 1)}, " if "ranks" in results else ""
    figure.suptitle(
        f"{results['device_name']}, {ranks}{results['threads']} thread(s), "
        f"torch {results['versions']['torch']}, {results['date'][:10]}",
        fontsize=11,
    )
    figure.savefig(path)

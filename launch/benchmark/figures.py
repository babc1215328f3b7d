"""The benchmark's figures."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .report import summarize

_COLOURS = {"ours": "C0", "aten": "C9", "cpu": "C9", "triton": "C9", "compiled": "C4", "timm": "C1"}


def draw_bars(results: dict[str, Any], path: Path) -> None:
    """Draw a panel for each setting: the time of layers, of a model's step, or of messages."""
    settings = results["settings"]
    columns = min(len(settings), 2)
    rows = -(-len(settings) // columns)
    figure = Figure(figsize=(6.5 * columns, 3.2 * rows + 0.8), dpi=110, layout="constrained")
    for number, setting in enumerate(settings, start=1):
        bars = {name: row["step_ms"] for name, row in summarize(setting["cases"]).items()}
        axes = figure.add_subplot(rows, columns, number)
        colours = [_COLOURS.get(name, "0.6") for name in bars]
        axes.barh(list(bars), list(bars.values()), color=colours)
        for place, (name, time) in enumerate(bars.items()):
            ratio = f"  ({time / bars['ours']:.2f} x ours)" if "ours" in bars else ""
            text = f" {time:,.4g}{'' if name == 'ours' else ratio}"
            axes.annotate(text, (time, place), va="center", fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.4)
        axes.set_title(setting["title"], fontsize=10)
        axes.set_xlabel("ms a step")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{results['device_name']}, {results['threads']} thread(s) a rank, "
        f"torch {results['versions']['torch']}, {results['date'][:10]}"
    )
    figure.savefig(path)

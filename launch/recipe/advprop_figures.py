"""The figures of `launch.advprop`: of one run, and of several variants."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from .comparison import Results, mean_and_error
from .report import draw_accuracy, draw_divergence, draw_loss, new_figure

_METRICS = {
    "test_accuracy": "clean images, split 0",
    "auxiliary_accuracy": "clean images, auxiliary split",
    "attacked_accuracy": "attacked images, split 0",
    "auxiliary_attacked_accuracy": "attacked images, auxiliary split",
}
_VARIANTS = {
    "auxiliary": "auxiliary\nbatch norm",
    "joint": "joint\nstatistics",
    "clean": "clean\nimages alone",
}


def draw_run(results: dict[str, Any]) -> Figure:
    """Draw loss, accuracies and, with split layers, the divergence over depth of one run."""
    last = results["epochs"][-1]
    figure, axes = new_figure(3 if "divergences" in last else 2, _title(results))
    draw_loss(axes[0], results, {"test_loss": "clean test images"})
    draw_accuracy(axes[1], results, _METRICS)
    if "divergences" in last:
        draw_divergence(axes[2], last["divergences"])
    return figure


def draw_comparison(results: Results) -> Figure:
    """Draw clean and attacked accuracy of every variant, and the divergence over depth."""
    first = next(iter(results.values()))[0]
    has_splits = "divergences" in first["epochs"][-1]
    figure, axes = new_figure(2 if has_splits else 1, _title(first))
    width = 0.8 / len(_METRICS)
    for number, (metric, label) in enumerate(_METRICS.items()):
        places = [place + (number - 1.5) * width for place in range(len(results))]
        values = [
            mean_and_error([run["epochs"][-1][metric] for run in runs]) for runs in results.values()
        ]
        means, errors = zip(*values, strict=True)
        colour, alpha = f"C{number // 2}", 1.0 if number % 2 == 0 else 0.5
        axes[0].bar(places, means, width, yerr=errors, color=colour, alpha=alpha, label=label)
        for place, mean in zip(places, means, strict=True):
            axes[0].annotate(f"{mean:.0%}", (place, mean), ha="center", va="bottom", fontsize=7)
    axes[0].set_xticks(range(len(results)), [_VARIANTS[name] for name in results])
    # Room for the legend above the bars.
    axes[0].set(title="test accuracy", ylim=(0, 1.3), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1])
    axes[0].yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes[0].legend(frameon=False, fontsize=8, ncols=2, loc="upper center")
    if has_splits:
        draw_divergence(axes[1], first["epochs"][-1]["divergences"])
    return figure


def _title(results: dict[str, Any]) -> str:
    options = results["arguments"]
    return (
        f"{options['attack_steps']} steps of PGD within {options['epsilon']:g} of 255, "
        f"tested with {options['test_attack_steps']} on at most {options['attacked_tests']}, "
        f"{results['ranks']} x {results['device']}"
    )

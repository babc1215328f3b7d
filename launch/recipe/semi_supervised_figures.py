"""The figures of `launch.semi_supervised`: of one run, and of several normalizations."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from .comparison import Results, mean_and_error
from .report import draw_accuracy, draw_loss, new_figure


def draw_run(results: dict[str, Any]) -> Figure:
    """Draw loss, accuracy and the divergence over depth of one run."""
    figure, axes = new_figure(3, _title(results))
    draw_loss(axes[0], results, {"test_loss": "test images"})
    draw_accuracy(axes[1], results, {"test_accuracy": "test images"})
    _draw_depth(axes[2], {results["arguments"]["norm"]: [results]})
    return figure


def draw_comparison(results: Results) -> Figure:
    """Draw accuracy by normalization, and how far the two domains are apart, by depth and time."""
    first = next(iter(results.values()))[0]
    figure, axes = new_figure(3, _title(first))
    for number, (norm, runs) in enumerate(results.items()):
        accuracies = [run["epochs"][-1]["test_accuracy"] for run in runs]
        mean, error = mean_and_error(accuracies)
        axes[0].bar(number, mean, yerr=error, color=f"C{number}", alpha=0.6, capsize=4)
        axes[0].plot([number] * len(runs), accuracies, "k.", markersize=4)
        axes[0].annotate(f"{mean:.1%}", (number, 0.02), ha="center")
        epochs = [row["epoch"] for row in runs[0]["epochs"]]
        over_time = [
            sum(run["epochs"][i]["divergence"] for run in runs) / len(runs)
            for i in range(len(epochs))
        ]
        axes[2].plot(epochs, over_time, marker=".", color=f"C{number}", label=norm)
    axes[0].set_xticks(range(len(results)), [norm.replace("-", "-\n") for norm in results])
    axes[0].set(title="test accuracy, standard error over seeds", ylim=(0, 1))
    axes[0].yaxis.set_major_formatter(PercentFormatter(xmax=1))
    _draw_depth(axes[1], results)
    axes[2].set(title="mean over layers, by epoch", xlabel="epoch", yscale="log")
    axes[2].set_ylabel("symmetric KL divergence (nats)")
    axes[2].legend(frameon=False)
    return figure


def _draw_depth(axes: Any, results: Results) -> None:
    """Draw the divergence at the end of training by layer, the mean over seeds."""
    for number, (norm, runs) in enumerate(results.items()):
        by_run = [[*run["epochs"][-1]["divergences"].values()] for run in runs]
        means = [sum(values) / len(values) for values in zip(*by_run, strict=True)]
        axes.plot(range(1, len(means) + 1), means, marker="o", color=f"C{number}", label=norm)
    axes.set(title="labelled and unlabelled statistics apart", yscale="log")
    axes.set(xlabel="batch norm layer, input to output", ylabel="symmetric KL divergence (nats)")
    axes.legend(frameon=False)


def _title(results: dict[str, Any]) -> str:
    options = results["arguments"]
    shifts = [
        f"{name.replace('_', ' ')} {options[name]}"
        for name, none in (("salt_and_pepper", 0), ("contrast", 1), ("blur", 0))
        if options[name] != none
    ]
    shifts = (["inverted"] if options["invert"] else []) + shifts
    return (
        f"{options['method']}, {options['labelled']} labelled images, unlabelled ones "
        f"{', '.join(shifts) or 'not shifted'}, {results['ranks']} x {results['device']}"
    )

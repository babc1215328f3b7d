"""Several runs of a recipe in one command, each in a folder of its own, and what they come to."""

import argparse
import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from .checkpoints import refuse_other_run
from .errors import RunError
from .run import Recipe, as_json, decisive_arguments, train_once, world_of

# Variant: the results.json of its runs, one for each seed.
Results = Mapping[str, Sequence[dict[str, Any]]]


def compare(
    recipe: Recipe,
    variants: Mapping[str, Mapping[str, Any]],
    seeds: int,
    draw: Callable[[Results], Any],
    metrics: Sequence[str],
    options: argparse.Namespace,
    accelerator: Accelerator,
) -> int:
    """Train every variant with every seed, and return the exit code.

    A run that is complete is not trained again: an interrupted comparison goes on with
    `--resume auto`.

    Args:
        recipe: what is trained.
        variants: by name, the options in which each differs.
        seeds: runs of each variant, with `--seed`, `--seed` + 1 and so on.
        draw: draws the figure of all results.
        metrics: keys of the last table row that are compared.
        options: of the command line; `output` receives a folder for each run.
        accelerator: which all runs share.
    """
    runs = {
        (name, seed): _options_of_run(options, name, changes, options.seed + seed)
        for name, changes in variants.items()
        for seed in range(seeds)
    }
    for number, ((name, _), each) in enumerate(runs.items(), start=1):
        if options.resume == "auto" and _is_complete(each, accelerator):
            continue
        if each.torchcompile:
            # Graphs of the runs before count against Dynamo's limit.
            torch.compiler.reset()
        accelerator.print(f"\n{name}, seed {each.seed}: run {number} of {len(runs)}, {each.output}")
        code = train_once(recipe, each, accelerator)
        if code:
            return code
        accelerator.free_memory()
    if accelerator.is_main_process:
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
        for (name, _), each in runs.items():
            results[name].append(json.loads((each.output / "results.json").read_text()))
        draw(results).savefig(options.output / "summary.png")
        summary = summarize(results, metrics)
        first = results[next(iter(variants))][0]
        about = {key: first[key] for key in ("arguments", "device", "ranks", "versions")}
        text = json.dumps({**about, "variants": summary}, indent=1)
        (options.output / "comparison.json").write_text(text + "\n")
        accelerator.print("\n" + _table(summary))
        accelerator.print(f"  {options.output / 'comparison.json'}  the same numbers")
        accelerator.print(f"  {options.output / 'summary.png'}  the same as a figure")
    return 0


def summarize(results: Results, metrics: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return mean, standard error and values of each metric's last row, by variant."""
    summary: dict[str, dict[str, Any]] = {}
    for name, runs in results.items():
        summary[name] = {}
        for metric in metrics:
            values = [run["epochs"][-1][metric] for run in runs]
            mean, error = mean_and_error(values)
            summary[name][metric] = {"mean": mean, "standard_error": error, "values": values}
    return summary


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, 0 of a single value."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def _options_of_run(
    options: argparse.Namespace, name: str, changes: Mapping[str, Any], seed: int
) -> argparse.Namespace:
    """Return the options of one run."""
    each = copy.copy(options)
    vars(each).update(changes)
    each.seed, each.output = seed, options.output / f"{name}-seed{seed}"
    if options.resume not in (None, "auto"):
        raise RunError(f"--resume must be auto for several runs, got {options.resume}")
    return each


def _is_complete(options: argparse.Namespace, accelerator: Accelerator) -> bool:
    """Return whether this run has all its steps, or raise if the folder has another one."""
    file = options.output / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {"status": "absent"}
    if results["status"] != "complete":
        return False
    own = decisive_arguments(as_json(options), world_of(accelerator))
    refuse_other_run(decisive_arguments(results["arguments"], results), own, file)
    done, wanted = len(results["losses"]), results["steps_per_epoch"] * options.epochs
    wanted = min(wanted, options.max_steps or wanted)
    if done > wanted:
        raise RunError(
            f"--max-steps must be at least the {done} steps of {file}, got {wanted}; repeat it, or "
            "pass another --output"
        )
    return bool(done == wanted)


def _table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a line for each variant: mean and standard error of each metric."""
    metrics = next(iter(summary.values()))
    width = max(len(name) for name in (*summary, "variant"))
    lines = [f"{'variant':{width}}" + "".join(f"  {metric:>24}" for metric in metrics)]
    for name, values in summary.items():
        cells = (_cell(v) for v in values.values())
        lines.append(f"{name:{width}}" + "".join(f"  {cell:>24}" for cell in cells))
    return "\n".join(lines)


def _cell(value: Mapping[str, Any]) -> str:
    """Return the mean, and its standard error where there are several values."""
    error = f" ± {value['standard_error']:.2%}" if len(value["values"]) > 1 else ""
    return f"{value['mean']:.2%}{error}"

"""What `python -m launch.benchmark` does."""

import argparse
import dataclasses
import functools
import sys
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from ..recipe.errors import RunError
from ..recipe.run import leave, run_safely
from .figures import draw_bars
from .implementations import Implementation, available
from .layers import measure_case
from .model import measure_model
from .options import parse_arguments
from .report import Report, header, summarize, table
from .scaling import measure_world
from .shapes import Setting, cases, settings
from .timing import keep_memory

_CASE = {"median_ms": ".3f", "iqr_ms": ".3f", "of_copy": ".0%", "collectives": "d"}
_SUMMARY = {"step_ms": ".2f", "time_by_ours": ".2f", "time_by_ours_least": ".2f"}
_MODEL = {"median_ms": ".1f", "iqr_ms": ".1f", "images_per_s": ".1f"}
_SCALING = {"collectives": "d", "bytes": ",d", "median_ms": ".1f", "iqr_ms": ".1f"}


def main(arguments: list[str] | None = None) -> int:
    """Measure as the command line says, and return the exit code."""
    options = parse_arguments(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.scaling is not None:
        _measure_scaling(options, words)
        return 0
    options.cpu, options.seed, options.tracker = options.device == "cpu", 0, None
    options.timeout, options.mixed_precision = 600.0, None
    return run_safely(functools.partial(_measure_all, words), options)


def _measure_all(words: list[str], options: argparse.Namespace, accelerator: Accelerator) -> int:
    """Measure every shape, or a whole model, under every setting."""
    device, able, report = _prepare(options, words, accelerator)
    torch.backends.cudnn.benchmark = options.model
    planned: dict[Setting, list[Any]] = cases(options)
    if options.model:
        planned = {setting: [None] for setting in settings(options, ["resnet50 step"])}
    found: list[dict[str, Any]] = []
    total = sum(map(len, planned.values())) * (len(able) + (not options.model)) * options.repeats
    with tqdm(total=total, disable=None if report.main else True, leave=False) as bar:
        for setting, shapes in planned.items():
            done: list[dict[str, Any]] = []
            found.append(dataclasses.asdict(setting) | {"title": str(setting), "cases": done})
            for case in shapes:
                if options.model:
                    done.append(measure_model(setting, options, able, device, bar.update))
                else:
                    done.append(measure_case(case, able, device, options.repeats, bar.update))
                title = f"{setting}, {list(done[-1]['shape'])}, {done[-1]['layers']} layer(s)"
                report.print(*table(title, _MODEL if options.model else _CASE, done[-1]))
                report.write(settings=found)
    for entry in found:
        entry["summary"] = summarize(entry["cases"])
        title = f"{entry['title']}, all layers; time by that of SyncSplitBatchNorm"
        report.print(*table(title, _SUMMARY, {"contenders": entry["summary"]}))
    _finish(report)
    return 0


def _measure_scaling(options: argparse.Namespace, words: list[str]) -> None:
    """Measure the messages of a step alone, over several processes started here."""
    about = header(torch.device("cpu"), 1, words) | {"threads": 1}
    report = Report(options.output / "scaling.json", main=True, header=about)
    report.print(f"{about['device_name']}: all ranks share {about['cores']} cores, one thread each")
    found: list[dict[str, Any]] = []
    for world in tqdm(options.scaling, desc="ranks", disable=None):
        rows = measure_world(world, options.shapes[0], options.splits, options.repeats)
        title = f"all_reduces of a step of {options.shapes[0]}, {world} rank(s)"
        found.append({"title": title, "cases": [{"layers": 1, "contenders": rows}]})
        report.print(*table(title, _SCALING, found[-1]["cases"][0]))
        report.write(settings=found)
    _finish(report)


def _prepare(
    options: argparse.Namespace, words: list[str], accelerator: Accelerator
) -> tuple[torch.device, list[Implementation], Report]:
    """Return the device, what is compared, and the report with its heading printed."""
    device = torch.device(accelerator.device.type)
    if device.type != options.device:
        raise RunError(
            f"--device {options.device} must be there for each of {accelerator.num_processes} "
            f"ranks, got {torch.cuda.device_count()} GPU(s); pass --device cpu, or start fewer"
        )
    able, missing = available(device, options.contenders)
    labels = {each.name: each.label for each in able}
    about = header(device, accelerator.num_processes, words)
    about |= {"memory_kept": device.type == "cpu" and keep_memory()}
    about |= {"contenders": labels, "not_run": missing}
    path = options.output / ("model.json" if options.model else "layers.json")
    report = Report(path, main=accelerator.is_main_process, header=about)
    report.print(f"{about['device_name']}, {about['ranks']} rank(s), {about['threads']} thread(s)")
    report.print(*(f"  {name:<16}{label}" for name, label in labels.items()))
    report.print(*(f"  {name:<16}not run: {why}" for name, why in missing.items()))
    return device, able, report


def _finish(report: Report) -> None:
    report.write()
    if report.main:
        draw_bars(report.results, report.path.with_suffix(".png"))
    report.print("", f"written: {report.path} and {report.path.with_suffix('.png').name}")


if __name__ == "__main__":
    leave(main())

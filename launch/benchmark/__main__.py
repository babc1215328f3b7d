"""What `python -m launch.benchmark` does.

S splits, W ranks, V bytes of a layer's input.
"""

import argparse
import contextlib
import dataclasses
import gc
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from tqdm import tqdm

from ..recipe.start import start
from .cases import NETWORKS, Setting, cases
from .contenders import NAMES, Contender, contenders
from .layers import Bench, measure, traffic
from .measure import Stopwatch, keep_memory
from .model import measure_model, model_settings
from .options import parse_arguments
from .plots import plot_layers, plot_model, plot_scaling
from .report import Report, header, summarize
from .scaling import measure_world
from .tables import (
    case_legend,
    case_table,
    heading,
    model_table,
    scaling_table,
    summary_legend,
    summary_table,
    wire_table,
)
from .wire import estimate

# Beside layers the one would double the time that compilation takes, and the other equal ours.
_MODEL_ONLY = ("plain-compiled", "own-group")


def main(arguments: list[str] | None = None) -> int:
    """Measure as the command line says, and return the exit code.

    Args:
        arguments: words of the command line; None takes this process's own.

    Raises:
        RuntimeError: there is no GPU for each rank, or more ranks than the mode allows.
    """
    options = parse_arguments(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.scaling is not None:
        _scaling(options, words)
        return 0
    accelerator = start(cpu=options.device == "cpu", seed=0, output=options.output)
    if accelerator.device.type != options.device:
        raise RuntimeError(
            f"--device {options.device} must be there for each of {accelerator.num_processes} "
            f"ranks, got {torch.cuda.device_count()} GPU(s); pass --device cpu, or start fewer"
        )
    with _group_of_one(options, accelerator):
        (_model if options.model else _layers)(options, words, accelerator)
        # The process group may hang when it goes before the models.
        gc.collect()
    accelerator.end_training()
    return 0


def _layers(options: argparse.Namespace, words: list[str], accelerator: Accelerator) -> None:
    """Measure every shape under every setting."""
    able, report, bench = _prepare(options, words, accelerator, "layers", ahead=True)
    report.print(*case_legend(options.device == "cuda"))
    planned = cases(options)
    settings: list[dict[str, Any]] = []
    total = bench.ticks(itertools.chain(*planned.values()), len(able))
    with _bar(total, bench, accelerator):
        for setting, shapes in planned.items():
            moved = traffic(setting, able, bench.device)
            settings.append(_entry(setting) | {"traffic": moved, "cases": []})
            report.print("", f"== {setting}")
            for case in shapes:
                settings[-1]["cases"].append(measure(case, able, bench))
                report.print(*case_table(settings[-1]["cases"][-1]))
                report.write(settings=settings)
    whole = [setting for setting in settings if len(setting["cases"]) > 1]
    report.print(*(summary_legend() if whole else ()))
    for setting in whole:
        setting["summary"] = summarize(setting)
        report.print(*summary_table(setting))
    _finish(report, settings, plot_layers)


def _model(options: argparse.Namespace, words: list[str], accelerator: Accelerator) -> None:
    """Measure the training step of a ResNet-50 under every setting."""
    torch.backends.cudnn.benchmark = True
    able, report, bench = _prepare(options, words, accelerator, "model", ahead=False)
    planned = model_settings(options)
    settings: list[dict[str, Any]] = []
    with _bar(len(able) * (options.repeats + 1) * len(planned), bench, accelerator):
        for setting in planned:
            settings.append(_entry(setting) | measure_model(setting, options, able, bench))
            report.print(*model_table(settings[-1]))
            report.write(settings=settings)
    _finish(report, settings, plot_model)


def _scaling(options: argparse.Namespace, words: list[str]) -> None:
    """Measure collectives over several processes started here, and estimate those of many GPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError(
            f"--scaling must run as one process, got {os.environ['WORLD_SIZE']}; "
            "run python -m launch.benchmark --scaling, which starts its own"
        )
    network = options.shapes[0]
    channels = [c for c, _, _, layers in NETWORKS[network] for _ in range(layers)]
    title = f"{network}, {len(channels)} batch norms"
    about = header(torch.device("cpu"), 1, words) | {"threads": 1}
    del about["ranks"]
    report = Report(options.output / "scaling.json", main=True, header=about)
    report.print(
        f"{about['device_name']}, gloo over the loopback device, {about['date']}",
        f"All ranks share the {about['cores']} cores of this machine, one thread each: beyond "
        f"{about['cores']} ranks",
        "they wait for each other's turn as much as for messages.",
    )
    measured: list[dict[str, Any]] = []
    for world in tqdm(options.scaling, desc="ranks", disable=None):
        measured += measure_world(world, network, options.splits, options.repeats)
        report.write(measured=measured)
    estimated = {splits: estimate(channels, splits) for splits in options.splits}
    report.print(*scaling_table(measured, title), *wire_table(estimated, title))
    report.write(network=network, estimated=estimated)
    plot_scaling(report.results, report.path.with_suffix(".png"))
    report.print("", _farewell(report.path))


def _prepare(
    options: argparse.Namespace,
    words: list[str],
    accelerator: Accelerator,
    name: str,
    *,
    ahead: bool,
) -> tuple[list[Contender], Report, Bench]:
    """Return who takes part, the report with its heading printed, and the means of measuring."""
    device = torch.device(accelerator.device.type)
    wanted = options.contenders or [one for one in NAMES if options.model or one not in _MODEL_ONLY]
    able, missing = contenders(device, wanted, alone=options.collectives_alone)
    labels = {one.name: one.label for one in able}
    about = header(device, accelerator.num_processes, words)
    about["memory_kept"] = device.type == "cpu" and keep_memory()
    report = Report(
        options.output / f"{name}.json",
        main=accelerator.is_main_process,
        header=about | {"contenders": labels, "not_run": missing},
    )
    report.print(*heading(about, labels, missing))
    return able, report, Bench(device, Stopwatch(device, ahead=ahead), options.repeats)


@contextlib.contextmanager
def _bar(total: int, bench: Bench, accelerator: Accelerator) -> Iterator[None]:
    """Show a bar that `bench.tick` moves, on the main process' terminal and nowhere else."""
    hidden = None if accelerator.is_main_process else True
    with tqdm(total=total, disable=hidden, leave=False) as bar:
        bench.tick = bar.update
        yield


@contextlib.contextmanager
def _group_of_one(options: argparse.Namespace, accelerator: Accelerator) -> Iterator[None]:
    """Make the process group that --collectives-alone posts to, if there is none."""
    if not options.collectives_alone or dist.is_initialized():
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl" if accelerator.device.type == "cuda" else "gloo",
            init_method=f"file://{folder}/store",
            rank=0,
            world_size=1,
        )
        yield
        dist.destroy_process_group()


def _entry(setting: Setting) -> dict[str, Any]:
    return {"title": str(setting), **dataclasses.asdict(setting)}


def _finish(
    report: Report,
    settings: list[dict[str, Any]],
    plot: Callable[[dict[str, Any], Path], None],
) -> None:
    """Write everything and say where it lies."""
    report.write(settings=settings)
    if report.main:
        plot(report.results, report.path.with_suffix(".png"))
    report.print("", _farewell(report.path))


def _farewell(path: Path) -> str:
    return f"written: {path} and {path.with_suffix('.png').name}"


if __name__ == "__main__":
    sys.exit(main())

"""A run from the command line to its end: one `Recipe`, and everything around its training."""

import argparse
import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import save_file
from torch import nn

from sync_splitbn import SyncSplitBatchNorm, check_replicas

from .checkpoints import Checkpoints, contiguous_state
from .errors import RunError, require_timm
from .failure import clear_causes, reason, report_failure
from .interruption import EXIT_INTERRUPTED, Interruption
from .lock import locked
from .models import plain_copy
from .optimization import needs_timm
from .options import timm_lr
from .parser import INDECISIVE, flag_of
from .report import Column, Report
from .start import start
from .trainer import Task, Trainer


@dataclass(frozen=True)
class Recipe:
    """What is particular to one recipe.

    Attributes:
        columns: what the table shows of the metrics that `Task.evaluate` returns.
        prepare: makes the task from the options; the random generators are seeded before.
        draw: draws the figure of the results that lie in results.json, and returns it.
        conclude: one sentence on the results, the last that is printed.
    """

    columns: Sequence[Column]
    prepare: Callable[[argparse.Namespace, Accelerator], Task]
    draw: Callable[[dict[str, Any]], Any]
    conclude: Callable[[dict[str, Any]], str]


def run_recipe(recipe: Recipe, options: argparse.Namespace) -> int:
    """Train as the options say, and return the exit code."""
    return run_safely(functools.partial(train_once, recipe), options)


def run_safely(
    body: Callable[[argparse.Namespace, Accelerator], int], options: argparse.Namespace
) -> int:
    """Start all ranks, call `body`, and return its exit code, or that of its failure.

    Communication:
        All ranks call it together.
    """
    # Before the ranks meet, so that none has failed yet.
    if options.output is not None and os.environ.get("RANK", "0") == "0":
        clear_causes(options.output)
    try:
        accelerator = start(options)
        if getattr(options, "lr", 0.0) is None:
            options.lr = timm_lr(options.opt, options.batch_size * accelerator.num_processes)
        code = body(options, accelerator)
    except Exception as error:
        return report_failure(error, options.output)
    accelerator.free_memory()
    return code


def leave(code: int) -> NoReturn:
    """End the process with everything written, and nothing taken down.

    The destruction of a process group beside live models or threads may hang or abort.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        os._exit(code)
    sys.exit(code)


def train_once(recipe: Recipe, options: argparse.Namespace, accelerator: Accelerator) -> int:
    """Train from the beginning or a checkpoint, and return the exit code.

    `results.json` says from the beginning to any end how the run stands: running, complete,
    interrupted, or failed with the reason.
    """
    if needs_timm(options):
        require_timm("timm", "images, a model, an optimizer or a schedule of timm")
    arguments, world = as_json(options), world_of(accelerator)
    header = {"arguments": arguments, "device": accelerator.device.type, **world}
    main = accelerator.is_main_process
    report = Report(options.output, main=main, columns=recipe.columns, header=header)
    decisive = decisive_arguments(arguments, world)
    checkpoints = Checkpoints(accelerator, options.output / "checkpoints", decisive)
    with locked(accelerator, options.output):
        checkpoint = checkpoints.find(options.resume)
        report.write("running")
        try:
            return _train(recipe, options, accelerator, report, checkpoints, checkpoint)
        except Exception as error:
            # A full disk must not hide what happened.
            with contextlib.suppress(OSError):
                report.write("failed", reason=reason(error))
            raise


def _train(
    recipe: Recipe,
    options: argparse.Namespace,
    accelerator: Accelerator,
    report: Report,
    checkpoints: Checkpoints,
    checkpoint: Path | None,
) -> int:
    """Do everything between the first and the last use of the model."""
    set_seed(options.seed)
    accelerator.dataloader_config.data_seed = options.seed
    # In the run's own folder, where several runs share an accelerator too.
    accelerator.project_configuration.logging_dir = str(options.output)
    accelerator.project_configuration.project_dir = str(options.output)
    task = recipe.prepare(options, accelerator)
    report.results["classes"] = list(task.classes)
    checkpoints.ema = None if task.ema is None else task.ema.module
    trainer = Trainer(
        accelerator,
        task,
        checkpoints,
        report,
        epochs=options.epochs,
        max_steps=options.max_steps,
        log_interval=options.log_interval,
        save_interval=options.save_interval,
    )
    if checkpoint is not None:
        trainer.resume(checkpoint)
    try:
        check_replicas(task.model)
    except ValueError as error:
        raise RunError(str(error)) from error
    _start_tracker(accelerator, options.tracker, len(trainer.progress.losses) + 1)
    with Interruption(trainer.describe) as interruption:
        origin = f", from {checkpoint}" if checkpoint else ""
        report.print(
            f"{len(task.loader)} steps an epoch of "
            f"{task.loader.total_batch_size * task.images_per_item} images, "
            f"on {accelerator.num_processes} x {accelerator.device.type}{origin}"
        )
        is_finished = trainer.run(interruption)
        for tracker in accelerator.trackers:
            tracker.finish()
        if not is_finished:
            steps = len(trainer.progress.losses)
            report.write("interrupted")
            report.print(
                f"interrupted after step {steps}, saved as {checkpoints.last}; "
                "repeat the command with --resume auto to go on"
            )
            # The launcher kills all ranks as soon as one has ended.
            accelerator.wait_for_everyone()
            return EXIT_INTERRUPTED
    if accelerator.is_main_process:
        model = task.ema.module if task.ema else accelerator.unwrap_model(task.model)
        _complete(recipe, options, task, model, report)
    return 0


def _complete(
    recipe: Recipe, options: argparse.Namespace, task: Task, model: nn.Module, report: Report
) -> None:
    """Write the weights and the figure of a run that has all its steps, and say so."""
    metadata = {"model": options.model, "classes": task.classes}
    files = _export(options.output, model, metadata | {"mean": task.mean, "std": task.std})
    recipe.draw(report.results).savefig(options.output / "summary.png")
    report.write("complete")
    report.print(_last_words(recipe.conclude(report.results), options.output, files))


def world_of(accelerator: Accelerator) -> dict[str, Any]:
    """Return what the launcher decides of the numbers of a run, as results.json has it."""
    return {"ranks": accelerator.num_processes, "mixed_precision": accelerator.mixed_precision}


def decisive_arguments(arguments: dict[str, Any], world: dict[str, Any]) -> dict[str, Any]:
    """Return what decides the numbers of a run, by the names the user knows.

    Args:
        arguments: as results.json has them; some of them decide.
        world: as `world_of` returns it.
    """
    own = {flag_of(name): value for name, value in arguments.items() if name not in INDECISIVE}
    return {name: world[name] for name in ("ranks", "mixed_precision")} | own


def as_json(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options as results.json has them."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
    }


def _start_tracker(accelerator: Accelerator, tracker: str, step: int) -> None:
    """Start accelerate's tracker, from a step on."""
    if tracker == "tensorboard":
        # Events of steps that are now trained again are hidden.
        accelerator.init_trackers("tensorboard", None, {"tensorboard": {"purge_step": step}})
    else:
        accelerator.init_trackers("sync_splitbn")


def _export(output: Path, model: nn.Module, metadata: dict[str, Any]) -> dict[str, str]:
    """Write the weights for inference, and return what each file is."""
    kind = type(model).__name__
    files = {"plain.safetensors": f"weights of {kind} with plain batch norms, those of split 0"}
    states = {"plain.safetensors": plain_copy(model)}
    if any(isinstance(module, SyncSplitBatchNorm) for module in model.modules()):
        files["split.safetensors"] = f"weights of {kind} with all splits, under timm's keys"
        states["split.safetensors"] = model
    texts = {name: json.dumps(value) for name, value in metadata.items()} | {"format": "pt"}
    for name, each in states.items():
        save_file(contiguous_state(each), output / name, texts | {"weights": files[name]})
        # safetensors makes it readable for its owner alone.
        (output / name).chmod((output / "results.json").stat().st_mode)
    return files


def _last_words(conclusion: str, output: Path, weights: dict[str, str]) -> str:
    """Return the result, and what lies where."""
    files = {
        "results.json": "arguments, versions, every loss and epoch",
        "summary.png": "the same as a figure",
        **weights,
        "checkpoints": "the last two, to go on from",
    }
    return "\n".join([conclusion, *(f"  {output / name}  {what}" for name, what in files.items())])

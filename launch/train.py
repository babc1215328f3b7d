"""Supervised training with augmentation splits; `python -m launch.train --help` says how.

A batch is laid out [clean | augmented | augmented ...]; with `--split-bn` each part has batch
norms of its own, whose statistics cover that part on all ranks.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sync_splitbn import convert_sync_split_batchnorm, revert_sync_split_batchnorm
from sync_splitbn.data import SplitViews

from .checkpoints import Checkpoints
from .datasets import MNIST_MEAN, MNIST_STD, mnist
from .engine import Task, Trainer
from .interrupt import EXIT_INTERRUPTED, Interruption, leave_signals_to_rank
from .losses import jsd_cross_entropy, split_cross_entropy
from .model import SmallResNet
from .optimization import sgd, warmup_cosine
from .options import INDECISIVE, parse_arguments
from .report import Report
from .start import start
from .views import View, split_transforms


def main(arguments: list[str] | None = None) -> int:
    """Train as the command line says, and return the exit code.

    Args:
        arguments: words of the command line; None takes this process's own.
    """
    options = parse_arguments(arguments)
    accelerator = start(cpu=options.cpu, seed=options.seed, output=options.output)
    code = _train(options, accelerator)
    # The process group may hang when it goes before the models, which were locals of _train.
    accelerator.free_memory()
    accelerator.end_training()
    return code


def _train(options: argparse.Namespace, accelerator: Accelerator) -> int:
    """Do everything between the first and the last use of the model."""
    decisive = {f"--{name.replace('_', '-')}": value for name, value in _decisive(options)}
    world = {"ranks": accelerator.num_processes, "mixed_precision": accelerator.mixed_precision}
    checkpoints = Checkpoints(accelerator, options.output / "checkpoints", world | decisive)
    checkpoint = checkpoints.find(options.resume)
    header = {
        "arguments": {name: _plain(value) for name, value in vars(options).items()},
        "device": accelerator.device.type,
        **world,
    }
    report = Report(options.output, main=accelerator.is_main_process, header=header)
    task = _task(options, accelerator)
    trainer = Trainer(
        accelerator,
        task,
        checkpoints,
        report,
        epochs=options.epochs,
        max_steps=options.max_steps,
        log_interval=options.log_interval,
    )
    if checkpoint is not None:
        trainer.resume(checkpoint)
    accelerator.init_trackers(
        "tensorboard",
        # Events of steps that are now trained again are hidden.
        init_kwargs={"tensorboard": {"purge_step": len(trainer.progress.losses) + 1}},
    )
    with Interruption() as interruption:
        origin = f", from {checkpoint}" if checkpoint else ""
        report.print(
            f"{len(task.train_views)} images, {len(task.train_loader)} steps an epoch, "
            f"on {accelerator.num_processes} x {accelerator.device.type}{origin}"
        )
        finished = trainer.run(interruption)
    report.write("complete" if finished else "interrupted")
    if finished:
        weights = options.output / "plain.safetensors"
        if accelerator.is_main_process:
            splits = options.aug_splits if options.split_bn else 0
            save_file(_plain_state(accelerator.unwrap_model(task.model), splits), weights)
        report.draw()
        report.print(_farewell(report.results, options.output, weights, checkpoints.last))
        return 0
    report.print(
        f"interrupted after step {len(trainer.progress.losses)}, saved as {checkpoints.last}; "
        "repeat the command with --resume auto to go on"
    )
    return EXIT_INTERRUPTED


def _task(options: argparse.Namespace, accelerator: Accelerator) -> Task:
    """Return data, model, optimizer and schedule, prepared."""
    set_seed(options.seed)
    views, train_loader, test_loader = _loaders(options, accelerator)
    model: nn.Module = SmallResNet()
    if options.split_bn:
        model = convert_sync_split_batchnorm(model, options.aug_splits)
    optimizer = sgd(
        model, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay
    )
    steps = len(train_loader) // accelerator.num_processes
    if steps == 0:
        raise ValueError(
            f"--batch-size must leave a whole batch for each rank, got {options.batch_size} on "
            f"{accelerator.num_processes} ranks for {len(views)} images"
        )
    scheduler = warmup_cosine(
        optimizer, warmup=options.warmup_epochs * steps, total=options.epochs * steps
    )
    model, optimizer, scheduler, train_loader, test_loader = accelerator.prepare(
        model, optimizer, scheduler, train_loader, test_loader
    )
    return Task(
        model=model,
        loss=_loss(options),
        optimizer=optimizer,
        scheduler=scheduler,
        train_views=views,
        train_loader=train_loader,
        test_loader=test_loader,
        split=options.split_bn,
    )


def _loaders(
    options: argparse.Namespace, accelerator: Accelerator
) -> tuple[SplitViews, DataLoader[Any], DataLoader[Any]]:
    """Return the training views and, not yet prepared, the loaders."""
    train, test = mnist()
    mean, std = [MNIST_MEAN], [MNIST_STD]
    transforms = split_transforms(
        max(1, options.aug_splits),
        mean=mean,
        std=std,
        aa=options.aa,
        reprob=options.reprob,
        resplit=options.resplit,
    )
    views = SplitViews(train, transforms, seed=options.seed)
    load = functools.partial(
        DataLoader,
        batch_size=options.batch_size,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
        pin_memory=accelerator.device.type != "cpu",
        worker_init_fn=leave_signals_to_rank,
    )
    # Generators of their own keep the loaders off torch's, whose state a checkpoint restores.
    train_loader = load(views, shuffle=True, drop_last=True, generator=torch.Generator())
    test_loader = load(SplitViews(test, [View(mean, std)]), generator=torch.Generator())
    return views, train_loader, test_loader


def _loss(options: argparse.Namespace) -> Any:
    """Return the loss of (model, input, labels)."""
    criterion = functools.partial(split_cross_entropy, smoothing=options.smoothing)
    if options.jsd_loss:
        criterion = functools.partial(
            jsd_cross_entropy, num_splits=options.aug_splits, smoothing=options.smoothing
        )

    def loss(model: nn.Module, input: Tensor, labels: Tensor) -> Tensor:
        return criterion(model(input), labels)

    return loss


def _plain_state(model: nn.Module, splits: int) -> dict[str, Tensor]:
    """Return the weights of the same network with plain batch norms, those of split 0."""
    if splits:
        # A twin, because a model that accelerate has prepared is not to be changed any more.
        twin = convert_sync_split_batchnorm(SmallResNet(), splits)
        twin.load_state_dict(model.state_dict())
        model = revert_sync_split_batchnorm(twin)
    return {name: value.contiguous().cpu() for name, value in model.state_dict().items()}


def _decisive(options: argparse.Namespace) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in vars(options).items() if name not in INDECISIVE]


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _farewell(results: dict[str, Any], output: Path, weights: Path, checkpoint: Any) -> str:
    """Return the last words: the result, and what lies where."""
    return (
        f"test accuracy {results['test_accuracy']:.2%} after {len(results['losses'])} steps, "
        f"{results['seconds']:.0f} s\n"
        f"  {output / 'results.json'}  arguments, versions, every loss and epoch\n"
        f"  {output / 'summary.png'}  loss, accuracy, divergence between the splits\n"
        f"  {weights}  plain batch norm weights for launch.model.SmallResNet\n"
        f"  {checkpoint}  checkpoint\n"
        f"  tensorboard --logdir {output}  the same curves, live"
    )


if __name__ == "__main__":
    sys.exit(main())

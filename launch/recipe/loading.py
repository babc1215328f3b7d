"""Loaders of a recipe: batches of views for training, single images for the test."""

import argparse
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from .errors import RunError
from .interruption import leave_signals_to_rank


def training_loader(
    options: argparse.Namespace, accelerator: Accelerator, dataset: Dataset[Any]
) -> DataLoader[Any]:
    """Return a loader of whole, shuffled batches, not yet prepared by accelerate.

    Raises:
        RunError: the images do not fill a batch of every rank.
    """
    images: int = len(dataset)  # type: ignore[arg-type]
    if images < options.batch_size * accelerator.num_processes:
        raise RunError(
            f"-b must leave a whole batch for each rank, got {options.batch_size} on "
            f"{accelerator.num_processes} ranks for {images} images"
        )
    return _loader(options, accelerator, dataset, is_training=True)


def test_loader(
    options: argparse.Namespace, accelerator: Accelerator, dataset: Dataset[Any]
) -> DataLoader[Any]:
    """Return a loader of test images [B, C, H, W] and labels, not yet prepared by accelerate."""
    return _loader(options, accelerator, dataset, is_training=False)


def _loader(
    options: argparse.Namespace,
    accelerator: Accelerator,
    dataset: Dataset[Any],
    *,
    is_training: bool,
) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size=options.batch_size,
        shuffle=is_training,
        drop_last=is_training,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
        pin_memory=accelerator.device.type != "cpu",
        worker_init_fn=leave_signals_to_rank,
        # A generator of its own keeps the loader off torch's, whose state a checkpoint restores.
        generator=torch.Generator(),
    )

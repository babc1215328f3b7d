"""From the options to a model with its optimizer, in the one order that is right."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..images.sets import classes_of, count_channels
from .models import build_model
from .optimization import create_ema, create_optimizer


def prepare_model(
    options: argparse.Namespace,
    accelerator: Accelerator,
    convert: Callable[[nn.Module], nn.Module],
) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """Build, load, convert, move, make the optimizer and the average, and compile.

    Args:
        options: of `recipe.options.add_data_options` and `add_optimization_options`.
        accelerator: prepares model and optimizer afterwards.
        convert: from the model with plain batch norms to the one that is trained.

    Returns:
        The model, its optimizer, and timm's `ModelEmaV3` of it or None.
    """
    model = build_model(
        options, num_classes=len(classes_of(options)), in_channels=count_channels(options)
    )
    model = convert(model).to(accelerator.device, memory_format=memory_format_of(options))
    optimizer = create_optimizer(options, model)
    ema = create_ema(options, model)
    if options.torchcompile:
        # In place, so that the keys of a checkpoint stay.
        model.compile(backend=options.torchcompile)
    return model, optimizer, ema


def memory_format_of(options: argparse.Namespace) -> torch.memory_format:
    """Return the layout of model and images."""
    return torch.channels_last if options.channels_last else torch.contiguous_format

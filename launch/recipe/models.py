"""The model of a recipe: a small residual network, or any of timm's, and its weights as files."""

import argparse
import contextlib
import copy
from collections.abc import Sequence
from pathlib import Path
from pickle import PickleError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sync_splitbn import SyncSplitBatchNorm, assign_splits, revert_sync_split_batchnorm

from .errors import RunError, require_timm
from .options import SMALL_RESNET


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        stride: step of the first convolution, in pixels.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, input: Tensor) -> Tensor:
        """Keep the shape but for the channels and the stride."""
        hidden = self.act(self.bn1(self.conv1(input)))
        return self.act(self.bn2(self.conv2(hidden)) + self.shortcut(input))


class SmallResNet(nn.Sequential):
    """A stem, three residual blocks and a linear classifier: nine batch norms.

    Args:
        num_classes: size of the output.
        in_channels: 1 for grey images, 3 for colour.
        width: channels of the first block; the second has twice, the third four times as many.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, width: int = 24) -> None:
        super().__init__()
        # The stem halves the image: a fifth of the time, and MNIST does not notice.
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.block1 = ResidualBlock(width, width, stride=1)
        self.block2 = ResidualBlock(width, 2 * width, stride=2)
        self.block3 = ResidualBlock(2 * width, 4 * width, stride=2)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, num_classes)
        )


def build_model(options: argparse.Namespace, *, num_classes: int, in_channels: int) -> nn.Module:
    """Return the model that the options name, with plain batch norms and its first weights.

    Args:
        options: of `recipe.options.add_data_options`.
        num_classes: outputs, where `--num-classes` does not say otherwise.
        in_channels: bands of the images.

    Raises:
        RunError: the model is unknown, or the weights are of another.
    """
    if options.num_classes is not None:
        if options.num_classes < num_classes:
            raise RunError(
                f"--num-classes must be at least the {num_classes} classes of the images, got "
                f"{options.num_classes}"
            )
        num_classes = options.num_classes
    if options.model == SMALL_RESNET:
        if options.pretrained:
            raise RunError(f"--pretrained must come with a model of timm, got {SMALL_RESNET}")
        model: nn.Module = SmallResNet(num_classes, in_channels)
    else:
        timm = require_timm("timm", f"--model {options.model}")
        try:
            model = timm.create_model(
                options.model,
                pretrained=options.pretrained,
                num_classes=num_classes,
                in_chans=in_channels,
            )
        except RuntimeError as error:
            raise RunError(f"--model must be {SMALL_RESNET} or one of timm, got {error}") from error
    if options.initial_checkpoint is not None:
        load_state(model, read_weights(options.initial_checkpoint), options.initial_checkpoint)
    return model


def forward_parts(model: nn.Module, parts: Sequence[Tensor], *, is_split: bool) -> Tensor:
    """Return the logits of all parts of a batch, in one pass.

    Args:
        model: with batch norms of ours.
        parts: rows of each part, [n, C, H, W].
        is_split: whether each part has a split of its own; else all share their statistics.
    """
    sizes = [len(part) for part in parts]
    with assign_splits(model, sizes=sizes) if is_split else contextlib.nullcontext():
        logits: Tensor = model(torch.cat(list(parts)))
    return logits


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model with plain batch norms, those of split 0; the model stays."""
    twin = copy.deepcopy(model)
    has_splits = any(isinstance(module, SyncSplitBatchNorm) for module in twin.modules())
    return revert_sync_split_batchnorm(twin) if has_splits else twin


def read_weights(file: Path) -> dict[str, Any]:
    """Return the state dict in a file of safetensors or of torch.save.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
        # timm's trainer keeps the model beside its optimizer.
        found: dict[str, Any] = state.get("state_dict", state)
    except (OSError, SafetensorError, EOFError, RuntimeError, AttributeError, PickleError) as error:
        raise RunError(f"{file} must hold weights, got {_in_one_line(error)}") from error
    return found


def load_state(model: nn.Module, state: dict[str, Any], origin: Path) -> None:
    """Load a whole state dict.

    Raises:
        RunError: it is of another model; the message names `origin`.
    """
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise RunError(
            f"{origin} must hold weights of this model, got {_in_one_line(error)}; "
            "check --model and --num-classes"
        ) from error


def _in_one_line(error: Exception) -> str:
    """Return the beginning of a message that may have many lines."""
    text = " ".join(str(error).split())
    return text if len(text) < 200 else text[:200] + " ..."

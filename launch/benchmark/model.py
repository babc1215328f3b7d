"""A whole model: the training step of ResNet-50 with each implementation's batch norms."""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from .implementations import Implementation
from .shapes import LAYOUTS, Setting
from .timing import Step, as_json, in_turn, warm_up

_CLASSES = 1000


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_convolution(inputs, width, 1),
            nn.ReLU(inplace=True),
            *_convolution(width, width, 3, stride),
            nn.ReLU(inplace=True),
            *_convolution(width, 4 * width, 1),
        )
        is_equal = stride == 1 and inputs == 4 * width
        convolution = () if is_equal else _convolution(inputs, 4 * width, 1, stride)
        self.shortcut = nn.Sequential(*convolution)

    def forward(self, input: Tensor) -> Tensor:
        """Return the sum of both ways, rectified."""
        return F.relu(self.layers(input) + self.shortcut(input), inplace=True)


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return convolution, nn.BatchNorm2d(outputs)


def resnet50() -> nn.Module:
    """Return ResNet-50, as torchvision builds it but for the initialization."""
    layers = [*_convolution(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)]
    inputs = 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(depth):
            layers.append(Bottleneck(inputs, width, stride if block == 0 else 1))
            inputs = 4 * width
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, _CLASSES))
    return nn.Sequential(*layers, *head)


def build_model(each: Implementation, splits: int) -> nn.Module:
    """Return ResNet-50 with an implementation's layers in the place of its batch norms."""
    model = resnet50()
    for name, norm in list(model.named_modules()):
        if isinstance(norm, nn.BatchNorm2d):
            model.set_submodule(name, each.build(norm.num_features, splits))
    return model


def measure_model(
    setting: Setting,
    options: argparse.Namespace,
    implementations: list[Implementation],
    device: torch.device,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Return what is known of a setting: forward, loss, backward and SGD of each implementation."""
    torch.manual_seed(0)
    shape = (options.batch_size, 3, options.image_size, options.image_size)
    images = torch.randn(shape, device=device).contiguous(memory_format=LAYOUTS[setting.layout])
    labels = torch.randint(_CLASSES, (options.batch_size,), device=device)
    torch.compiler.reset()
    makers = {
        each.name: functools.partial(_step, each, setting, images, labels)
        for each in implementations
    }
    steps, failed = warm_up(makers)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rows = {
        name: {**as_json(time), "images_per_s": options.batch_size * ranks / time.median}
        for name, time in in_turn(steps, options.repeats, tick).items()
    }
    return {"shape": shape, "layers": 1, "contenders": rows, "failed": failed}


def _step(each: Implementation, setting: Setting, images: Tensor, labels: Tensor) -> Step:
    """Return a whole training step."""
    model = build_model(each, setting.splits)
    model = model.to(images.device, memory_format=LAYOUTS[setting.layout])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    if each.compiled:
        model.compile(dynamic=False)
    has_peers = dist.is_initialized() and dist.get_world_size() > 1
    trained = DistributedDataParallel(model) if has_peers else model
    dtype = getattr(torch, setting.dtype)

    def step() -> None:
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(trained(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step

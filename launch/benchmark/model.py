"""The model level: a training step of ResNet-50 whose batch norms are each contender's."""

import argparse
import contextlib
import functools
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from .cases import LAYOUTS, Setting
from .contenders import Contender
from .counts import peak_bytes
from .layers import Bench, measure_messages
from .measure import Step, in_turn, warm_up

_CLASSES = 1000


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut.

    Args:
        inputs: channels that come in.
        width: channels between the convolutions; four times as many go out.
        stride: step of the 3 x 3 convolution, in pixels.
    """

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, input: Tensor) -> Tensor:
        """Keep the shape but for the channels and the stride."""
        hidden = self.relu(self.bn1(self.conv1(input)))
        hidden = self.relu(self.bn2(self.conv2(hidden)))
        hidden = self.bn3(self.conv3(hidden))
        hidden += self.downsample(input)
        return self.relu(hidden)


def resnet50() -> nn.Module:
    """Return ResNet-50 as torchvision builds it, layer for layer, but for the initialization."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, padding=3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, padding=1),
    ]
    inputs = 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(depth):
            layers.append(Bottleneck(inputs, width, stride if block == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, _CLASSES)
    )


@functools.cache
def architecture() -> tuple[Callable[[], nn.Module], str]:
    """Return who builds the model, torchvision if it loads here, and the name to report."""
    try:
        from torchvision.models import resnet50 as theirs
    except (ImportError, RuntimeError):  # the latter beside a torch that it was not built for
        return resnet50, "launch.benchmark.model"
    return theirs, f"torchvision {metadata.version('torchvision')}"


def build_model(one: Contender, splits: int) -> nn.Module:
    """Return ResNet-50 with a contender's layers in the place of its batch norms."""
    model = architecture()[0]()
    for name, norm in list(model.named_modules()):
        if isinstance(norm, nn.BatchNorm2d):
            model.set_submodule(name, one.build(norm.num_features, splits))
    return model


def model_settings(options: argparse.Namespace) -> list[Setting]:
    """Return what the command line asks for."""
    return [
        Setting("resnet50 step", dtype, layout, splits, "both")
        for dtype in options.dtype
        for layout in options.layout
        for splits in options.splits
    ]


def measure_model(
    setting: Setting, options: argparse.Namespace, contenders: list[Contender], bench: Bench
) -> dict[str, Any]:
    """Return what is known of a setting: forward, loss, backward and SGD of each contender."""
    torch.manual_seed(0)
    shape = (options.batch_size, 3, options.image_size, options.image_size)
    images = torch.randn(shape, device=bench.device)
    images = images.contiguous(memory_format=LAYOUTS[setting.layout])
    labels = torch.randint(_CLASSES, (options.batch_size,), device=bench.device)
    # Messages are counted before DDP wraps the model and adds its own.
    bare: dict[str, Step] = {}

    def make(one: Contender) -> Step:
        bare[one.name], step = _steps(one, setting, images, labels, bench)
        return step

    if any(one.compiled for one in contenders):
        torch._dynamo.reset()
    makers = {one.name: functools.partial(make, one) for one in contenders}
    steps, failed = warm_up(makers, bench.tick)
    times = in_turn(steps, bench.stopwatch, bench.repeats, bench.tick)
    for _ in range(len(failed) * bench.repeats):
        bench.tick()
    collectives = measure_messages({name: bare[name] for name in steps}, contenders, bench)
    rows = {
        name: {
            **time.as_json(),
            **(host.as_json("host_") if bench.device.type == "cuda" else {}),
            "images_per_s": options.batch_size * bench.ranks / time.median * 1e3,
            "peak_bytes": peak_bytes(steps[name], bench.device),
            **collectives[name],
        }
        for name, (time, host) in times.items()
    }
    origin = architecture()[1]
    return {"model": origin, "shape": shape, "contenders": rows, "failed": failed}


def _steps(
    one: Contender, setting: Setting, images: Tensor, labels: Tensor, bench: Bench
) -> tuple[Step, Step]:
    """Return forward and backward of the bare model, and the whole step as it is trained."""
    model = build_model(one, setting.splits).to(bench.device, memory_format=LAYOUTS[setting.layout])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    if one.compiled:
        model = torch.compile(model, dynamic=False)
    trained = DistributedDataParallel(model) if bench.ranks > 1 else model
    half = setting.dtype != "float32"

    def gradients(module: nn.Module) -> None:
        context = (
            torch.autocast(bench.device.type, getattr(torch, setting.dtype))
            if half
            else contextlib.nullcontext()
        )
        with context:
            loss = F.cross_entropy(module(images), labels)
        loss.backward()

    def step() -> None:
        gradients(trained)
        optimizer.step()
        optimizer.zero_grad()

    def bare() -> None:
        gradients(model)
        optimizer.zero_grad()

    return bare, step

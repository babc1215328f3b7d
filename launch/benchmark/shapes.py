"""What is normalized: the batch norms of two networks at 224 x 224, and a small tensor."""

import argparse
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


def _network(shapes: str) -> list[tuple[int, int, int, int]]:
    """Return features, height, width and number of layers of every shape of a square network."""
    numbers = [tuple(map(int, shape.replace("@", "*").split("*"))) for shape in shapes.split()]
    return [(features, size, size, layers) for features, size, layers in numbers]


# Features @ height and width * layers that have this shape.
NETWORKS = {
    "resnet50": _network(
        "64@112*1 64@56*6 256@56*4 128@56*1 128@28*7 512@28*5 256@28*1 256@14*11 1024@14*7 "
        "512@14*1 512@7*5 2048@7*4"
    ),
    "efficientnet_b0": _network(
        "32@112*2 16@112*1 96@112*1 96@56*1 24@56*2 144@56*3 144@28*1 40@28*2 240@28*3 240@14*1 "
        "80@14*3 480@14*6 112@14*3 672@14*5 672@7*1 192@7*4 1152@7*8 320@7*1 1280@7*1"
    ),
    # So small that the interpreter takes most of the time.
    "small": _network("16@8*1"),
}
SMALL_ROWS = 32
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@dataclass(frozen=True)
class Setting:
    """What the shapes of a network are measured under, as one table."""

    network: str
    dtype: str
    layout: str
    splits: int

    def __str__(self) -> str:
        return f"{self.network}, {self.dtype} {self.layout}, {self.splits} split(s)"


@dataclass(frozen=True)
class Case:
    """One shape under one setting; `layers` of the network have it."""

    setting: Setting
    shape: tuple[int, int, int, int]
    layers: int

    @property
    def tensor_bytes(self) -> int:
        """Size of the input."""
        return torch.Size(self.shape).numel() * getattr(torch, self.setting.dtype).itemsize

    def tensor(self, device: torch.device) -> Tensor:
        """Return random values in the case's shape, type and layout."""
        values = torch.randn(self.shape, device=device).to(getattr(torch, self.setting.dtype))
        return values.contiguous(memory_format=LAYOUTS[self.setting.layout])


def cases(options: argparse.Namespace) -> dict[Setting, list[Case]]:
    """Return the cases that the command line asks for, by setting."""
    networks = {name: NETWORKS[name] for name in options.shapes if name in NETWORKS}
    for shape in options.shapes:
        if shape not in NETWORKS:
            features, height, width = map(int, shape.split("x"))
            networks.setdefault("listed", []).append((features, height, width, 1))
    found = {}
    for setting in settings(options, list(networks)):
        small = SMALL_ROWS - SMALL_ROWS % setting.splits
        rows = small if setting.network == "small" else options.batch_size
        found[setting] = [
            Case(setting, (rows, *shape), layers) for *shape, layers in networks[setting.network]
        ]
    return found


def settings(options: argparse.Namespace, networks: list[str]) -> list[Setting]:
    """Return every combination that the command line asks for."""
    product = itertools.product(networks, options.dtype, options.layout, options.splits)
    return [Setting(*values) for values in product]

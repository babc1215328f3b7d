"""What is normalized: the batch norms of two networks at 224 x 224, and a small tensor.

N rows, C features, H x W positions, S splits, V bytes of the input.
"""

import argparse
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

# C, H, W, and how many of the network's layers have that shape.
NETWORKS = {
    "resnet50": (
        (64, 112, 112, 1),
        (64, 56, 56, 6),
        (256, 56, 56, 4),
        (128, 56, 56, 1),
        (128, 28, 28, 7),
        (512, 28, 28, 5),
        (256, 28, 28, 1),
        (256, 14, 14, 11),
        (1024, 14, 14, 7),
        (512, 14, 14, 1),
        (512, 7, 7, 5),
        (2048, 7, 7, 4),
    ),
    "efficientnet_b0": (
        (32, 112, 112, 2),
        (16, 112, 112, 1),
        (96, 112, 112, 1),
        (96, 56, 56, 1),
        (24, 56, 56, 2),
        (144, 56, 56, 3),
        (144, 28, 28, 1),
        (40, 28, 28, 2),
        (240, 28, 28, 3),
        (240, 14, 14, 1),
        (80, 14, 14, 3),
        (480, 14, 14, 6),
        (112, 14, 14, 3),
        (672, 14, 14, 5),
        (672, 7, 7, 1),
        (192, 7, 7, 4),
        (1152, 7, 7, 8),
        (320, 7, 7, 1),
        (1280, 7, 7, 1),
    ),
    # Where the time is Python's.
    "small": ((16, 8, 8, 1),),
}
SMALL_ROWS = 32
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# Times V: x read for statistics, x read and y written; then dy and x read, dy and x read and dx
# written. No kernel that leaves x in memory between the two passes moves less.
FLOOR = {"forward": 3, "both": 8}
DIRECTIONS = {"forward": "forward", "both": "forward + backward"}


@dataclass(frozen=True)
class Setting:
    """What the shapes of a network are measured under, as one table."""

    network: str
    dtype: str
    layout: str
    splits: int
    direction: str

    def __str__(self) -> str:
        splits = f"{self.splits} split{'s' * (self.splits > 1)}"
        return f"{self.network}, {self.dtype} {self.layout}, {splits}, {DIRECTIONS[self.direction]}"


@dataclass(frozen=True)
class Case:
    """One shape under one setting; `layers` of the network have it."""

    setting: Setting
    shape: tuple[int, int, int, int]
    layers: int

    @property
    def tensor_bytes(self) -> int:
        """V."""
        return torch.Size(self.shape).numel() * getattr(torch, self.setting.dtype).itemsize

    @property
    def floor_bytes(self) -> int:
        """What has to move to and from memory."""
        return FLOOR[self.setting.direction] * self.tensor_bytes

    def tensor(self, device: torch.device) -> Tensor:
        """Return random values in the case's shape, type and layout."""
        values = torch.randn(self.shape, device=device).to(getattr(torch, self.setting.dtype))
        return values.contiguous(memory_format=LAYOUTS[self.setting.layout])


def cases(options: argparse.Namespace) -> dict[Setting, list[Case]]:
    """Return the cases that the command line asks for, by setting."""
    named = [name for name in options.shapes if name in NETWORKS]
    listed = tuple(
        (*(int(size) for size in shape.split("x")), 1)
        for shape in options.shapes
        if shape not in NETWORKS
    )
    networks = {name: NETWORKS[name] for name in named} | ({"listed": listed} if listed else {})
    found = {}
    for network, dtype, layout, splits, direction in itertools.product(
        networks, options.dtype, options.layout, options.splits, options.direction
    ):
        setting = Setting(network, dtype, layout, splits, direction)
        rows = SMALL_ROWS - SMALL_ROWS % splits if network == "small" else options.batch_size
        found[setting] = [
            Case(setting, (rows, features, height, width), layers)
            for features, height, width, layers in networks[network]
        ]
    return found

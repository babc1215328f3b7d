"""What is compared, by name: our layer, its kernels, and what one would use instead.

All map [N, C, H, W] with equal contiguous splits to the same shape, in training, with an affine map
for each split.
"""

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sync_splitbn import SyncSplitBatchNorm, sync_split_batch_norm

Build = Callable[[int, int], nn.Module]
_IMPLS = ("aten", "cpu", "triton")


@dataclass(frozen=True)
class Implementation:
    """One of those compared; `build` makes the layer from features and splits."""

    name: str
    label: str
    build: Build
    compiled: bool = False


def available(
    device: torch.device, names: list[str]
) -> tuple[list[Implementation], dict[str, str]]:
    """Return those that can run on a device, and why the others of `names` cannot."""
    missing = {}
    for impl in _IMPLS:
        try:
            layer = Operation(2, 1, impl=impl, sync=False).to(device)
            layer(torch.ones(1, 2, 2, 2, device=device)).sum().backward()
        except Exception as error:  # no such module, no Triton, no GPU, no driver
            missing[impl] = reason(error)
    if device.type == "cpu":
        missing["sync-bn"] = "nn.SyncBatchNorm refuses CPU tensors where there are several ranks"
    able = [each for each in _all() if each.name in names and each.name not in missing]
    return able, {name: why for name, why in missing.items() if name in names}


def reason(error: Exception) -> str:
    """Return an exception as one line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class PerSplit(nn.Module):
    """What one writes without a split layer: cut the batch, normalize each part, concatenate."""

    def __init__(self, norms: list[nn.Module]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norms)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize each of the equal chunks by its own layer."""
        chunks = input.chunk(len(self.norms))
        return torch.cat([norm(chunk) for norm, chunk in zip(self.norms, chunks, strict=True)])


class Operation(nn.Module):
    """Our operation by named kernels: no module around it, no running statistics."""

    def __init__(self, features: int, splits: int, *, impl: str, sync: bool = True) -> None:
        super().__init__()
        self.splits, self.impl, self.sync = splits, impl, sync
        self.weight = nn.Parameter(torch.ones(splits, features))
        self.bias = nn.Parameter(torch.zeros(splits, features))

    def forward(self, input: Tensor) -> Tensor:
        """Normalize the equal chunks."""
        return sync_split_batch_norm(
            input, self.splits, self.weight, self.bias, sync=self.sync, impl=self.impl
        )[0]


class MeansOverRanks(nn.BatchNorm2d):
    """Batch norm by the mean over ranks of the mean and of the mean of squares, in autograd.

    detectron2's way: it asks for as many rows on every rank, and keeps the biased variance.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize by the statistics of all ranks."""
        x = input.float()
        means = torch.cat([x.mean((0, 2, 3)), (x * x).mean((0, 2, 3))])
        if dist.is_initialized() and dist.get_world_size() > 1:
            means = _SumOverRanks.apply(means) / dist.get_world_size()
        mean, mean_of_squares = means.chunk(2)
        var = mean_of_squares - mean * mean
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        shape = (1, -1, 1, 1)
        return (x * scale.view(shape) + shift.view(shape)).to(input.dtype)


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks, whose gradient is the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, means: Tensor) -> Tensor:
        total = means.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _SumOverRanks.forward(ctx, grad)


def _per_split(norm: Callable[[int], nn.Module]) -> Build:
    return lambda features, splits: PerSplit([norm(features) for _ in range(splits)])


def _ours(features: int, splits: int) -> nn.Module:
    return SyncSplitBatchNorm(features, num_splits=splits)


def _plain(features: int, splits: int) -> nn.Module:
    return nn.BatchNorm2d(features)


def _timm() -> tuple[Build, str]:
    """Return timm's layer, or the same computation where timm is not installed, and its label."""
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        label = "split + batch_norm + cat (timm's computation; not installed), not synchronized"
        return _per_split(nn.BatchNorm2d), label
    # Its file alone: timm as a whole imports torchvision, which may not load beside this torch.
    path = Path(spec.submodule_search_locations[0]) / "layers" / "split_batchnorm.py"
    file: Any = importlib.util.spec_from_file_location("_timm_split_batchnorm", path)
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    return (
        lambda features, splits: module.SplitBatchNorm2d(features, num_splits=splits),
        f"timm {importlib.metadata.version('timm')} SplitBatchNorm2d, not synchronized",
    )


def _all() -> list[Implementation]:
    timm, timm_label = _timm()
    named = 'sync_split_batch_norm(impl="{}"), without running statistics'
    means = "for each split an all_reduce of mean and mean of squares, as detectron2"
    return [
        Implementation("ours", "SyncSplitBatchNorm", _ours),
        *(
            Implementation(impl, named.format(impl), functools.partial(Operation, impl=impl))
            for impl in _IMPLS
        ),
        Implementation("compiled", "torch.compile(SyncSplitBatchNorm)", _ours, compiled=True),
        Implementation("timm", timm_label, timm),
        Implementation("sync-bn", "nn.SyncBatchNorm for each split", _per_split(nn.SyncBatchNorm)),
        Implementation("all-reduce", means, _per_split(MeansOverRanks)),
        Implementation("plain", "nn.BatchNorm2d, neither split nor synchronized", _plain),
    ]


NAMES = ("ours", *_IMPLS, "compiled", "timm", "sync-bn", "all-reduce", "plain")

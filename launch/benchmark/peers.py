"""What a user would pick instead of our layer, and what a comparison with one rank takes.

C features, S splits. All map [N, C, H, W] with equal contiguous splits to the same shape, in
training mode, with an affine map per split.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sync_splitbn import SyncSplitBatchNorm, sync_split_batch_norm


class PerSplit(nn.Module):
    """What one writes without a split layer: cut the batch, normalize each part, put it together.

    Args:
        norms: the layer of each split.
    """

    def __init__(self, norms: list[nn.Module]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norms)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize each of the equal chunks by its own layer."""
        chunks = input.chunk(len(self.norms))
        return torch.cat([norm(chunk) for norm, chunk in zip(self.norms, chunks, strict=True)])


class Operation(nn.Module):
    """Our operation by named kernels: no module around it, no running statistics.

    Args:
        features: C.
        splits: S.
        impl: who computes.
        sync: False leaves other ranks alone.
    """

    def __init__(self, features: int, splits: int, *, impl: str, sync: bool = True) -> None:
        super().__init__()
        self.splits, self.impl, self.sync = splits, impl, sync
        self.weight = nn.Parameter(torch.ones(splits, features))
        self.bias = nn.Parameter(torch.zeros(splits, features))

    def forward(self, input: Tensor) -> Tensor:
        """Normalize the equal chunks."""
        output, _ = sync_split_batch_norm(
            input, self.splits, self.weight, self.bias, sync=self.sync, impl=self.impl
        )
        return output


class MeansOverRanks(nn.BatchNorm2d):
    """Batch norm by the mean over ranks of the mean and of the mean of squares, in autograd.

    detectron2's way: it asks for as many rows on every rank, and keeps the biased variance.

    Args:
        features: C.
        alone: post the collectives in a group of one rank too.
    """

    def __init__(self, features: int, *, alone: bool = False) -> None:
        super().__init__(features)
        self.alone = alone

    def forward(self, input: Tensor) -> Tensor:
        """Normalize by the statistics of all ranks."""
        x = input.float()
        means = torch.cat([x.mean((0, 2, 3)), (x * x).mean((0, 2, 3))])
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if ranks > 1 or self.alone:
            means = _SumOverRanks.apply(means) / ranks
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
        means = means.clone()
        dist.all_reduce(means)
        return means

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class OursAlone(nn.Module):
    """Our layer, which sends nothing in a group of one, with both its messages posted beside it."""

    def __init__(self, features: int, splits: int) -> None:
        super().__init__()
        self.layer = SyncSplitBatchNorm(features, num_splits=splits)
        moments = torch.zeros(splits * (2 * features + 1), dtype=torch.float64)
        self.register_buffer("moments", moments, persistent=False)
        self.register_buffer("sums", torch.zeros(2 * splits * features), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize, and send as many bytes as the layer does over several ranks."""
        output: Tensor = self.layer(input)
        dist.all_reduce(self.moments)
        if output.requires_grad:
            output.register_hook(lambda grad: dist.all_reduce(self.sums))
        return output


class SyncBatchNormAlone(nn.SyncBatchNorm):
    """The layer, which is a plain batch norm in a group of one, made to take its own path."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize by the statistics of the group of one, gathered and masked as ever."""
        self.num_batches_tracked.add_(1)
        return torch.nn.modules._functions.SyncBatchNorm.apply(
            input,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.eps,
            self.momentum,
            dist.group.WORLD,
            1,
        )

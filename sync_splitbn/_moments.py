"""What describes a batch and its splits: rows, sums, the statistics that follow, the affine map.

S splits, C features, N rows. `Splits` says which rows belong to which split: a tuple holds the
sizes of S contiguous sub-batches, a tensor holds the split of each row, [N].
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Splits: TypeAlias = tuple[int, ...] | Tensor


@dataclass(frozen=True)
class Affine:
    """What follows the statistics: weight and bias [S, C] or None, and the eps of the variance."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which elements of `dtype` are summed: float32, or wider."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares of each split and channel, in float64.

    Sums over ranks are sums of moments, which is why these travel and means do not.

    Attributes:
        count: elements per channel, shape [S].
        total: sum of the values, shape [S, C].
        squares: sum of the squared values, shape [S, C].
    """

    count: Tensor
    total: Tensor
    squares: Tensor

    def pack(self) -> Tensor:
        """Return the moments as the one tensor that travels, [S, 2C + 1]."""
        return torch.cat([self.total, self.squares, self.count.unsqueeze(1)], dim=1)

    @classmethod
    def unpack(cls, packed: Tensor) -> "Moments":
        """Return the moments that `pack` packed."""
        features = packed.shape[1] // 2
        total, squares, count = packed.split([features, features, 1], dim=1)
        return cls(count.squeeze(1), total, squares)

    @property
    def mean(self) -> Tensor:
        """Mean, [S, C], input units; 0 where a split is empty."""
        return self.total / self._divisor(0)

    @property
    def var(self) -> Tensor:
        """Biased variance, [S, C], input units squared; 0 where a split is empty."""
        return (self.squares / self._divisor(0) - self.mean.square()).clamp(min=0)

    @property
    def unbiased_var(self) -> Tensor:
        """Unbiased variance, [S, C], input units squared; 0 where a split has one element."""
        return self.var * self.count.unsqueeze(1) / self._divisor(1)

    def invstd(self, eps: float) -> Tensor:
        """Inverse standard deviation, [S, C], from the biased variance."""
        return (self.var + eps).rsqrt()

    def _divisor(self, correction: int) -> Tensor:
        """Return the count less `correction`, at least 1, as a column."""
        return (self.count - correction).clamp(min=1).unsqueeze(1)

"""What describes a batch and its splits: rows, sums, the statistics that follow, the affine map.

S splits, C features, N rows. `Splits` says which rows belong to which split: a tuple holds the
sizes of S contiguous sub-batches, a tensor holds the split of each row, [N].
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Splits: TypeAlias = tuple[int, ...] | Tensor


def check_sizes(sizes: Sequence[int], num_splits: int) -> tuple[int, ...]:
    """Return the sizes of `num_splits` contiguous sub-batches as a tuple, or raise."""
    try:
        # An int of a traced graph is left alone: operator.index would make a constant of it.
        sizes = tuple(size if isinstance(size, int) else operator.index(size) for size in sizes)
    except TypeError:
        raise TypeError(f"sizes must be a sequence of ints, got {sizes!r}") from None
    if len(sizes) != num_splits or min(sizes) < 0:
        raise ValueError(
            f"sizes must hold num_splits={num_splits} numbers of rows, each 0 or more, got {sizes}"
        )
    return sizes


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which elements of `dtype` are summed: float32, or wider."""
    return torch.promote_types(dtype, torch.float32)


class Moments:
    """Count, sum and sum of squares of each split and channel, and the statistics they make.

    Sums over ranks are sums of moments, which is why these travel and means do not. What follows
    from them is computed when it is asked for, once.

    Attributes:
        packed: the tensor that travels, float64, shape [S, 2C + 1]: each row is
            [sum of values | sum of squared values | count].
        count: elements per channel of each split, float64, shape [S].
    """

    def __init__(self, packed: Tensor) -> None:
        self.packed = packed
        self.count = packed[:, -1]
        self._per_element: tuple[Tensor, ...] | None = None
        self._var: Tensor | None = None

    @classmethod
    def given(cls, mean: Tensor, var: Tensor) -> "Moments":
        """Return moments that have these statistics, [S, C], as those of one element."""
        packed = torch.cat([mean, var + mean.square(), mean.new_ones(len(mean), 1)], dim=1)
        moments = cls(packed)
        # Not read back from the square, where a large mean would cost it digits.
        moments._var = var
        return moments

    @property
    def mean(self) -> Tensor:
        """Mean, [S, C], input units; 0 where a split is empty."""
        return self._means()[0]

    @property
    def var(self) -> Tensor:
        """Biased variance, [S, C], input units squared; 0 where a split is empty."""
        if self._var is None:
            mean, square = self._means()
            self._var = torch.addcmul(square, mean, mean, value=-1).clamp(min=0)
        return self._var

    @property
    def unbiased_var(self) -> Tensor:
        """Unbiased variance, [S, C], input units squared; 0 where a split has one element."""
        return self.var * (self.count / (self.count - 1).clamp(min=1)).unsqueeze(1)

    def invstd(self, eps: float) -> Tensor:
        """Inverse standard deviation, [S, C], from the biased variance."""
        return (self.var + eps).rsqrt()

    def _means(self) -> tuple[Tensor, ...]:
        """Means of the values and of their squares, [S, C] each."""
        if self._per_element is None:
            means = self.packed[:, :-1] / self.count.clamp(min=1).unsqueeze(1)
            self._per_element = means.chunk(2, dim=1)
        return self._per_element


@dataclass(frozen=True)
class Affine:
    """What follows the statistics: weight and bias [S, C] or None, the variance's eps, a ReLU."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    relu: bool = False

    def scale(self, moments: Moments) -> Tensor:
        """Return the factor of each split and channel, [S, C], float64."""
        invstd = moments.invstd(self.eps)
        return invstd if self.weight is None else invstd * self.weight

    def through_relu(self, dy: Tensor, output: Callable[[], Tensor]) -> Tensor:
        """Return dy, 0 where a ReLU that follows cut the output off, which is asked for then."""
        return torch.where(output() > 0, dy, 0) if self.relu else dy

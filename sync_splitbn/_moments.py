"""What describes a batch and its splits: rows, sums, the statistics that follow, the affine map.

S splits, C features, N rows. `Splits` says which rows belong to which split: a tuple holds the
sizes of S contiguous sub-batches, a tensor holds the split of each row, [N].
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

# Fake tensors are of another class.
PLAIN = (Tensor, nn.Parameter)

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


def is_eager_cpu(tensor: Tensor) -> bool:
    """Return whether the values of `tensor` are on this host, and may be looked at."""
    return tensor.is_cpu and type(tensor) in PLAIN and not torch.compiler.is_compiling()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which elements of `dtype` are summed: float32, or wider."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Moments:
    """Count, sum and sum of squares of each split and channel, and the statistics they make.

    Sums over ranks are sums of moments, which is why these travel and means do not. What follows
    from them is computed when it is asked for, once.

    Attributes:
        packed: the tensor that travels, float64, shape [S, 2C + 1]: each row is
            [sum of values | sum of squared values | count].
    """

    def __init__(
        self, packed: Tensor, mean: Tensor | None = None, var: Tensor | None = None
    ) -> None:
        self.packed = packed
        self._mean, self._var = mean, var
        self._invstd: dict[float, Tensor] = {}

    @classmethod
    def given(cls, mean: Tensor, var: Tensor) -> "Moments":
        """Return moments that have these statistics, [S, C], as those of one element."""
        packed = torch.cat([mean, var + mean.square(), mean.new_ones(len(mean), 1)], dim=1)
        # Not read back from the square, where a large mean would cost it digits.
        return cls(packed, mean, var)

    @property
    def count(self) -> Tensor:
        """Elements per channel, [S], float64."""
        return self.packed[:, -1]

    @property
    def mean(self) -> Tensor:
        """Mean, [S, C], input units; 0 where a split is empty."""
        if self._mean is None:
            self._compute()
        return cast(Tensor, self._mean)

    @property
    def var(self) -> Tensor:
        """Biased variance, [S, C], input units squared; 0 where a split is empty."""
        if self._var is None:
            self._compute()
        return cast(Tensor, self._var)

    @property
    def unbiased_var(self) -> Tensor:
        """Unbiased variance, [S, C], input units squared; 0 where a split has one element."""
        count = self.packed[:, -1:]
        return self.var * (count / (count - 1).clamp(min=1))

    def invstd(self, eps: float) -> Tensor:
        """Inverse standard deviation, [S, C], from the biased variance."""
        if eps not in self._invstd:
            self._invstd[eps] = (self.var + eps).rsqrt()
        return self._invstd[eps]

    def _compute(self) -> None:
        values, squares = self.packed[:, :-1].chunk(2, dim=1)
        count = self.packed[:, -1:].clamp(min=1)
        self._mean = values / count
        self._var = torch.addcmul(squares / count, self._mean, self._mean, value=-1).clamp(min=0)


@dataclass(frozen=True)
class Affine:
    """What follows the statistics: weights and biases of S splits, the variance's eps, a ReLU.

    Weights, and biases alike, are a tensor [S, C], or S tensors [C], or None.
    """

    weights: Tensor | Sequence[Tensor] | None
    biases: Tensor | Sequence[Tensor] | None
    eps: float
    relu: bool = False

    @property
    def weight(self) -> Tensor | None:
        """Weight as one tensor, [S, C]."""
        return _stacked(self.weights)

    @property
    def bias(self) -> Tensor | None:
        """Bias as one tensor, [S, C]."""
        return _stacked(self.biases)

    def scale(self, moments: Moments) -> Tensor:
        """Return the factor of each split and channel, [S, C], float64."""
        invstd, weight = moments.invstd(self.eps), self.weight
        return invstd if weight is None else invstd * weight

    def through_relu(self, dy: Tensor, output: Callable[[], Tensor]) -> Tensor:
        """Return dy, 0 where a ReLU that follows cut the output off, which is asked for then."""
        return torch.where(output() > 0, dy, 0) if self.relu else dy


def _stacked(values: Tensor | Sequence[Tensor] | None) -> Tensor | None:
    """Return the values of all splits as one tensor, [S, C]."""
    return values if values is None or isinstance(values, Tensor) else torch.stack(list(values))

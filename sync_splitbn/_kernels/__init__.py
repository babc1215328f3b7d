"""The four local computations of split batch normalization, and the choice of who does them.

Each kernel module defines these functions, with N rows, S splits, C features and `splits` as in
`_moments`. `x`, `dy` and the results like them are [N, C, ...] in any floating type and layout.
`packed` is float64 [S, 2C + 1], each row [sum of x | sum of x^2 | count]: local from `moments`,
of all ranks elsewhere. `affine` holds weight and bias, [S, C] in the accumulation type (float32,
or float64 for float64 input) or None, and eps:

    moments(x, splits, num_splits) -> local packed
    normalize(x, splits, packed, affine) -> y, like x
    grad_sums(dy, x, splits, packed) -> local [sum of dy | sum of dy * (x - mean)], [S, 2C]
    grad_input(dy, x, splits, packed, affine, sums) -> dx, like x

`grad_sums` returns the accumulation type; `grad_input` takes its sum over all ranks.
"""

from typing import Protocol, cast

from torch import Tensor

from .._moments import Affine, Splits
from . import aten


class Kernels(Protocol):
    """What a kernel module offers."""

    def moments(self, x: Tensor, splits: Splits, num_splits: int) -> Tensor: ...

    def normalize(self, x: Tensor, splits: Splits, packed: Tensor, affine: Affine) -> Tensor: ...

    def grad_sums(self, dy: Tensor, x: Tensor, splits: Splits, packed: Tensor) -> Tensor: ...

    def grad_input(
        self, dy: Tensor, x: Tensor, splits: Splits, packed: Tensor, affine: Affine, sums: Tensor
    ) -> Tensor: ...


def choose(impl: str | None) -> Kernels:
    """Return the kernels named `impl`, or those that suit for None; a name never falls back."""
    if impl in (None, "aten"):
        return cast(Kernels, aten)
    raise ValueError(f"impl must be one of 'aten' or None, got {impl!r}")

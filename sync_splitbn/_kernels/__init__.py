"""The four local computations of split batch normalization, and the choice of who does them.

Each kernel module defines these functions, with N rows, S splits, C features and `splits` as in
`_moments`. `x`, `dy` and the results like them are [N, C, ...] in any floating type and layout.
`moments` returns the local packed moments, float64 [S, 2C + 1], each row [sum of x | sum of x^2 |
count]; the others take the `Moments` of all ranks. `affine` holds eps, the splits' weights and
biases in the accumulation type (float32, or float64 for float64 input) or None, and whether a
ReLU follows, through which the backward kernels then take dy:

    moments(x, splits, num_splits) -> local packed moments
    normalize(x, splits, moments, affine) -> y, like x
    grad_sums(dy, x, splits, moments, affine) -> local [sum of dy | sum of dy * (x - mean)], [S, 2C]
    grad_input(dy, x, splits, moments, affine, sums) -> dx, like x

`grad_sums` returns the accumulation type; `grad_input` takes its sum over all ranks.
"""

import importlib.util
from typing import Protocol, cast

from torch import Tensor

from .._moments import Affine, Moments, Splits, is_eager_cpu
from . import aten, cpu


class Kernels(Protocol):
    """What a kernel module offers."""

    def moments(self, x: Tensor, splits: Splits, num_splits: int) -> Tensor: ...

    def normalize(self, x: Tensor, splits: Splits, moments: Moments, affine: Affine) -> Tensor: ...

    def grad_sums(
        self, dy: Tensor, x: Tensor, splits: Splits, moments: Moments, affine: Affine
    ) -> Tensor: ...

    def grad_input(
        self, dy: Tensor, x: Tensor, splits: Splits, moments: Moments, affine: Affine, sums: Tensor
    ) -> Tensor: ...


class AloneKernels(Protocol):
    """What a kernel module offers besides for a rank without others: each way in one call."""

    def alone(
        self, x: Tensor, splits: Splits, num_splits: int, affine: Affine
    ) -> tuple[Tensor, Moments]: ...

    def grad_alone(
        self, dy: Tensor, x: Tensor, splits: Splits, moments: Moments, affine: Affine
    ) -> tuple[Tensor, Tensor]: ...


def choose(impl: str | None, x: Tensor) -> Kernels:
    """Return the kernels named `impl`, or those that suit for None; a name never falls back."""
    if impl is None:
        served = cpu.missing is None and x.dtype in cpu.LETTERS
        impl = "cpu" if served and is_eager_cpu(x) else "aten"
    if impl == "aten":
        return cast(Kernels, aten)
    if impl == "cpu":
        if not is_eager_cpu(x):
            raise RuntimeError(
                "impl='cpu' must be given a CPU tensor with values, outside torch.compile, got one "
                f"on {x.device}; pass impl=None to choose"
            )
        if cpu.missing is not None:
            raise RuntimeError(
                f"impl='cpu' must have its compiled loops, got {cpu.missing}; install the package "
                "where a C++ compiler is, or pass impl=None to choose"
            )
        if x.dtype not in cpu.LETTERS:
            raise TypeError(
                f"impl='cpu' must be given one of {[*cpu.LETTERS]}, got {x.dtype}; "
                "pass impl=None to choose"
            )
        return cast(Kernels, cpu)
    if impl == "triton":
        # Imported where it is asked for: Triton is not everywhere.
        if importlib.util.find_spec("triton") is None:
            raise RuntimeError(
                "impl='triton' must have Triton to import, got none; install triton, or pass "
                "impl=None to choose by device"
            )
        return cast(Kernels, importlib.import_module(f"{__name__}.triton"))
    raise ValueError(f"impl must be one of 'aten', 'cpu', 'triton' or None, got {impl!r}")


def of_alone(kernels: Kernels, group: object) -> AloneKernels | None:
    """Return what these kernels offer for a rank without a group, if it is more than the four."""
    return cpu if group is None and kernels is cpu else None

"""The local computations of split batch normalization, and the choice of who does them.

N rows, S splits, C features. Each kernel module (`aten`, `cpu`, `triton`) offers the functions of
`Kernels`, and `unavailable(x)`, which returns why it cannot compute with tensors like x, or None.
The compiled ones are called through `operators`, which have the same signatures. Arguments and
results are:

    x, dy, y, dx      [N, C, ...], any floating type and layout; y and dx are like x
    index, sizes      the split of each row, int64 [N], or the sizes of S contiguous sub-batches;
                      the other one is None
    sums of x         float64 [S, 2C + 1], each row [sum of x | sum of x^2 | count]; they add over
                      ranks
    moments           float64 [S, 2C + 1], each row [mean | biased variance | count]; mean and
                      variance are 0 where a split is empty; see `_moments.Moments`
    weights, biases   S tensors [C] in the accumulation type (float32, or float64 for float64
                      input), or none
    sums of dy        accumulation type [S, 2C], each row [sum of dy | sum of dy * xhat] with
                      xhat = (x - mean) / sqrt(var + eps); they add over ranks, and the local ones
                      are the gradients of the local biases and weights
"""

import functools
import importlib
import importlib.util
import warnings
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from .._moments import Index, Sizes, Tensors, accumulation_dtype
from . import aten, cpu, operators

operators.register(cpu, "CPU")


class Kernels(Protocol):
    """What a kernel module offers."""

    def sums(self, x: Tensor, index: Index, sizes: Sizes, num_splits: int) -> Tensor:
        """Return the local sums of x."""

    def moments(self, sums: Tensor) -> Tensor:
        """Return the moments that follow from sums of x."""

    def normalize(
        self,
        x: Tensor,
        index: Index,
        sizes: Sizes,
        moments: Tensor,
        weights: Tensors,
        biases: Tensors,
        eps: float,
    ) -> Tensor:
        """Return y = xhat * weight + bias."""

    def grad_sums(
        self, dy: Tensor, x: Tensor, index: Index, sizes: Sizes, moments: Tensor, eps: float
    ) -> Tensor:
        """Return the local sums of dy."""

    def grad_input(
        self,
        dy: Tensor,
        x: Tensor,
        index: Index,
        sizes: Sizes,
        moments: Tensor,
        weights: Tensors,
        eps: float,
        sums: Tensor,
    ) -> Tensor:
        """Return dx from the sums of dy over all ranks."""

    def normalize_batch(
        self,
        x: Tensor,
        index: Index,
        sizes: Sizes,
        num_splits: int,
        weights: Tensors,
        biases: Tensors,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """Return y by the moments of the local x alone, and these: for a rank without others.

        The variance of float64 is taken about the mean, so that no digit is lost.
        """

    def grad_batch(
        self,
        dy: Tensor,
        x: Tensor,
        index: Index,
        sizes: Sizes,
        moments: Tensor,
        weights: Tensors,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """Return dx by the local sums of dy alone, and these: for a rank without others."""

    def update_running_stats(
        self,
        means: Tensors,
        vars: Tensors,
        counters: Tensors,
        momentum: float | None,
        moments: Tensor,
    ) -> None:
        """Update in place S means and variances [C] and S counters [], or none.

        An empty split updates nothing, a single element no variance. A momentum of None averages
        all counted updates evenly.
        """


def choose(impl: str | None, x: Tensor) -> Kernels:
    """Return the kernels named `impl`, or the default for `x`; a named one never falls back."""
    if impl is None:
        # In compiled graphs on a GPU, inductor fuses ATen's operators with their neighbours; on a
        # CPU the loops were measured to be faster than its code, also with a ReLU behind.
        traced = torch.compiler.is_compiling() and not x.is_cpu
        served = not traced and default_unavailable(x) is None
        return cast(Kernels, operators if served else aten)
    if impl not in ("aten", "cpu", "triton"):
        raise ValueError(f"impl must be one of 'aten', 'cpu', 'triton' or None, got {impl!r}")
    reason = unavailable(impl, x)
    if reason is not None:
        raise RuntimeError(
            f"impl={impl!r} must be able to serve the input, got {reason}; pass impl=None to choose"
        )
    if impl == "aten":
        return cast(Kernels, aten)
    # On a CPU, Triton's kernels run in its interpreter, which no operator leads to.
    return cast(Kernels, _triton() if impl == "triton" and x.is_cpu else operators)


def unavailable(impl: str, x: Tensor) -> str | None:
    """Return why the kernels named `impl` cannot compute with tensors like `x`, or None."""
    if impl == "aten":
        return aten.unavailable(x)
    if impl == "cpu":
        return cpu.unavailable(x)
    if importlib.util.find_spec("triton") is None:
        return "no Triton to import"
    reason: str | None = _triton().unavailable(x)
    return reason


def default_unavailable(x: Tensor) -> str | None:
    """Return why ATen serves tensors like `x` by default, or None where compiled kernels do."""
    if x.is_cpu:
        return cpu.unavailable(x)
    if not x.is_cuda:
        return f"no compiled kernels for device type {x.device.type}"
    key = x.device, x.dtype
    if key not in _triton_verdicts:
        if isinstance(x, FakeTensor) or torch.cuda.is_current_stream_capturing():
            return "Triton has not been compared with ATen, and cannot be in a trace or capture"
        _triton_verdicts[key] = _compare_triton(x)
    return _triton_verdicts[key]


# Why Triton does not serve a device and type by default, or None where it does.
_triton_verdicts: dict[tuple[torch.device, torch.dtype], str | None] = {}


@functools.cache
def _triton() -> Any:
    """Import the Triton kernels, and have them compute the operators on CUDA."""
    triton = importlib.import_module(f"{__name__}.triton")
    operators.register(triton, "CUDA")
    return triton


def _compare_triton(x: Tensor) -> str | None:
    """Return why Triton must not serve tensors like `x`, after a small batch beside ATen's."""
    reason = unavailable("triton", x)
    if reason is None:
        try:
            if not _agree(_triton(), x.device, x.dtype):
                reason = "its results differ from ATen's on this device"
        # A compiler can fail in any way; the library must not.
        except Exception as error:
            reason = f"it cannot compile: {type(error).__name__}: {error}"
    elif importlib.util.find_spec("triton") is None:
        return reason
    if reason is not None:
        warnings.warn(
            f"Triton kernels must not serve {x.dtype} on {x.device}: {reason}; ATen serves instead",
            stacklevel=2,
        )
    return reason


@torch.no_grad()
def _agree(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether kernels give what ATen's give, on a small batch in both layouts."""
    wave = torch.arange(2 * 6 * 17 * 5 * 5, device=device, dtype=torch.float64).sin()
    both = (wave.view(2, 6, 17, 5, 5) + 1).to(dtype)
    weights = list(wave[:51].view(3, 17).to(accumulation_dtype(dtype)))
    index, sizes = torch.arange(6, device=device) % 3, (1, 3, 2)
    agreed = True
    for rows, layout in (
        ((None, sizes), torch.contiguous_format),
        ((index, None), torch.channels_last),
    ):
        x, dy = (t.contiguous(memory_format=layout) for t in both)
        found = _run_all(kernels, dy, x, rows, weights)
        expected = _run_all(cast(Kernels, aten), dy, x, rows, weights)
        for a, b in zip(found, expected, strict=True):
            tolerance = 1e-4 if a.dtype.itemsize >= 4 else 4 * torch.finfo(a.dtype).eps
            agreed &= torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance)
    return agreed


def _run_all(
    kernels: Kernels, dy: Tensor, x: Tensor, rows: tuple[Index, Sizes], weights: Tensors
) -> list[Tensor]:
    """Return what each kernel makes of one batch."""
    eps = 1e-5
    sums = kernels.sums(x, *rows, 3)
    moments = kernels.moments(sums)
    grad_sums = kernels.grad_sums(dy, x, *rows, moments, eps)
    means, variances = sums.new_zeros(3, x.shape[1]), sums.new_ones(3, x.shape[1])
    counters = torch.zeros(3, dtype=torch.int64, device=x.device)
    kernels.update_running_stats([*means], [*variances], [*counters], 0.1, moments)
    y = kernels.normalize(x, *rows, moments, weights, weights, eps)
    dx = kernels.grad_input(dy, x, *rows, moments, weights, eps, grad_sums)
    of_batch = kernels.normalize_batch(x, *rows, 3, weights, weights, eps)
    gradients = kernels.grad_batch(dy, x, *rows, moments, weights, eps)
    updated = means, variances, counters
    return [sums, moments, y, grad_sums, dx, *updated, *of_batch, *gradients]

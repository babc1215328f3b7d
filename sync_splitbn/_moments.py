"""The moments of a batch and its splits, and what all kernels need: checks, types, memory.

S splits, C features, N rows.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Index: TypeAlias = Tensor | None
Sizes: TypeAlias = Sequence[int] | None
Tensors: TypeAlias = Sequence[Tensor]

# Of elements, for which there are compiled kernels.
COMPILED_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class Moments:
    """Count, mean and variance of each split and channel, over all ranks of a group.

    Attributes:
        values: float64, shape [S, 2C + 1], each row [mean | biased variance | count]; mean and
            variance are 0 where a split is empty.
    """

    values: Tensor

    @property
    def count(self) -> Tensor:
        """Elements per channel, [S]."""
        return self.values[:, -1]

    @property
    def mean(self) -> Tensor:
        """Mean, [S, C], input units."""
        return self.values[:, : self.values.shape[1] // 2]

    @property
    def var(self) -> Tensor:
        """Biased variance, [S, C], input units squared."""
        return self.values[:, self.values.shape[1] // 2 : -1]

    @property
    def unbiased_var(self) -> Tensor:
        """Unbiased variance, [S, C], input units squared; 0 where a split has one element."""
        count = self.values[:, -1:]
        return self.var * (count / (count - 1).clamp(min=1))

    def without_nonfinite(self, dtype: torch.dtype) -> "Moments":
        """Return moments in which a split is empty if its statistics are not finite in `dtype`."""
        stored = torch.cat([self.mean, self.unbiased_var], dim=1).to(dtype)
        is_finite = stored.isfinite().all(dim=1, keepdim=True)
        return Moments(torch.where(is_finite, self.values, 0))

    def invstd(self, eps: float) -> Tensor:
        """Inverse standard deviation, [S, C], from the biased variance."""
        return (self.var + eps).rsqrt()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which elements of `dtype` are summed: float32, or wider."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_sums(x: Tensor, num_splits: int) -> Tensor:
    """Return memory for the sums of x, or for moments, [S, 2C + 1]."""
    return x.new_empty((num_splits, 2 * x.shape[1] + 1), dtype=torch.float64)


def empty_grad_sums(x: Tensor, num_splits: int) -> Tensor:
    """Return memory for the sums of dy, [S, 2C]."""
    return x.new_empty((num_splits, 2 * x.shape[1]), dtype=accumulation_dtype(x.dtype))


def as_dense(x: Tensor) -> Tensor:
    """Return `x` in one of the two layouts of the kernels: contiguous, or with innermost channels.

    Whatever is in neither is copied to a contiguous tensor.
    """
    if x.is_contiguous():
        return x
    # The same question twice, but this one is answered in a tenth of the time.
    innermost = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if innermost or x.movedim(1, -1).is_contiguous() else x.contiguous()


def increment_versions(tensors: Tensors) -> None:
    """Tell whoever saved one of the tensors for a backward pass that it was changed."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def check_num_splits(num_splits: int) -> None:
    """Raise unless there is a split."""
    if isinstance(num_splits, bool) or not isinstance(num_splits, int):
        raise TypeError(f"num_splits must be an int, got {type(num_splits).__name__}")
    if num_splits < 1:
        raise ValueError(f"num_splits must be at least 1, got {num_splits}")


def check_eps(eps: float) -> None:
    """Raise unless `eps` is a positive number."""
    if not isinstance(eps, (int, float, torch.SymFloat)):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps must be positive and finite, got {eps}")


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


def check_tensors(
    name: str, tensors: Tensors, shape: tuple[int, ...], device: torch.device
) -> None:
    """Raise unless the tensor of each split has this shape and is on this device."""
    for tensor in tensors:
        if tensor.shape != shape:
            raise RuntimeError(
                f"{name} must have shape {list(shape)} for each split, got {list(tensor.shape)}"
            )
        if tensor.device != device:
            raise RuntimeError(
                f"{name} must be on the device of input, {device}, got {tensor.device}; "
                "move the layer there with .to(), or with .to_empty() from meta"
            )


def has_storage(tensor: Tensor) -> bool:
    """Return whether the memory of a tensor on the CPU reaches to its last element."""
    # Other kinds of tensor may have no storage to ask.
    is_ordinary = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    if not (is_ordinary and tensor.is_cpu and tensor.numel()) or torch.compiler.is_compiling():
        return True
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + last + 1) * tensor.itemsize
    return tensor.untyped_storage().nbytes() >= end


def check_storage(name: str, tensor: Tensor) -> None:
    """Raise if the memory of a tensor on the CPU was freed, which not all operators notice."""
    if not has_storage(tensor):
        raise RuntimeError(
            f"{name} must have storage for its {tensor.numel()} elements, "
            f"got {tensor.untyped_storage().nbytes()} bytes; it was freed or resized"
        )

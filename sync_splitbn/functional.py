"""The operation as a function: checks what it is given, finds the group, computes."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _kernels
from ._autograd import SyncSplitBatchNormFunction
from ._collectives import check_group, resolve_group, warn_of_uneven_batches
from ._moments import (
    Moments,
    accumulation_dtype,
    check_eps,
    check_num_splits,
    check_sizes,
    check_storage,
)


def sync_split_batch_norm(
    input: Tensor,
    num_splits: int,
    weight: Tensor | Sequence[Tensor] | None = None,
    bias: Tensor | Sequence[Tensor] | None = None,
    *,
    sizes: Sequence[int] | None = None,
    index: Tensor | None = None,
    eps: float = 1e-5,
    sync: bool = True,
    process_group: Any = None,
    impl: str | None = None,
) -> tuple[Tensor, Moments]:
    """Normalize each split of a batch by its own statistics over all ranks.

    Rows belong to `num_splits` equal contiguous chunks, unless `sizes` or `index` says otherwise.
    Ranks may hold different numbers of rows of each split, or none.

    Args:
        input: local batch, shape [N, C, ...], floating type, any memory format.
        num_splits: number of splits S, at least 1.
        weight: scale, shape [S, C], or [C] for all splits, or S tensors of shape [C]; None
            scales by 1.
        bias: offset, shaped like `weight`; None adds 0.
        sizes: rows of each of S contiguous sub-batches, zeros allowed, summing to N.
        index: split of each row, integers in [0, S), shape [N], on the device of `input`.
        eps: added to the variance, input units squared, positive.
        sync: False takes the statistics of this rank alone.
        process_group: the ranks to sum over; None is the default group.
        impl: who computes: `"aten"` on any device with float64, `"cpu"` on a CPU if the package was
            installed where a C++ compiler is, `"triton"` on CUDA (tested in Triton's interpreter,
            not yet run on a GPU), or None to choose by device. `python -m sync_splitbn` tells which
            of them serve here.

    Returns:
        The output, with the shape, type and memory format of `input`, and the moments over all
        ranks, float64, not differentiable: `mean`, `var` and `unbiased_var` are [S, C], `count`
        is [S].

    Raises:
        TypeError: `input` or a parameter is no floating tensor, or `index` not integer.
        RuntimeError: the named `impl` cannot compute here, or accelerate's `Accelerator` takes each
            rank for the only one, and averages no gradients.
        ValueError: a shape, a size, a device, an index, `eps` or `impl` does not fit. It is raised
            on the rank whose data are wrong, before the collective, so the others wait for their
            time-out: let the same call be right on every rank.

    Warns:
        UserWarning: accelerate's loader with `even_batches=False` ends earlier on some ranks; see
            `sync_splitbn.data.until_all_done`.

    Numerics:
        Local sums in float32 or wider, about a value near the data, totals in float64. A split with
        one element normalizes with variance 0. Parameter gradients are sums over the local rows, as
        DDP expects. Second derivatives are exact. float64 input keeps its digits far from 0 on one
        rank; over ranks its sums about 0 lose them as the square of mean / std: the output is off
        by less than 1e-6 at 1e4. Subtract a constant from such input first.

    Communication:
        Forward one all_reduce of S * (2 * C + 1) float64 numbers, backward one all_reduce of
        2 * S * C in the accumulation type; none in a group of one. Backward reduces only if
        `input` requires a gradient, which must hold on all ranks or none. With `create_graph=True`
        it sends one more.

    Source:
        Ioffe and Szegedy 2015, arXiv 1502.03167; splits after arXiv 1904.03515 and 1911.09665.

    Example:
        >>> input = torch.randn(6, 4, 8, 8)
        >>> output, moments = sync_split_batch_norm(input, num_splits=2, sizes=(2, 4))
        >>> torch.allclose(moments.mean[1], input[2:].double().mean((0, 2, 3)))
        True
    """
    check_input(input)
    check_group(process_group)
    check_eps(eps)
    rows = check_splits(input, num_splits, sizes, index)
    group = resolve_group(process_group) if sync else None
    if group is not None:
        warn_of_uneven_batches()
    none = [None] * num_splits
    output, values = SyncSplitBatchNormFunction.apply(  # type: ignore[no-untyped-call]
        input,
        *rows,
        num_splits,
        eps,
        group,
        impl,
        *(_checked("weight", weight, input, num_splits) or none),
        *(_checked("bias", bias, input, num_splits) or none),
    )
    return output, Moments(values)


def update_running_stats(
    means: Sequence[Tensor],
    vars: Sequence[Tensor],
    counters: Sequence[Tensor],
    momentum: float | None,
    moments: Moments,
) -> None:
    """Move the running statistics of S splits by the moments of a batch, in place.

    A split without elements leaves its own as they are, one with a single element its variance.
    No counters count nothing. A `momentum` of None averages all counted updates evenly.
    """
    kernels = _kernels.choose(None, means[0])
    kernels.update_running_stats(means, vars, counters, momentum, moments.values)


def normalize_rows(
    input: Tensor,
    means: Sequence[Tensor],
    vars: Sequence[Tensor],
    weight: Tensor | Sequence[Tensor] | None,
    bias: Tensor | Sequence[Tensor] | None,
    *,
    sizes: Sequence[int] | None,
    index: Tensor | None,
    eps: float,
) -> Tensor:
    """Normalize each row by given statistics of its split, S of [C]: evaluation with mixed rows."""
    num_splits = len(means)
    rows = check_splits(input, num_splits, sizes, index)
    weights = _checked("weight", weight, input, num_splits)
    biases = _checked("bias", bias, input, num_splits)
    state = {"running_mean": means, "running_var": vars, "weight": weights, "bias": biases}
    for name, tensors in state.items():
        for each in tensors:
            check_storage(name, each)
    mean, var = torch.stack(list(means)), torch.stack(list(vars))
    moments = torch.cat([mean, var, mean.new_ones(num_splits, 1)], dim=1).double()
    # ATen's, because autograd differentiates them.
    return _kernels.choose("aten", input).normalize(input, *rows, moments, weights, biases, eps)


def check_input(input: Tensor, num_features: int | None = None) -> None:
    """Raise unless `input` is a floating batch [N, C, ...] with `num_features` channels."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor, got {type(input).__name__}")
    if input.layout != torch.strided:
        raise TypeError(
            f"input must be a dense tensor, got layout {input.layout}; convert it by to_dense()"
        )
    if input.dim() < 2:
        raise ValueError(
            f"input must have at least 2 dimensions [N, C, ...], got shape {tuple(input.shape)}"
        )
    if not input.is_floating_point():
        raise TypeError(f"input must be floating point, got {input.dtype}")
    if num_features is not None and input.shape[1] != num_features:
        raise ValueError(
            f"input.shape[1] must equal num_features={num_features}, got {input.shape[1]}"
        )


def check_splits(
    input: Tensor, num_splits: int, sizes: Sequence[int] | None, index: Tensor | None
) -> tuple[Tensor | None, tuple[int, ...] | None]:
    """Return the index or the sizes of the splits as kernels take them, or raise."""
    rows = input.shape[0]
    check_num_splits(num_splits)
    if sizes is not None and index is not None:
        raise ValueError("at most one of sizes and index must be given, got both")
    if index is not None:
        return _check_index(input, num_splits, index), None
    if sizes is None:
        if rows % num_splits:
            raise ValueError(
                f"input.shape[0] must be divisible by num_splits={num_splits}, got {rows}; "
                "drop the last short batch, or give the sizes by assign_splits"
            )
        return None, (rows // num_splits,) * num_splits
    sizes = check_sizes(sizes, num_splits)
    if sum(sizes) != rows:
        raise ValueError(
            f"sizes must sum to input.shape[0]={rows}, got {sizes} with sum {sum(sizes)}"
        )
    return None, sizes


def _check_index(input: Tensor, num_splits: int, index: Tensor) -> Tensor:
    """Return `index` as a tensor of int64, or raise."""
    if not isinstance(index, Tensor):
        raise TypeError(
            f"index must be an integer tensor of shape [N], got {type(index).__name__}; "
            "wrap it in torch.tensor"
        )
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"index must hold integers, got {index.dtype}")
    if index.shape != (input.shape[0],):
        raise ValueError(
            f"index must have shape [input.shape[0]]={[input.shape[0]]}, got {list(index.shape)}"
        )
    if index.device != input.device:
        raise ValueError(
            f"index must be on the device of input, {input.device}, got {index.device}; "
            "move it there with the batch"
        )
    check_storage("index", index)
    index = index.long()
    message = f"index must hold splits from 0 to num_splits - 1 = {num_splits - 1}"
    inside = ((index >= 0) & (index < num_splits)).all()
    if index.device.type == "cpu" and not torch.compiler.is_compiling():
        if not inside:
            raise ValueError(f"{message}, got {index.min().item()} to {index.max().item()}")
    else:
        # Checked on the device, so that the host does not wait for it.
        torch._assert_async(inside, f"{message}, got others")
    return index


def _checked(
    name: str, value: Tensor | Sequence[Tensor] | None, input: Tensor, num_splits: int
) -> list[Tensor]:
    """Return a parameter as S tensors [C] in the accumulation type, none for None, or raise."""
    if value is None:
        return []
    shape, dtype, device = input.shape[1:2], accumulation_dtype(input.dtype), input.device
    values: Sequence[Any]
    if isinstance(value, Tensor):
        # Cast once for all splits: the sum of their gradients is rounded once.
        wide = value.to(dtype) if value.is_floating_point() else value
        values = wide.unbind() if wide.dim() == 2 else [wide] * num_splits
    else:
        # A list is not asked whether it is iterable, which takes long to answer.
        is_many = type(value) is list or isinstance(value, Iterable)
        values = list(value) if is_many else [value]
    for each in values:
        if not isinstance(each, Tensor):
            raise TypeError(
                f"{name} must be tensors of shape [C], got {type(each).__name__}; "
                "wrap numbers in torch.tensor"
            )
    shapes = [each.shape for each in values]
    if shapes != [shape] * num_splits:
        got = value.shape if isinstance(value, Tensor) else [list(each) for each in shapes]
        raise ValueError(
            f"{name} must have shape [C]={list(shape)} or [S, C]={[num_splits, *shape]}, or be S "
            f"tensors [C], got {list(got)}"
        )
    for each in values:
        if not each.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {each.dtype}")
        if each.device != device:
            raise ValueError(
                f"{name} must be on the device of input, {device}, got {each.device}; "
                "move the layer there with .to(), or from meta with .to_empty()"
            )
    return [each if each.dtype == dtype else each.to(dtype) for each in values]

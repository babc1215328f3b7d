"""Small batches without other ranks: ATen's batch norm of each split, the fewest calls there are.

S splits, C features. With no sum over ranks between its halves, one call of ATen's does what takes
many otherwise, and autograd knows the way back. Large batches are faster in the kernels, which
read less often.
"""

import operator
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ._moments import accumulation_dtype, is_plain_cpu

# Elements up to which it is faster: at all, and in float32 with channels apart, and innermost.
SMALL, SMALL_APART, SMALL_INNERMOST = 2**21, 2**16, 2**18
# Rows of a split that a thread may add up where channels are innermost, one to the next in
# float32: a variance of so many is off by some 1e-6.
ROWS = 2**10
# Up to this |mean| / std, float32 holds the mean well enough for what is computed by it.
NEAR = 8.0
# Channels of which Python knows the farthest before an operator does.
FEW = 64
FORMATS = {2: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}

# Weight, bias, running mean and running variance of a split, [C] each.
State: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def suits(input: Tensor, sizes: Sequence[int]) -> bool:
    """Return whether `normalize` is right and the fastest for a batch with such splits."""
    elements = input.numel()
    if not 0 < elements <= SMALL or not is_plain_cpu(input):
        return False
    rows, features, *_ = input.shape
    length = elements // (rows * features)
    if sum(sizes) != rows or min(sizes) * length < 2:
        return False
    half = input.itemsize < 4
    if input.dim() > 2 and input.is_contiguous():
        return half or elements <= SMALL_APART
    last = input.dim() in FORMATS and input.is_contiguous(memory_format=FORMATS[input.dim()])
    few = max(sizes) * length <= ROWS * torch.get_num_threads()
    return last and few and (half or elements <= SMALL_INNERMOST)


def takes(states: Sequence[State], dtype: torch.dtype) -> bool:
    """Return whether `normalize` takes such parameters and statistics for a type of input."""
    dtype = accumulation_dtype(dtype)
    for state in states:
        for each in state:
            if each is not None and each.dtype != dtype:
                return False
    return True


def normalize(
    input: Tensor, sizes: Sequence[int], states: Sequence[State], momentum: float, eps: float
) -> Tensor | None:
    """Normalize S sub-batches, and move their running statistics.

    Return None, with nothing moved, where float32 would lose digits.
    """
    running = [each for state in states for each in state[2:] if each is not None]
    before = torch.cat(running) if running else None
    parts = zip(torch.split_with_sizes(input, sizes), states, strict=True)
    found = [torch.native_batch_norm(part, *state, True, momentum, eps) for part, state in parts]
    outputs, means, invstds = zip(*found, strict=True)
    if input.dtype == torch.float32 and _is_far(means, invstds):
        if before is not None:
            torch._foreach_copy_(running, before.view(len(running), -1).unbind())
        return None
    return torch.cat(outputs)


def _is_far(means: Sequence[Tensor], invstds: Sequence[Tensor]) -> bool:
    """Return whether |mean| / std of any split's channel, [C] each, is beyond what is near."""
    if len(means[0]) > FEW:
        ratios = torch.cat(list(means)).mul_(torch.cat(list(invstds)))
        return bool(torch.linalg.vector_norm(ratios, torch.inf) > NEAR)
    for mean, invstd in zip(means, invstds, strict=True):
        if max(map(abs, map(operator.mul, mean.tolist(), invstd.tolist()))) > NEAR:
            return True
    return False

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

from ._moments import CLOSE, accumulation_dtype, is_eager_cpu

# Elements up to which it is faster, and rows of a split whose channels are innermost: of these,
# ATen adds one to the next in float32, and so many keep the digits of a variance.
SMALL, SMALL_ROWS = 2**17, 2**10
# Channels of which Python knows the farthest before an operator does.
FEW = 64
FORMATS = {2: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}

# Weight, bias, running mean and running variance of a split, [C] each.
State: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def is_small(input: Tensor) -> bool:
    """Return whether `normalize` is the fastest for a batch, if it suits."""
    return 0 < input.numel() <= SMALL and is_eager_cpu(input)


def suits(input: Tensor, sizes: Sequence[int], states: Sequence[State]) -> bool:
    """Return whether `normalize` takes a small batch."""
    length, dtype = input.shape[2:].numel(), accumulation_dtype(input.dtype)
    if sum(sizes) != input.shape[0] or min(sizes) * length < 2:
        return False
    if any(each is not None and each.dtype != dtype for state in states for each in state):
        return False
    if input.is_contiguous() and input.dim() > 2:
        return True
    last = input.dim() in FORMATS and input.is_contiguous(memory_format=FORMATS[input.dim()])
    return last and max(sizes) * length <= SMALL_ROWS


def normalize(
    input: Tensor, sizes: Sequence[int], states: Sequence[State], momentum: float, eps: float
) -> Tensor | None:
    """Normalize S sub-batches and move their running statistics; return None, with nothing done,
    where digits would be lost.
    """
    running = [each for state in states for each in state[2:] if each is not None]
    before = torch.cat(running) if running else None
    parts = zip(torch.split_with_sizes(input, sizes), states, strict=True)
    found = [
        torch.native_batch_norm(part, *state, True, momentum, eps) for part, state in parts
    ]
    if input.dtype == torch.float32 and any(_is_far(mean, invstd) for _, mean, invstd in found):
        if before is not None:
            torch._foreach_copy_(running, before.view(len(running), -1).unbind())
        return None
    return torch.cat([output for output, _, _ in found])


def _is_far(mean: Tensor, invstd: Tensor) -> bool:
    """Return whether |mean| / std of any channel, [C], is beyond what is close."""
    if len(mean) > FEW:
        return torch.linalg.vector_norm(mean.detach() * invstd.detach(), torch.inf).item() > CLOSE
    return max(map(abs, map(operator.mul, mean.tolist(), invstd.tolist()))) > CLOSE

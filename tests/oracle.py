"""What split batch normalization over many ranks is, said in the plainest way, in float64.

All ranks' rows stand in one batch. Each split is taken out and normalized by itself; autograd
does the rest. Nothing here comes from the package under test.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class State:
    """Parameters per rank and split [W, S, C], and statistics per split [S, C] and [S]."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    @classmethod
    def initial(cls, ranks: int, splits: int, features: int) -> "State":
        generator = torch.Generator().manual_seed(3)
        weight = torch.rand(splits, features, generator=generator, dtype=torch.float64) + 0.5
        bias = torch.randn(splits, features, generator=generator, dtype=torch.float64)
        return cls(
            weight=weight.expand(ranks, -1, -1).clone().requires_grad_(),
            bias=bias.expand(ranks, -1, -1).clone().requires_grad_(),
            running_mean=torch.zeros(splits, features, dtype=torch.float64),
            running_var=torch.ones(splits, features, dtype=torch.float64),
            num_batches_tracked=torch.zeros(splits, dtype=torch.int64),
        )


def forward(
    x: Tensor,
    split: Tensor,
    rank: Tensor,
    state: State,
    *,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
) -> Tensor:
    """Normalize rows `x` [N, C, ...] of given `split` [N] and `rank` [N]; update the statistics."""
    x = x.double()
    normal = torch.zeros_like(x)
    for s in range(len(state.num_batches_tracked)):
        mine = split == s
        part = x[mine]
        count = part.numel() // part.shape[1]
        if count == 0:
            continue
        state.num_batches_tracked[s] += 1
        step = momentum if momentum is not None else 1 / state.num_batches_tracked[s].item()
        dims = (0, *range(2, part.dim()))
        with torch.no_grad():
            state.running_mean[s].lerp_(part.mean(dims), step)
            if count > 1:
                state.running_var[s].lerp_(part.var(dims, unbiased=True), step)
        if count > 1:
            normal[mine] = F.batch_norm(part, None, None, training=True, eps=eps)
        else:
            normal[mine] = part - part
    shape = (len(x), x.shape[1], *(1 for _ in x.shape[2:]))
    weight, bias = state.weight[rank, split], state.bias[rank, split]
    return normal * weight.view(shape) + bias.view(shape)

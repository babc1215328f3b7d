"""The layer: parameters and statistics of every split, their state dict, training and evaluation.

S splits, C features. Split 0 is the layer's own weight, bias and buffers, split i those of
`aux_bn[i - 1]`: timm's names.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ._collectives import check_group
from ._moments import Moments, accumulation_dtype
from .assignment import Assignable
from .functional import check_input, check_num_splits, normalize_rows, sync_split_batch_norm

PARAMETERS = ("weight", "bias")
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class Auxiliary(nn.Module):
    """Parameters and buffers of one further split; the layer reads them, nothing calls this.

    It is no `_BatchNorm`, so that tools which shard, freeze or convert batch norms see the layer
    as one unit and leave its parts alone.
    """

    def __init__(self, state: dict[str, Tensor | None]) -> None:
        super().__init__()
        for name, value in state.items():
            if name in PARAMETERS:
                self.register_parameter(name, value)  # type: ignore[arg-type]
            else:
                self.register_buffer(name, value)

    @classmethod
    def copy_of(cls, norm: nn.Module, share_affine: bool, memo: dict[int, Any]) -> "Auxiliary":
        """Copy the state of a batch norm; one memo a split keeps tensors that are shared so."""
        names = BUFFERS if share_affine else PARAMETERS + BUFFERS
        return cls({name: copy.deepcopy(getattr(norm, name), memo) for name in names})


class SyncSplitBatchNorm(_BatchNorm, Assignable):
    r"""Batch normalization with statistics per split of the batch, each over all ranks.

    A batch that mixes distributions (clean and augmented, labelled and unlabelled, clean and
    adversarial, several domains) is normalized part by part:

    .. math::
        y = \frac{x - \mu_s}{\sqrt{\sigma_s^2 + \epsilon}} \, \gamma_s + \beta_s

    where the mean and the biased variance of split :math:`s` cover the rows of that split on
    every rank. W ranks give what one process gives with all their rows. In training, rows belong
    to `num_splits` equal contiguous chunks, in evaluation to split 0; `assign_splits` says
    otherwise. With `num_splits=1` it is a synchronized batch norm.

    Args:
        num_features: channels C of the input [N, C, ...].
        eps: added to the variance, input units squared.
        momentum: fraction by which an update moves the running statistics; None averages all
            updates evenly.
        affine: learn a scale and an offset per channel and split.
        track_running_stats: keep running statistics for evaluation; without them, evaluation
            takes the statistics of this rank's batch.
        num_splits: number of splits S, at least 1.
        process_group: the ranks to sum over, as `sync_group` makes them; None is all ranks.
        device: device of parameters and buffers.
        dtype: floating type of parameters and buffers. Any mixes with any input type.
        share_affine: one scale and offset for all splits, which then differ in statistics alone.
        bias: learn an offset (if `affine`).

    Shape:
        - Input: [N, C] to [N, C, D, H, W]; N may be 0, on some ranks or all.
        - Output: the same, in the type and memory format of the input.

    Raises:
        TypeError: `input` is not floating, or `process_group` is no group.
        ValueError: a shape, size or index does not fit; see `sync_split_batch_norm`.

    Numerics:
        As `sync_split_batch_norm`. A split that is empty on all ranks keeps its running
        statistics and its counter, one with a single element its `running_var`. The running
        variance is the unbiased one of the whole split. All ranks hold the same bits.

    Communication:
        In training, forward one all_reduce of S * (2 * C + 1) float64 numbers, backward one of
        2 * S * C in float32 (float64 for float64 input), without waiting on the host. None in
        evaluation or in a group of one. Every rank must run the same layers in the same order.

    State dict:
        timm's `SplitBatchNorm2d`: split 0 is `weight`, `bias`, `running_mean`, `running_var` and
        `num_batches_tracked`, split i is `aux_bn.{i-1}.*`. A plain batch norm's state, with no
        `aux_bn` key, loads into every split.

    Source:
        Ioffe and Szegedy 2015, arXiv 1502.03167; splits after arXiv 1904.03515 and 1911.09665.

    Example:
        >>> layer = SyncSplitBatchNorm(64, num_splits=3)
        >>> layer(torch.randn(12, 64, 8, 8)).shape
        torch.Size([12, 64, 8, 8])
    """

    # The class to return to, remembered by the converter.
    _plain_class: type[_BatchNorm] | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        num_splits: int = 2,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        share_affine: bool = False,
        bias: bool = True,
    ) -> None:
        check_num_splits(num_splits)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        if not bias:
            self.register_parameter("bias", None)
        auxiliaries = [Auxiliary.copy_of(self, share_affine, {}) for _ in range(num_splits - 1)]
        self._split(auxiliaries, process_group, share_affine)

    def _split(self, auxiliaries: list[Auxiliary], process_group: Any, share_affine: bool) -> None:
        """Become a split layer, from a plain one whose state is that of split 0."""
        check_group(process_group)
        self.num_splits = 1 + len(auxiliaries)
        self.process_group = process_group
        self.share_affine = share_affine
        self.aux_bn = nn.ModuleList(auxiliaries).train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input`: by batch statistics in training, by running ones in evaluation."""
        check_input(input, self.num_features)
        if self.training or self.running_mean is None:
            return self._normalize_batch(input)
        return self._evaluate(input)

    def _normalize_batch(self, input: Tensor) -> Tensor:
        """Normalize by batch statistics, and let the running ones follow."""
        assignment = self._assignment
        sizes, index = None, None
        if assignment is not None:
            sizes, index = assignment.rows(input.shape[0], self.num_splits)
        elif not self.training:
            sizes = (input.shape[0],) + (0,) * (self.num_splits - 1)
        output, moments = sync_split_batch_norm(
            input,
            self.num_splits,
            self._all("weight"),
            self._all("bias"),
            sizes=sizes,
            index=index,
            eps=self.eps,
            sync=self.training,
            process_group=self.process_group,
        )
        # Activation checkpointing runs forward again inside backward: count a batch once.
        again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if self.training and self.track_running_stats and not (self._stats_frozen or again):
            self._update_running_stats(moments)
        return output

    @torch.no_grad()
    def _update_running_stats(self, moments: Moments) -> None:
        """Move every split's running statistics, on the device, by the moments of all ranks."""
        means, variances, counts = moments.mean, moments.unbiased_var, moments.count
        for i, stats in enumerate(self._splits()):
            stats.num_batches_tracked.add_(counts[i] > 0)
            step: Any = self.momentum
            if step is None:
                step = 1 / stats.num_batches_tracked.clamp(min=1).double()
            for running, batch, least in (
                (stats.running_mean, means[i], 1),
                (stats.running_var, variances[i], 2),
            ):
                moved = running + (batch - running) * step
                running.copy_(torch.where(counts[i] >= least, moved, running))

    def _evaluate(self, input: Tensor) -> Tensor:
        """Normalize by running statistics, those of split 0 unless assigned otherwise."""
        assignment = self._assignment
        if assignment is None or assignment.only is not None:
            return self._evaluate_one(input, 0 if assignment is None else assignment.only or 0)
        sizes, index = assignment.rows(input.shape[0], self.num_splits)
        mean = torch.stack([stats.running_mean for stats in self._splits()])
        var = torch.stack([stats.running_var for stats in self._splits()])
        return normalize_rows(
            input,
            mean,
            var,
            self._all("weight"),
            self._all("bias"),
            sizes=sizes,
            index=index,
            eps=self.eps,
        )

    def _evaluate_one(self, input: Tensor, split: int) -> Tensor:
        """Normalize all rows by the running statistics of one split, as plain batch norm does."""
        dtype = accumulation_dtype(input.dtype)
        stats: Any = self if split == 0 else self.aux_bn[split - 1]
        weight, bias = (self._one(name, split) for name in PARAMETERS)
        return F.batch_norm(
            input,
            stats.running_mean.to(dtype),
            stats.running_var.to(dtype),
            weight if weight is None else weight.to(dtype),
            bias if bias is None else bias.to(dtype),
            eps=self.eps,
        )

    def _splits(self) -> Iterator[Any]:
        """Yield what holds the statistics of each split."""
        yield self
        yield from self.aux_bn

    def _all(self, name: str) -> Tensor | None:
        """Return a parameter of all splits, [S, C], or [C] where they share it."""
        own: Tensor | None = getattr(self, name)
        if own is None or self.share_affine:
            return own
        return torch.stack([getattr(stats, name) for stats in self._splits()])

    def _one(self, name: str, split: int) -> Tensor | None:
        """Return a parameter of one split, [C]."""
        own: Tensor | None = getattr(self, name)
        if own is None or self.share_affine:
            return own
        if torch.is_grad_enabled():
            # Taken from all, so that the others get zero gradients and DDP misses none.
            every = self._all(name)
            return None if every is None else every[split]
        return own if split == 0 else getattr(self.aux_bn[split - 1], name)

    def reset_running_stats(self) -> None:
        """Set the running statistics of every split to mean 0, variance 1 and no batch seen."""
        super().reset_running_stats()
        # The base class calls this before there are auxiliaries.
        for stats in getattr(self, "aux_bn", ()) if self.track_running_stats else ():
            stats.running_mean.zero_()
            stats.running_var.fill_(1)
            stats.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Reset the running statistics, and every split's scale to 1 and offset to 0."""
        super().reset_parameters()
        for stats in getattr(self, "aux_bn", ()):
            for name, value in (("weight", 1.0), ("bias", 0.0)):
                parameter = getattr(stats, name, None)
                if parameter is not None:
                    nn.init.constant_(parameter, value)

    def extra_repr(self) -> str:
        """Describe the layer in a model's printout."""
        plain = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{plain}, num_splits={self.num_splits}, share_affine={self.share_affine}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load split 0, and have a plain batch norm's state fill the auxiliaries too."""
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if any(key.startswith(f"{prefix}aux_bn.") for key in state_dict):
            return
        for i, stats in enumerate(self.aux_bn):
            for name in stats.state_dict():
                if prefix + name in state_dict:
                    # A clone: load_state_dict(assign=True) makes parameters of what it is given.
                    state_dict[f"{prefix}aux_bn.{i}.{name}"] = state_dict[prefix + name].clone()

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what belongs to this process or this moment: group and contexts."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state["process_group"] = None
        for name in ("_assignment", "_stats_frozen"):
            state.pop(name, None)
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> "SyncSplitBatchNorm":
        """Copy all but the process group, which the copy shares."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        twin.process_group = self.process_group
        return twin

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            "SyncSplitBatchNorm must run in one process per device, got nn.DataParallel, "
            "which cuts the batch across its splits; use DistributedDataParallel"
        )


class SyncSplitBatchNormAct(SyncSplitBatchNorm):
    """The layer with a dropout and an activation behind it, as timm's `BatchNormAct2d` has."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input`, then drop and activate."""
        output: Tensor = self.act(self.drop(super().forward(input)))
        return output

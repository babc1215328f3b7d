"""The layer: training by batch statistics, evaluation by running ones, for every split.

S splits, C features, N rows.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ._moments import Tensors, accumulation_dtype, check_storage
from ._state import BUFFERS, PARAMETERS, SplitState
from .assignment import Assignable
from .functional import (
    check_input,
    normalize_rows,
    sync_split_batch_norm,
    update_running_stats,
)


class SyncSplitBatchNorm(SplitState, Assignable):
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
        eps: added to the variance, input units squared, positive.
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

    Attributes:
        skip_nonfinite_stats: set it to True, for float16 say, and a split with a NaN or an infinity
            in its statistics leaves its running ones and its counter as they are. A gradient scaler
            skips the step of such a batch; without this the running statistics keep the NaN.
            False by default; it waits for nothing on the host.

    Shape:
        - Input: [N, C] to [N, C, D, H, W]; N may be 0, on some ranks or all.
        - Output: the same, in the type and memory format of the input.

    Raises:
        TypeError: `input` is not floating, or `process_group` is no group.
        ValueError: a shape, size or index does not fit.
        RuntimeError, and a warning: as of `sync_split_batch_norm`.

    Numerics:
        As `sync_split_batch_norm`. A split that is empty on all ranks keeps its running
        statistics and its counter, one with a single element its `running_var`. The running
        variance is the unbiased one of the whole split. All ranks of a process group hold the same
        bits. A NaN in one rank's rows of a split is a NaN in that split on all ranks, and in no
        other split.

    Communication:
        In training, forward one all_reduce of S * (2 * C + 1) float64 numbers, backward one of
        2 * S * C in float32 (float64 for float64 input), without waiting on the host; a backward
        pass with `create_graph=True` sends one more. None in evaluation or in a group of one. Every
        rank must run the same layers in the same order.

    State dict:
        timm's `SplitBatchNorm2d`: split 0 is `weight`, `bias`, `running_mean`, `running_var` and
        `num_batches_tracked`, split i is `aux_bn.{i-1}.*`. A plain batch norm's state, with no
        `aux_bn` key, loads into every split. One of another number of splits is refused, with
        `strict=False` too.

    Source:
        Ioffe and Szegedy 2015, arXiv 1502.03167; splits after arXiv 1904.03515 and 1911.09665.

    Example:
        >>> layer = SyncSplitBatchNorm(64, num_splits=3)
        >>> layer(torch.randn(12, 64, 8, 8)).shape
        torch.Size([12, 64, 8, 8])
    """

    skip_nonfinite_stats: bool = False
    # The class to return to, remembered by the converter.
    _plain_class: type[_BatchNorm] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input`: by batch statistics in training, by running ones in evaluation."""
        check_input(input, self.num_features)
        if self._plain_class is not None:
            # What the layer before conversion refused: 3-D input of a BatchNorm2d, say.
            self._plain_class._check_input_dim(self, input)
        if torch.compiler.is_compiling():
            self._is_compiled = True
        if self.training or self.running_mean is None:
            return self._normalize_batch(input)
        return self._evaluate(input)

    def _normalize_batch(self, input: Tensor) -> Tensor:
        """Normalize by batch statistics, and update the running ones."""
        assignment = self._assignment
        sizes, index = None, None
        if assignment is not None:
            sizes, index = assignment.rows(input, self.num_splits)
        elif not self.training:
            sizes = (input.shape[0],) + (0,) * (self.num_splits - 1)
        # Activation checkpointing runs forward again inside backward: count a batch once.
        is_recompute = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        is_tracking = self.training and self.track_running_stats and not self._stats_frozen
        running = self._running_stats() if is_tracking and not is_recompute else None
        weights, biases = self._parameters_by_split()
        output, moments = sync_split_batch_norm(
            input,
            self.num_splits,
            weights,
            biases,
            sizes=sizes,
            index=index,
            eps=self.eps,
            sync=self.training,
            process_group=self.process_group,
        )
        if running is not None:
            if self.skip_nonfinite_stats:
                moments = moments.without_nonfinite(running[0][0].dtype)
            update_running_stats(*running, self.momentum, moments)
        return output

    def _running_stats(self) -> tuple[Tensors, Tensors, Tensors] | None:
        """Return the running means, variances and counters of all splits, or None without them."""
        # As in plain batch norm, without counters there is no average to take.
        means, variances, counters = self._buffers_by_split(*BUFFERS)
        return (means, variances, counters) if means else None

    def _buffers_by_split(self, *names: str) -> list[list[Tensor]]:
        """Return the running means, variances and so on of all splits, or nothing without them."""
        buffers = self._by_split(*names)
        if buffers[0] and not buffers[1]:
            raise RuntimeError("running_var must be a tensor where running_mean is one, got None")
        return buffers

    def _evaluate(self, input: Tensor) -> Tensor:
        """Normalize by running statistics, those of split 0 unless assigned otherwise."""
        means, variances = self._buffers_by_split(*BUFFERS[:2])
        assignment = self._assignment
        if assignment is None:
            return self._evaluate_one(input, 0, means[0], variances[0])
        if assignment.only is not None:
            split = assignment.only
            return self._evaluate_one(input, split, means[split], variances[split])
        sizes, index = assignment.rows(input, self.num_splits)
        weights, biases = self._parameters_by_split()
        return normalize_rows(
            input, means, variances, weights, biases, sizes=sizes, index=index, eps=self.eps
        )

    def _evaluate_one(self, input: Tensor, split: int, mean: Tensor, var: Tensor) -> Tensor:
        """Normalize all rows by the running statistics of one split, as plain batch norm does."""
        dtype = accumulation_dtype(input.dtype)
        check_storage("running_mean", mean)
        check_storage("running_var", var)
        weight, bias = (self._parameter_of_split(name, split) for name in PARAMETERS)
        return F.batch_norm(
            input,
            mean.to(dtype),
            var.to(dtype),
            weight if weight is None else weight.to(dtype),
            bias if bias is None else bias.to(dtype),
            eps=self.eps,
        )

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

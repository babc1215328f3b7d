"""Split batch normalization, synchronized over all ranks with one all_reduce."""

from . import data
from ._collectives import sync_group
from .assignment import assign_splits, frozen_stats
from .convert import convert_sync_split_batchnorm, revert_sync_split_batchnorm
from .diagnostics import split_divergence
from .functional import sync_split_batch_norm
from .layer import SyncSplitBatchNorm
from .replicas import check_replicas

__all__ = [
    "SyncSplitBatchNorm",
    "assign_splits",
    "check_replicas",
    "convert_sync_split_batchnorm",
    "data",
    "frozen_stats",
    "revert_sync_split_batchnorm",
    "split_divergence",
    "sync_group",
    "sync_split_batch_norm",
]
__version__ = "0.1.0"

"""Conversion of a model's batch norms to `SyncSplitBatchNorm`, and back.

A layer stays the same object: its class changes, and auxiliaries are added or removed. This keeps
everything else: parameters and their identity, buffers, hooks, attributes, training mode, and
all references to the layer.
"""

import warnings
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ._collectives import check_group
from ._convertible import (
    check_convertible,
    check_parameters,
    describe,
    ends_in_act,
    loaded,
    timm_acts,
    timm_split,
)
from ._moments import check_num_splits
from ._state import BUFFERS, PARAMETERS, Auxiliary
from .layer import SyncSplitBatchNorm, SyncSplitBatchNormAct


def convert_sync_split_batchnorm(
    module: nn.Module,
    num_splits: int = 2,
    *,
    process_group: Any = None,
    share_affine: bool = False,
) -> nn.Module:
    """Convert every batch norm of a model into `SyncSplitBatchNorm`, in place.

    The order is: build the model, load pretrained weights, convert, make the optimizer, wrap
    (`accelerator.prepare`). Every split starts from the layer's present parameters and
    statistics. The parameters of split 0 stay the same objects: an optimizer made earlier still
    updates them, but does not have those of the other splits.

    Converted are `nn.BatchNorm1d`, `2d` and `3d`, `nn.SyncBatchNorm`, and timm's
    `BatchNormAct2d`, `SyncBatchNormAct` and `SplitBatchNorm2d`; also their subclasses, if these
    redefine no method of theirs (`__init__`, `extra_repr` and `_check_input_dim` aside). Methods
    that a subclass adds are lost. Not touched are all other layers: instance, group and layer
    norms, and frozen batch norms that are no `_BatchNorm`, such as torchvision's and timm's.

    Args:
        module: the model, or a batch norm itself.
        num_splits: number of splits S, at least 1.
        process_group: the ranks to synchronize, from `sync_group` or `dist.new_group`; None keeps
            the group of an `nn.SyncBatchNorm` or of a converted layer, and is all ranks otherwise.
        share_affine: all splits share one weight and one bias; only their statistics differ.

    Returns:
        `module`.

    Raises:
        TypeError: `module` is no module, or conversion would lose something of a batch norm in
            it: a method redefined by its class or on the instance, a parametrization, lazy
            parameters. The message has the path of the batch norm.
        ValueError: a batch norm has an `eps` that is not positive, or tensors whose storage is
            freed or whose shape is not [num_features]; or it is split already, but not as asked.
        RuntimeError: the model is already wrapped by DataParallel, DDP or FSDP, or prepared by
            accelerate. After any of these errors, no layer has been converted.

    Warns:
        UserWarning: `module` has no batch norm.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> model = convert_sync_split_batchnorm(model, num_splits=3)
        >>> sorted(name for name, _ in model.named_parameters() if "aux_bn.1" in name)
        ['1.aux_bn.1.bias', '1.aux_bn.1.weight']
    """
    check_num_splits(num_splits)
    check_group(process_group)
    norms = _batch_norms(module, converting=True)
    for path, norm in norms.items():
        check_convertible(path, norm, num_splits, share_affine)
    # One memo a split: parameters that layers share stay shared within each split.
    memos: list[dict[int, Any]] = [{} for _ in range(num_splits - 1)]
    # All are made before a layer is changed: copying may fail.
    auxiliaries = [_make_auxiliaries(norm, share_affine, memos) for norm in norms.values()]
    for norm, made in zip(norms.values(), auxiliaries, strict=True):
        _convert(norm, made, process_group, share_affine)
    if not norms:
        warnings.warn(
            f"module must contain a batch norm to be converted, got {type(module).__name__} "
            "without one; it is returned as it is",
            stacklevel=2,
        )
    return module


def revert_sync_split_batchnorm(module: nn.Module, split: int = 0) -> nn.Module:
    """Convert every `SyncSplitBatchNorm` back into a plain batch norm, with one split's state.

    The other splits are dropped, and the state dict has the keys of the plain model again, for
    inference, export and other libraries. To keep the split model, revert a `copy.deepcopy`.

    Args:
        module: a model converted by `convert_sync_split_batchnorm`; it is changed in place.
        split: the split to keep, 0 to S - 1.

    Returns:
        `module`. Each layer has the class that it had before conversion; one that was timm's
        `SplitBatchNorm2d` is `nn.BatchNorm2d`, or `BatchNormAct2d` if it has an activation.

    Raises:
        TypeError: `module` is no module, or a layer in it was not made by the converter, or is
            parametrized. After any of these errors, no layer has been reverted.
        ValueError: a layer has no such split.
        RuntimeError: the model is wrapped by DataParallel, DDP or FSDP.

    Warns:
        UserWarning: `module` has no `SyncSplitBatchNorm`.

    Example:
        >>> model = convert_sync_split_batchnorm(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8)))
        >>> revert_sync_split_batchnorm(model, split=1)[1]
        BatchNorm1d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """
    layers = {
        path: norm
        for path, norm in _batch_norms(module, converting=False).items()
        if isinstance(norm, SyncSplitBatchNorm)
    }
    if isinstance(split, bool) or not isinstance(split, int):
        raise TypeError(f"split must be an int, got {type(split).__name__}")
    for path, layer in layers.items():
        if not 0 <= split < layer.num_splits:
            raise ValueError(
                f"split must be from 0 to num_splits - 1 = {layer.num_splits - 1} in "
                f"{describe(path)}, got {split}"
            )
        if layer._plain_class is None:
            raise TypeError(
                f"{describe(path)} must have been converted from a plain batch norm, got a "
                "SyncSplitBatchNorm from its constructor; build with nn.BatchNorm and convert that"
            )
        check_parameters(path, layer)
        if split > 0 and not layer.share_affine:
            check_parameters(f"{path}.aux_bn.{split - 1}".lstrip("."), layer.aux_bn[split - 1])
    for layer in layers.values():
        _revert(layer, split)
    if not layers:
        warnings.warn(
            "module must contain a SyncSplitBatchNorm to be reverted, got "
            f"{type(module).__name__} without one; it is returned as it is",
            stacklevel=2,
        )
    return module


def _batch_norms(module: nn.Module, *, converting: bool) -> dict[str, _BatchNorm]:
    """Return the batch norms of a model by path, without those inside another batch norm."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    wrappers = (
        *loaded("torch.nn.parallel", "DistributedDataParallel", "DataParallel"),
        *loaded("torch.distributed.fsdp", "FullyShardedDataParallel", "FSDPModule"),
    )
    norms: dict[str, _BatchNorm] = {}
    inner: set[nn.Module] = set()
    for path, part in module.named_modules():
        # accelerate's mark stays on an unwrapped model, which may be reverted.
        prepared = converting and getattr(part, "_is_accelerate_prepared", False)
        if isinstance(part, wrappers) or prepared:
            raise RuntimeError(
                f"{describe(path)} must not be wrapped or prepared yet, got "
                f"{type(part).__name__}; convert, then make the optimizer, then wrap, "
                "and unwrap before reverting"
            )
        if isinstance(part, _BatchNorm) and part not in inner:
            norms[path] = part
            inner.update(part.modules())
    return norms


def _make_auxiliaries(
    norm: _BatchNorm, share_affine: bool, memos: list[dict[int, Any]]
) -> list[Auxiliary]:
    """Return the auxiliaries for a batch norm; timm's keep their tensors, others are copies."""
    if isinstance(norm, SyncSplitBatchNorm):
        return []
    if isinstance(norm, timm_split()):
        return [
            Auxiliary({name: getattr(aux, name) for name in PARAMETERS + BUFFERS})
            for aux in norm.aux_bn
        ]
    return [Auxiliary.copy_of(norm, share_affine, memo) for memo in memos]


def _convert(
    norm: _BatchNorm, auxiliaries: list[Auxiliary], process_group: Any, share_affine: bool
) -> None:
    """Make one batch norm our layer."""
    if process_group is None:
        process_group = getattr(norm, "process_group", None)
    if isinstance(norm, SyncSplitBatchNorm):
        norm.process_group = process_group
        return
    has_act = ends_in_act(norm) and hasattr(norm, "act")
    plain: type[_BatchNorm] = type(norm)
    if isinstance(norm, timm_split()):
        plain = timm_acts()[0] if has_act else nn.BatchNorm2d
    norm.__class__ = SyncSplitBatchNormAct if has_act else SyncSplitBatchNorm
    assert isinstance(norm, SyncSplitBatchNorm)
    norm._plain_class = plain
    norm._add_auxiliaries(auxiliaries, process_group, share_affine)


def _revert(layer: SyncSplitBatchNorm, split: int) -> None:
    """Make one of our layers the class that it was before conversion, with one split's state."""
    if split > 0:
        chosen = layer.aux_bn[split - 1]
        layer._parameters.update(chosen._parameters)
        layer._buffers.update(chosen._buffers)
    plain = layer._plain_class
    assert plain is not None
    del layer.aux_bn
    contexts = "_assignment", "_stats_frozen", "_is_compiled"
    for name in ("num_splits", "share_affine", "_plain_class", *contexts):
        vars(layer).pop(name, None)
    if not issubclass(plain, nn.SyncBatchNorm):
        del layer.process_group
    layer.__class__ = plain  # type: ignore[assignment]

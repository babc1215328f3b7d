"""A model's batch norms become `SyncSplitBatchNorm`, and plain ones again.

A layer is converted where it stands: it changes its class and gains or loses auxiliaries. So
everything else about it is kept, known here or not: parameters and their identity, buffers,
hooks, attributes, training mode, and the places it is referred to from.
"""

import sys
import warnings
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from ._collectives import check_group
from ._state import BUFFERS, PARAMETERS, Auxiliary
from .functional import check_num_splits
from .layer import SyncSplitBatchNorm, SyncSplitBatchNormAct


def convert_sync_split_batchnorm(
    module: nn.Module,
    num_splits: int = 2,
    *,
    process_group: Any = None,
    share_affine: bool = False,
) -> nn.Module:
    """Convert every batch norm of a model into `SyncSplitBatchNorm`, in place, without loss.

    Call it after loading pretrained weights and before the optimizer is made and the model is
    wrapped: build, load, convert, optimizer, `accelerator.prepare`. Every split starts from the
    layer's present parameters and statistics. Split 0 keeps the very parameters, so an optimizer
    made earlier stays valid for them but knows nothing of the other splits.

    Converted are `nn.BatchNorm1d`, `2d` and `3d`, `nn.SyncBatchNorm`, subclasses of these that
    keep their `forward`, and timm's `BatchNormAct2d`, `SyncBatchNormAct` and `SplitBatchNorm2d`.
    Frozen batch norms and instance, group and layer norms are left alone.

    Args:
        module: the model, or a batch norm itself.
        num_splits: number of splits S, at least 1.
        process_group: the ranks to sum over, as `sync_group` makes them; None keeps the group of
            an `nn.SyncBatchNorm` or of a layer already converted, and is all ranks otherwise.
        share_affine: the splits share weight and bias, and differ in statistics alone.

    Returns:
        `module`.

    Raises:
        TypeError: `module` is no module, or a batch norm in it cannot be converted: one with a
            `forward` of its own, a lazy or a parametrized one. The message names it, and nothing
            has been converted then.
        ValueError: a split layer in it has another `num_splits` or `share_affine`.
        RuntimeError: the model is wrapped by DataParallel, DDP or FSDP, or prepared by
            accelerate, already.

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
        _check_convertible(path, norm, num_splits, share_affine)
    memos: list[dict[int, Any]] = [{} for _ in range(num_splits - 1)]
    for norm in norms.values():
        _convert(norm, process_group, share_affine, memos)
    if not norms:
        warnings.warn(
            f"module must contain a batch norm to be converted, got {type(module).__name__} "
            "without one; it is returned as it is",
            stacklevel=2,
        )
    return module


def revert_sync_split_batchnorm(module: nn.Module, split: int = 0) -> nn.Module:
    """Convert every `SyncSplitBatchNorm` back into the plain layer it was, with one split's state.

    The other splits are dropped and the state dict has the plain keys: what inference, export
    and other libraries expect. To keep the split model, revert a `copy.deepcopy` of it.

    Args:
        module: a model converted by `convert_sync_split_batchnorm`; it is changed in place.
        split: whose parameters and statistics to keep, 0 to S - 1.

    Returns:
        `module`, with the classes that were converted: `nn.BatchNorm1d`, `2d`, `3d`,
        `nn.SyncBatchNorm` or timm's layers with an activation. timm's `SplitBatchNorm2d` becomes
        the plain one.

    Raises:
        TypeError: `module` is no module, or a layer in it was not made by the converter.
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
    if not isinstance(split, int):
        raise TypeError(f"split must be an int, got {type(split).__name__}")
    for path, layer in layers.items():
        if not 0 <= split < layer.num_splits:
            raise ValueError(
                f"split must be from 0 to num_splits - 1 = {layer.num_splits - 1} in "
                f"{_named(path)}, got {split}"
            )
        if layer._plain_class is None:
            raise TypeError(
                f"{_named(path)} must be converted from a plain batch norm to be reverted, got a "
                "SyncSplitBatchNorm built as such; build the model with nn.BatchNorm and convert it"
            )
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
    """Return the batch norms of a model by path, each once, without those inside another."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    wrappers = (
        *_loaded("torch.nn.parallel", "DistributedDataParallel", "DataParallel"),
        *_loaded("torch.distributed.fsdp", "FullyShardedDataParallel", "FSDPModule"),
    )
    norms: dict[str, _BatchNorm] = {}
    inner: set[nn.Module] = set()
    for path, part in module.named_modules():
        # accelerate's mark outlives the wrapper, which reverting does not mind.
        prepared = converting and getattr(part, "_is_accelerate_prepared", False)
        if isinstance(part, wrappers) or prepared:
            raise RuntimeError(
                f"{_named(path)} must not be wrapped or prepared yet, got "
                f"{type(part).__name__}; convert first, then make the optimizer, then wrap, "
                "and revert what unwrap_model gives back"
            )
        if isinstance(part, _BatchNorm) and part not in inner:
            norms[path] = part
            inner.update(part.modules())
    return norms


def _check_convertible(path: str, norm: _BatchNorm, num_splits: int, share_affine: bool) -> None:
    """Raise, naming the layer, if its conversion would lose something."""
    if isinstance(norm, (SyncSplitBatchNorm, *_timm_split())):
        shared = getattr(norm, "share_affine", False)
        if norm.num_splits != num_splits or shared != share_affine:
            raise ValueError(
                f"{_named(path)} must have num_splits={num_splits} and share_affine="
                f"{share_affine} as asked, got a {type(norm).__name__} with "
                f"num_splits={norm.num_splits} and share_affine={shared}; "
                "convert a model with plain batch norms instead"
            )
        if any(aux._forward_hooks or aux._forward_pre_hooks for aux in norm.aux_bn):  # type: ignore[union-attr]
            raise TypeError(
                f"{_named(path)} must not have hooks on its auxiliaries, which are not called any "
                "more, got some; remove them first"
            )
    if isinstance(norm, nn.SyncBatchNorm) and "aux_bn" in norm._modules:
        raise TypeError(
            f"{_named(path)} must not have been converted by nn.SyncBatchNorm before, got the "
            "remains of a split layer; build the model anew, and convert it here alone"
        )
    if isinstance(norm, LazyModuleMixin) and norm.has_uninitialized_params():
        raise TypeError(
            f"{_named(path)} must know its number of features, got an uninitialized "
            f"{type(norm).__name__}; run one batch through the model first"
        )
    if not set(PARAMETERS) <= norm._parameters.keys():
        raise TypeError(
            f"{_named(path)} must hold weight and bias as parameters, got a parametrized "
            f"{type(norm).__name__}; remove the parametrization, convert, and put it back"
        )
    if "forward" in vars(norm) or type(norm).forward not in _known_forwards():
        raise TypeError(
            f"{_named(path)} must have the forward of a known batch norm, got a "
            f"{type(norm).__name__} with one of its own; replace that layer by hand"
        )


def _convert(
    norm: _BatchNorm, process_group: Any, share_affine: bool, memos: list[dict[int, Any]]
) -> None:
    """Turn one batch norm into our layer."""
    if process_group is None:
        process_group = getattr(norm, "process_group", None)
    if isinstance(norm, SyncSplitBatchNorm):
        norm.process_group = process_group
        return
    acts = _timm_acts()
    ends_in_act = {cls.forward for cls in (*acts, *_timm_split())}
    active = type(norm).forward in ends_in_act and {"drop", "act"} <= norm._modules.keys()
    plain: type[_BatchNorm] = type(norm)
    if isinstance(norm, _timm_split()):
        auxiliaries = [
            Auxiliary({name: getattr(aux, name) for name in PARAMETERS + BUFFERS})
            for aux in norm.aux_bn
        ]
        plain = acts[0] if active else nn.BatchNorm2d
    else:
        auxiliaries = [Auxiliary.copy_of(norm, share_affine, memo) for memo in memos]
    norm.__class__ = SyncSplitBatchNormAct if active else SyncSplitBatchNorm
    assert isinstance(norm, SyncSplitBatchNorm)
    norm._plain_class = plain
    norm._split(auxiliaries, process_group, share_affine)


def _revert(layer: SyncSplitBatchNorm, split: int) -> None:
    """Turn one of our layers into the class it was converted from, with the state of `split`."""
    if split > 0:
        chosen = layer.aux_bn[split - 1]
        layer._parameters.update(chosen._parameters)
        layer._buffers.update(chosen._buffers)
    plain = layer._plain_class
    assert plain is not None
    del layer.aux_bn
    for name in ("num_splits", "share_affine", "_plain_class", "_assignment", "_stats_frozen"):
        vars(layer).pop(name, None)
    if not issubclass(plain, nn.SyncBatchNorm):
        del layer.process_group
    layer.__class__ = plain  # type: ignore[assignment]


def _known_forwards() -> set[Any]:
    """Return the forward functions whose mathematics is ours."""
    known = (_BatchNorm, nn.SyncBatchNorm, SyncSplitBatchNorm, SyncSplitBatchNormAct)
    return {cls.forward for cls in (*known, *_timm_acts(), *_timm_split())}


def _timm_acts() -> tuple[Any, ...]:
    """Return timm's layers with an activation, if they are there, the plain one first."""
    return _loaded("timm.layers.norm_act", "BatchNormAct2d", "SyncBatchNormAct")


def _timm_split() -> tuple[Any, ...]:
    """Return timm's split layer, if it is there."""
    return _loaded("timm.layers.split_batchnorm", "SplitBatchNorm2d")


def _loaded(module: str, *names: str) -> tuple[Any, ...]:
    """Return classes of a module that is imported already: nothing can be an instance before."""
    return tuple(getattr(sys.modules[module], name) for name in names if module in sys.modules)


def _named(path: str) -> str:
    """Return how an error calls the module at `path`."""
    return f"module {path!r}" if path else "module"

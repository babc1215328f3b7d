"""Conversion of a model's batch norms to `SyncSplitBatchNorm`, and back.

A layer stays the same object: its class changes, and auxiliaries are added or removed. This keeps
everything else: parameters and their identity, buffers, hooks, attributes, training mode, and
all references to the layer.
"""

import sys
import warnings
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from ._collectives import check_group
from ._moments import check_eps, check_num_splits, has_storage
from ._state import BUFFERS, PARAMETERS, Auxiliary
from .layer import SyncSplitBatchNorm, SyncSplitBatchNormAct

# What a class derived from batch norm may redefine: no training, evaluation or state depends on it.
HARMLESS = {"__init__", "_check_input_dim", "extra_repr", "_get_name", "__repr__", "__str__"}
# What Python and `typing` add to classes, and what creates them.
HARMLESS |= {"__dict__", "__weakref__", "__annotate__", "__annotate_func__", "__class_getitem__"}
HARMLESS |= {"__new__", "__init_subclass__", "__subclasshook__"}
# What timm's split layer has once a split, and ours once a layer.
COMMON = ("eps", "momentum", "affine", "track_running_stats", "training")


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
        _check_convertible(path, norm, num_splits, share_affine)
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
                f"{_describe(path)}, got {split}"
            )
        if layer._plain_class is None:
            raise TypeError(
                f"{_describe(path)} must have been converted from a plain batch norm, got a "
                "SyncSplitBatchNorm from its constructor; build with nn.BatchNorm and convert that"
            )
        _check_parameters(path, layer)
        if split > 0 and not layer.share_affine:
            _check_parameters(f"{path}.aux_bn.{split - 1}".lstrip("."), layer.aux_bn[split - 1])
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
        *_loaded("torch.nn.parallel", "DistributedDataParallel", "DataParallel"),
        *_loaded("torch.distributed.fsdp", "FullyShardedDataParallel", "FSDPModule"),
    )
    norms: dict[str, _BatchNorm] = {}
    inner: set[nn.Module] = set()
    for path, part in module.named_modules():
        # accelerate's mark stays on an unwrapped model, which may be reverted.
        prepared = converting and getattr(part, "_is_accelerate_prepared", False)
        if isinstance(part, wrappers) or prepared:
            raise RuntimeError(
                f"{_describe(path)} must not be wrapped or prepared yet, got "
                f"{type(part).__name__}; convert, then make the optimizer, then wrap, "
                "and unwrap before reverting"
            )
        if isinstance(part, _BatchNorm) and part not in inner:
            norms[path] = part
            inner.update(part.modules())
    return norms


def _check_convertible(path: str, norm: _BatchNorm, num_splits: int, share_affine: bool) -> None:
    """Raise, with the path, if conversion would fail or lose something of this batch norm."""
    if isinstance(norm, (SyncSplitBatchNorm, *_timm_split())):
        _check_splits(path, norm, num_splits, share_affine)
    elif "aux_bn" in norm._modules:
        raise TypeError(
            f"{_describe(path)} must have no child aux_bn, got {type(norm).__name__} made from a "
            "split layer by another converter; build the model anew and use this converter alone"
        )
    if not isinstance(norm, SyncSplitBatchNorm):
        _check_methods_and_state(path, norm)
    try:
        check_eps(norm.eps)
        check_group(getattr(norm, "process_group", None))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}, in {_describe(path)}") from None


def _check_splits(path: str, norm: _BatchNorm, num_splits: int, share_affine: bool) -> None:
    """Raise if a split layer, ours or timm's, has other splits than asked for."""
    shared = getattr(norm, "share_affine", False)
    if norm.num_splits != num_splits or shared != share_affine:
        raise ValueError(
            f"{_describe(path)} must have num_splits={num_splits} and share_affine="
            f"{share_affine} as asked, got {type(norm).__name__} with "
            f"num_splits={norm.num_splits} and share_affine={shared}; "
            "convert a model with plain batch norms instead"
        )
    if isinstance(norm, SyncSplitBatchNorm):
        return
    for i, aux in enumerate(norm.aux_bn):  # type: ignore[arg-type]
        aux_path = f"{path}.aux_bn.{i}".lstrip(".")
        if not isinstance(aux, _BatchNorm):
            raise TypeError(
                f"{_describe(aux_path)} must be a batch norm, got {type(aux).__name__}; "
                "replace it by one"
            )
        if any(hooks for key, hooks in vars(aux).items() if key.endswith("hooks")):
            raise TypeError(
                f"{_describe(aux_path)} must have no hooks, which conversion would drop, got some; "
                "remove them first"
            )
        _check_methods_and_state(aux_path, aux)
        for name in COMMON:
            expected, value = getattr(norm, name), getattr(aux, name)
            if value != expected:
                raise ValueError(
                    f"{_describe(aux_path)} must have {name}={expected} as split 0 has, "
                    f"got {value}; give all splits the same"
                )


def _check_methods_and_state(path: str, norm: _BatchNorm) -> None:
    """Raise if our layer would not act on the same tensors, in the same way."""
    kind = type(norm).__name__
    if isinstance(norm, LazyModuleMixin):
        raise TypeError(
            f"{_describe(path)} must know its number of features, got {kind}; "
            "run one batch through the model first"
        )
    _check_parameters(path, norm)
    redefined = _redefined_methods(norm)
    if redefined:
        raise TypeError(
            f"{_describe(path)} must have the methods of a known batch norm, got {kind} with its "
            f"own {', '.join(redefined)}, which conversion would drop; "
            "replace that layer by a plain batch norm, or convert only the other parts of the model"
        )
    if _ends_in_act(norm) and hasattr(norm, "drop") != hasattr(norm, "act"):
        raise TypeError(
            f"{_describe(path)} must have both drop and act or neither, got one of them; "
            "set the other to nn.Identity()"
        )
    for name in PARAMETERS + BUFFERS:
        value = getattr(norm, name)
        if value is None:
            continue
        if not has_storage(value):
            raise ValueError(
                f"{name} must have memory in {_describe(path)}, got a tensor whose storage was "
                "freed; restore it first"
            )
        if name in PARAMETERS + BUFFERS[:2] and value.shape != (norm.num_features,):
            raise ValueError(
                f"{name} must have shape [num_features] = [{norm.num_features}] in "
                f"{_describe(path)}, got {list(value.shape)}; set num_features to the true number"
            )


def _check_parameters(path: str, norm: nn.Module) -> None:
    """Raise if weight or bias is computed from other parameters, which have other names."""
    if not set(PARAMETERS) <= norm._parameters.keys():
        raise TypeError(
            f"{_describe(path)} must hold weight and bias as parameters, got a parametrized "
            f"{type(norm).__name__}; remove the parametrization, convert or revert, and register "
            "it again"
        )


def _redefined_methods(norm: _BatchNorm) -> list[str]:
    """Return the methods and properties that differ from those of the known class beneath.

    New names do not count: torch does not call them.
    """
    kind = type(norm)
    known = {_BatchNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm}
    known.update(_timm_acts(), _timm_split())
    base = next(cls for cls in kind.__mro__ if cls in known)
    # An instance has more names: a subclass may make a property of `training`.
    example = nn.SyncBatchNorm(1, affine=False, track_running_stats=False)
    names = {*dir(example), "__copy__", "__deepcopy__"}
    redefined = []
    for name in sorted(names - HARMLESS):
        own, stock = _lookup(kind, name), _lookup(base, name)
        is_method = any(callable(value) or hasattr(value, "__get__") for value in (own, stock))
        by_class = is_method and own is not stock
        by_instance = name in vars(norm) and callable(stock)
        if by_class or by_instance:
            redefined.append(name)
    return redefined


def _lookup(kind: type, name: str) -> Any:
    """Return a class attribute as it was defined, without calling descriptors; None if absent."""
    return next((vars(cls)[name] for cls in kind.__mro__ if name in vars(cls)), None)


def _make_auxiliaries(
    norm: _BatchNorm, share_affine: bool, memos: list[dict[int, Any]]
) -> list[Auxiliary]:
    """Return the auxiliaries for a batch norm; timm's keep their tensors, others are copies."""
    if isinstance(norm, SyncSplitBatchNorm):
        return []
    if isinstance(norm, _timm_split()):
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
    has_act = _ends_in_act(norm) and hasattr(norm, "act")
    plain: type[_BatchNorm] = type(norm)
    if isinstance(norm, _timm_split()):
        plain = _timm_acts()[0] if has_act else nn.BatchNorm2d
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


def _ends_in_act(norm: _BatchNorm) -> bool:
    """Return whether a batch norm calls the `drop` and `act` that it may have."""
    return isinstance(norm, (*_timm_acts(), *_timm_split()))


def _timm_acts() -> tuple[Any, ...]:
    """Return timm's layers with an activation, the plain one first, or () without timm."""
    return _loaded("timm.layers.norm_act", "BatchNormAct2d", "SyncBatchNormAct")


def _timm_split() -> tuple[Any, ...]:
    """Return timm's split layer, or () without timm."""
    return _loaded("timm.layers.split_batchnorm", "SplitBatchNorm2d")


def _loaded(module: str, *names: str) -> tuple[Any, ...]:
    """Return classes of a module if it is imported; if not, there are no instances of them."""
    return tuple(getattr(sys.modules[module], name) for name in names if module in sys.modules)


def _describe(path: str) -> str:
    """Return the subject of an error about the module at `path`."""
    return f"module {path!r}" if path else "module"

"""What a batch norm must be like, so that conversion loses nothing of it."""

import sys
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from ._collectives import check_group
from ._moments import check_eps, has_storage
from ._state import BUFFERS, PARAMETERS
from .layer import SyncSplitBatchNorm

# What a class derived from batch norm may redefine: no training, evaluation or state depends on it.
HARMLESS = {"__init__", "_check_input_dim", "extra_repr", "_get_name", "__repr__", "__str__"}
# What Python and `typing` add to classes, and what creates them.
HARMLESS |= {"__dict__", "__weakref__", "__annotate__", "__annotate_func__", "__class_getitem__"}
HARMLESS |= {"__new__", "__init_subclass__", "__subclasshook__"}
# What timm's split layer has once a split, and ours once a layer.
COMMON = ("eps", "momentum", "affine", "track_running_stats", "training")


def check_convertible(path: str, norm: _BatchNorm, num_splits: int, share_affine: bool) -> None:
    """Raise, with the path, if conversion would fail or lose something of this batch norm."""
    if isinstance(norm, (SyncSplitBatchNorm, *timm_split())):
        _check_splits(path, norm, num_splits, share_affine)
    elif "aux_bn" in norm._modules:
        raise TypeError(
            f"{describe(path)} must have no child aux_bn, got {type(norm).__name__} made from a "
            "split layer by another converter; build the model anew and use this converter alone"
        )
    if not isinstance(norm, SyncSplitBatchNorm):
        _check_methods_and_state(path, norm)
    try:
        check_eps(norm.eps)
        check_group(getattr(norm, "process_group", None))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}, in {describe(path)}") from None


def _check_splits(path: str, norm: _BatchNorm, num_splits: int, share_affine: bool) -> None:
    """Raise if a split layer, ours or timm's, has other splits than asked for."""
    shared = getattr(norm, "share_affine", False)
    if norm.num_splits != num_splits or shared != share_affine:
        raise ValueError(
            f"{describe(path)} must have num_splits={num_splits} and share_affine="
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
                f"{describe(aux_path)} must be a batch norm, got {type(aux).__name__}; "
                "replace it by one"
            )
        if any(hooks for key, hooks in vars(aux).items() if key.endswith("hooks")):
            raise TypeError(
                f"{describe(aux_path)} must have no hooks, which conversion would drop, got some; "
                "remove them first"
            )
        _check_methods_and_state(aux_path, aux)
        for name in COMMON:
            expected, value = getattr(norm, name), getattr(aux, name)
            if value != expected:
                raise ValueError(
                    f"{describe(aux_path)} must have {name}={expected} as split 0 has, "
                    f"got {value}; give all splits the same"
                )


def _check_methods_and_state(path: str, norm: _BatchNorm) -> None:
    """Raise if our layer would not act on the same tensors, in the same way."""
    kind = type(norm).__name__
    if isinstance(norm, LazyModuleMixin):
        raise TypeError(
            f"{describe(path)} must know its number of features, got {kind}; "
            "run one batch through the model first"
        )
    check_parameters(path, norm)
    redefined = _redefined_methods(norm)
    if redefined:
        raise TypeError(
            f"{describe(path)} must have the methods of a known batch norm, got {kind} with its "
            f"own {', '.join(redefined)}, which conversion would drop; "
            "replace that layer by a plain batch norm, or convert only the other parts of the model"
        )
    if ends_in_act(norm) and hasattr(norm, "drop") != hasattr(norm, "act"):
        raise TypeError(
            f"{describe(path)} must have both drop and act or neither, got one of them; "
            "set the other to nn.Identity()"
        )
    for name in PARAMETERS + BUFFERS:
        value = getattr(norm, name)
        if value is None:
            continue
        if not has_storage(value):
            raise ValueError(
                f"{name} must have memory in {describe(path)}, got a tensor whose storage was "
                "freed; restore it first"
            )
        if name in PARAMETERS + BUFFERS[:2] and value.shape != (norm.num_features,):
            raise ValueError(
                f"{name} must have shape [num_features] = [{norm.num_features}] in "
                f"{describe(path)}, got {list(value.shape)}; set num_features to the true number"
            )


def check_parameters(path: str, norm: nn.Module) -> None:
    """Raise if weight or bias is computed from other parameters, which have other names."""
    if not set(PARAMETERS) <= norm._parameters.keys():
        raise TypeError(
            f"{describe(path)} must hold weight and bias as parameters, got a parametrized "
            f"{type(norm).__name__}; remove the parametrization, convert or revert, and register "
            "it again"
        )


def _redefined_methods(norm: _BatchNorm) -> list[str]:
    """Return the methods and properties that differ from those of the known class beneath.

    New names do not count: torch does not call them.
    """
    kind = type(norm)
    known = {_BatchNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm}
    known.update(timm_acts(), timm_split())
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


def ends_in_act(norm: _BatchNorm) -> bool:
    """Return whether a batch norm calls the `drop` and `act` that it may have."""
    return isinstance(norm, (*timm_acts(), *timm_split()))


def timm_acts() -> tuple[Any, ...]:
    """Return timm's layers with an activation, the plain one first, or () without timm."""
    return loaded("timm.layers.norm_act", "BatchNormAct2d", "SyncBatchNormAct")


def timm_split() -> tuple[Any, ...]:
    """Return timm's split layer, or () without timm."""
    return loaded("timm.layers.split_batchnorm", "SplitBatchNorm2d")


def loaded(module: str, *names: str) -> tuple[Any, ...]:
    """Return classes of a module if it is imported; if not, there are no instances of them."""
    return tuple(getattr(sys.modules[module], name) for name in names if module in sys.modules)


def describe(path: str) -> str:
    """Return the subject of an error about the module at `path`."""
    return f"module {path!r}" if path else "module"

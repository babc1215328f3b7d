"""Whether the ranks hold one model: the first difference between them, by name."""

import hashlib
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from ._collectives import (
    check_group,
    gather_objects,
    ranks_of,
    resolve_group,
    sharded_parameters,
)
from ._moments import has_storage
from .layer import SyncSplitBatchNorm

_Ranks: TypeAlias = tuple[int, ...]
# By subject, in the order of comparison: the value, and the global ranks that must share it (None
# means all).
_Facts: TypeAlias = dict[str, tuple[str, _Ranks | None]]

_OPTIONS = (
    "num_features",
    "num_splits",
    "eps",
    "momentum",
    "affine",
    "share_affine",
    "track_running_stats",
    "skip_nonfinite_stats",
    "training",
)
# What to do about a difference in each part of a description, in their order.
_REMEDIES = (
    "build and convert the model in the same way on every rank",
    "construct the layers with the same options, and enter train(), eval() and frozen_stats on "
    "all ranks or none",
    "build the model in the same way on every rank",
    "load or seed the same parameters on every rank, and have their gradients averaged: wrap the "
    "model by DistributedDataParallel or accelerator.prepare",
    "load the same buffers on every rank, run the same layers in the same order, and enter "
    "frozen_stats on all ranks or none",
)


def check_replicas(model: nn.Module, process_group: Any = None) -> None:
    """Raise on every rank, and name the first difference, unless the ranks hold one model.

    Call it on all ranks, after the model was built, converted and loaded; and again at any later
    step, to see that the replicas have not drifted apart. These are compared, in this order:

    1. the paths, classes and process groups of all `SyncSplitBatchNorm` layers;
    2. their options, `training`, and whether `frozen_stats` is on;
    3. the names, shapes, types and sharing of all parameters and buffers, and `requires_grad`;
    4. the bits of all parameters;
    5. the bits of all buffers. The running statistics of a layer with a process group of its own
       are compared inside that group, those of other batch norms not at all: they belong to a rank.

    The order in which `forward` calls the layers is not seen before a step; after a step their
    running statistics show it.

    Args:
        model: the model, also one wrapped by DDP, FSDP or `accelerator.prepare`. Of parameters that
            are sharded, or quantized, sparse, nested or lazy, only names and types are compared.
        process_group: the ranks to compare; None is all ranks.

    Raises:
        TypeError: `model` is no module, or `process_group` no group.
        ValueError: the ranks differ, and where.

    Communication:
        One all_gather_object of 32 bytes. Where these differ, another one of about 100 bytes for
        each parameter, buffer and option. None in a group of one. Reads every parameter and buffer
        once and copies it to the host, so it waits for the device.

    Example:
        >>> check_replicas(SyncSplitBatchNorm(8))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_group(process_group)
    group = resolve_group(process_group)
    if group is None:
        return
    described = _description(model)
    if len(set(gather_objects(hashlib.sha256(repr(described).encode()).digest(), group))) == 1:
        return
    descriptions = gather_objects(described, group)
    for remedy, parts in zip(_REMEDIES, zip(*descriptions, strict=True), strict=True):
        difference = _first_difference(dict(zip(ranks_of(group), parts, strict=True)))
        if difference is not None:
            raise ValueError(f"{difference}; {remedy}")


def _first_difference(facts_by_rank: dict[int, _Facts]) -> str | None:
    """Return the first subject on which ranks differ that should agree, with their values."""
    subjects = dict.fromkeys(subject for facts in facts_by_rank.values() for subject in facts)
    for subject in subjects:
        found = {rank: facts.get(subject, ("none", None)) for rank, facts in facts_by_rank.items()}
        for among in {ranks for _, ranks in found.values()}:
            ranks_by_value: dict[str, list[int]] = {}
            for rank, (value, _) in found.items():
                if among is None or rank in among:
                    ranks_by_value.setdefault(value, []).append(rank)
            if len(ranks_by_value) > 1:
                got = ", ".join(f"{value} {_on(ranks)}" for value, ranks in ranks_by_value.items())
                return f"{subject} must be the same on all ranks, got {got}"
    return None


def _on(ranks: list[int]) -> str:
    """Return the words for some ranks, at most eight of them by number."""
    if len(ranks) == 1:
        return f"on rank {ranks[0]}"
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"on ranks {', '.join(map(str, ranks[:8]))}{more}"


def _description(model: nn.Module) -> tuple[_Facts, ...]:
    """Return what ranks are to agree on, in as many parts as there are remedies."""
    sharded = sharded_parameters(model)
    return (*_layers(model), _tensors(model, sharded), *_contents(model, sharded))


def _layers(model: nn.Module) -> tuple[_Facts, _Facts]:
    """Return which layers there are, and their options."""
    layers: _Facts = {}
    options: _Facts = {}
    first_paths: dict[nn.Module, str] = {}
    number = 0
    for path, layer in model.named_modules(remove_duplicate=False):
        if not isinstance(layer, SyncSplitBatchNorm):
            continue
        number += 1
        first = first_paths.setdefault(layer, path)
        shared = "" if first == path else f" (the layer {first})"
        layers[f"SyncSplitBatchNorm number {number}"] = f"{path or 'the model'}{shared}", None
        layers[f"class of {path}"] = type(layer).__name__, None
        cohort = _cohort(layer)
        group = "all" if cohort is None else str(list(cohort))
        layers[f"process_group of {path}"] = group, cohort
        for name in _OPTIONS:
            options[f"{name} of {path}"] = repr(getattr(layer, name)), None
        options[f"frozen_stats of {path}"] = "on" if layer._stats_frozen else "off", None
    return layers, options


def _cohort(layer: SyncSplitBatchNorm) -> _Ranks | None:
    """Return the global ranks that a layer sums over, or None for all."""
    ranks = ranks_of(layer.process_group)
    return None if len(ranks) == len(ranks_of(None)) else ranks


def _tensors(model: nn.Module, sharded: set[int]) -> _Facts:
    """Return what the parameters and buffers are, without their contents."""
    facts: _Facts = {}
    first_names: dict[int, str] = {}
    named = {
        "parameter": model.named_parameters(remove_duplicate=False),
        "buffer": model.named_buffers(remove_duplicate=False),
    }
    for kind, tensors in named.items():
        for number, (name, tensor) in enumerate(tensors, start=1):
            words = [name, str(tensor.dtype), tensor.device.type]
            if _is_plain(tensor) and id(tensor) not in sharded:
                words.append(f"shape {list(tensor.shape)}")
            if tensor.requires_grad:
                words.append("requires_grad")
            first = first_names.setdefault(id(tensor), name)
            if first != name:
                words.append(f"shared with {first}")
            facts[f"{kind} number {number}"] = f"({', '.join(words)})", None
    return facts


def _contents(model: nn.Module, sharded: set[int]) -> tuple[_Facts, _Facts]:
    """Return checksums of the parameters, and of the buffers that ranks have in common."""
    cohorts: dict[int, _Ranks | None] = {}
    own: set[int] = set()
    for module in model.modules():
        if isinstance(module, SyncSplitBatchNorm):
            cohorts |= {id(buffer): _cohort(module) for buffer in module.buffers()}
        elif isinstance(module, _BatchNorm):
            own |= {id(buffer) for buffer in module.buffers()}
    parameters: _Facts = {
        f"content of {name}": (_checksum(parameter), None)
        for name, parameter in model.named_parameters()
        if id(parameter) not in sharded
    }
    buffers: _Facts = {
        f"content of {name}": (_checksum(buffer), cohorts.get(id(buffer)))
        for name, buffer in model.named_buffers()
        if id(buffer) not in own
    }
    return parameters, buffers


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor has a shape, and bits that can be compared."""
    is_special = tensor.is_quantized or tensor.is_nested or tensor.layout != torch.strided
    return not (is_special or is_lazy(tensor))


def _checksum(tensor: Tensor) -> str:
    """Return 64 bits of the SHA-256 of a tensor's elements, in the order of its indices."""
    if not _is_plain(tensor):
        return "not compared"
    if tensor.is_meta or tensor.numel() == 0:
        return "nothing"
    if not has_storage(tensor):
        return "freed memory"
    rows = tensor.detach().resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8)
    # Not by NumPy, without which torch works too.
    memory = bytearray(rows.numel())
    torch.frombuffer(memory, dtype=torch.uint8).copy_(rows)
    return f"checksum {hashlib.sha256(memory).hexdigest()[:16]}"

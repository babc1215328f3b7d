"""Who takes part in the benchmark, by name, and who cannot here, with the reason.

C features, S splits.
"""

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from sync_splitbn import SyncSplitBatchNorm

from .measure import reason
from .peers import MeansOverRanks, Operation, OursAlone, PerSplit, SyncBatchNormAlone

_IMPLS = ("aten", "cpu", "triton")
NAMES = (
    "ours",
    "own-group",
    *_IMPLS,
    "compiled",
    "timm",
    "sync-bn",
    "all-reduce",
    "plain",
    "plain-compiled",
)


@dataclass(frozen=True)
class Contender:
    """One of those compared.

    Args:
        name: what tables call it.
        label: what it is.
        build: makes the layer from C and S.
        compiled: whether it is to go through `torch.compile`.
    """

    name: str
    label: str
    build: Callable[[int, int], nn.Module]
    compiled: bool = False


def contenders(
    device: torch.device, wanted: list[str], *, alone: bool = False
) -> tuple[list[Contender], dict[str, str]]:
    """Return those of `wanted` that can run on `device`, and why the others cannot.

    Args:
        device: where they are to run.
        wanted: some of `NAMES`.
        alone: have the synchronized ones post their collectives in a group of one rank too.
    """
    missing = {}
    for impl in _IMPLS:
        try:
            layer = Operation(2, 1, impl=impl, sync=False).to(device)
            layer(torch.ones(1, 2, 2, 2, device=device)).sum().backward()
        except Exception as error:  # no such module, no Triton, no GPU, no driver
            missing[impl] = reason(error)
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        missing["own-group"] = "there is one rank, which sends nothing"
    if device.type == "cpu":
        missing["sync-bn"] = "nn.SyncBatchNorm refuses CPU tensors where there are several ranks"
    able = [one for one in _all(alone) if one.name in wanted and one.name not in missing]
    return able, {name: why for name, why in missing.items() if name in wanted}


def _all(alone: bool) -> list[Contender]:
    posted = "; posts in a group of one" if alone else ""
    sync_bn = SyncBatchNormAlone if alone else nn.SyncBatchNorm
    timm, timm_label = _timm()
    return [
        Contender("ours", f"SyncSplitBatchNorm{posted}", OursAlone if alone else _ours),
        Contender(
            "own-group", "SyncSplitBatchNorm in a process group apart from DDP's", _ours_apart
        ),
        *(
            Contender(
                impl,
                f'sync_split_batch_norm(impl="{impl}"), without running statistics',
                functools.partial(Operation, impl=impl),
            )
            for impl in _IMPLS
        ),
        Contender("compiled", "torch.compile(SyncSplitBatchNorm)", _ours, compiled=True),
        Contender("timm", timm_label, timm),
        Contender(
            "sync-bn",
            f"nn.SyncBatchNorm per split, split and cat{posted}",
            functools.partial(_per_split, sync_bn),
        ),
        Contender(
            "all-reduce",
            f"per split an all_reduce of mean and mean of squares, as detectron2{posted}",
            functools.partial(_per_split, functools.partial(MeansOverRanks, alone=alone)),
        ),
        Contender(
            "plain",
            "nn.BatchNorm2d, neither split nor synchronized: the price of nothing",
            _plain,
        ),
        Contender("plain-compiled", "torch.compile(nn.BatchNorm2d)", _plain, compiled=True),
    ]


def _ours(features: int, splits: int) -> nn.Module:
    return SyncSplitBatchNorm(features, num_splits=splits)


def _ours_apart(features: int, splits: int) -> nn.Module:
    return SyncSplitBatchNorm(features, num_splits=splits, process_group=_own_group())


@functools.cache
def _own_group() -> dist.ProcessGroup:
    return dist.new_group()


def _plain(features: int, splits: int) -> nn.Module:
    return nn.BatchNorm2d(features)


def _per_split(norm: Callable[[int], nn.Module], features: int, splits: int) -> nn.Module:
    return PerSplit([norm(features) for _ in range(splits)])


def _timm() -> tuple[Callable[[int, int], nn.Module], str]:
    """Return timm's layer, or the same computation where timm is not installed, and its label."""
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        return (
            functools.partial(_per_split, nn.BatchNorm2d),
            "split + batch_norm + cat (timm's computation; not installed), not synchronized",
        )
    # Its file alone: timm as a whole imports torchvision, which may not load beside this torch.
    path = Path(spec.submodule_search_locations[0]) / "layers" / "split_batchnorm.py"
    file = importlib.util.spec_from_file_location("_timm_split_batchnorm", path)
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    return (
        lambda features, splits: module.SplitBatchNorm2d(features, num_splits=splits),
        f"timm {importlib.metadata.version('timm')} SplitBatchNorm2d, not synchronized",
    )

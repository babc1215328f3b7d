"""From the launcher's environment to an `Accelerator` that means what the user asked for."""

import argparse
import datetime
import os
import shlex
import sys
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedType, InitProcessGroupKwargs

from .errors import RunError
from .interruption import end_with_launcher

_CONFIG = "launch/configs/two_processes.yaml"
_SUPPORTED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
)


def start(options: argparse.Namespace) -> Accelerator:
    """Return an accelerator over all ranks that were asked for, or refuse with the right command.

    Args:
        options: of `recipe.options.add_run_options` and `add_optimization_options`: the device, the
            seed of the order of the training images, the precision, the tracker and its folder.

    Raises:
        RunError: The launcher started fewer ranks than asked for, accelerate sees fewer than there
            are, or the configuration asks for something the recipes do not do.
    """
    end_with_launcher()
    is_on_cpu = options.cpu or _accelerators() < int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    timeout = datetime.timedelta(seconds=options.timeout)
    _join_after_restart(is_on_cpu, timeout)
    accelerator = Accelerator(
        cpu=is_on_cpu,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True, data_seed=options.seed
        ),
        log_with=options.tracker,
        mixed_precision=options.mixed_precision,
        project_dir=options.output,
    )
    check_world(accelerator)
    if accelerator.distributed_type not in _SUPPORTED:
        raise RunError(
            "distributed_type must be NO or MULTI_GPU, "
            f"got {accelerator.distributed_type.value}; use a file of launch/configs"
        )
    if options.tracker is not None and not accelerator.log_with:
        raise RunError(f"--tracker must be installed, got {options.tracker}, which is not")
    if accelerator.gradient_accumulation_steps != 1:
        raise RunError(
            "gradient_accumulation_steps must be 1, because statistics cover one micro-batch, "
            f"got {accelerator.gradient_accumulation_steps}; use a larger --batch-size"
        )
    if not options.cpu and accelerator.device.type == "cpu" and _accelerators() > 0:
        accelerator.print(
            f"{_accelerators()} accelerator(s) for {os.environ['LOCAL_WORLD_SIZE']} local ranks: "
            f"training on the CPU; pass --num_processes {_accelerators()} to use them",
            file=sys.stderr,
        )
    return accelerator


def _join_after_restart(is_on_cpu: bool, timeout: datetime.timedelta) -> None:
    """Make the process group of ranks that the launcher has started anew.

    The launcher keeps one store for all its attempts, in which the dead ranks' addresses stand:
    each attempt gets names of its own. accelerate takes a group that is there.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("WORLD_SIZE", "1") == "1" or dist.is_initialized():
        return
    if not is_on_cpu:
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    dist.init_process_group(
        "gloo" if is_on_cpu else dist.get_default_backend_for_device(_device_type()),
        store=dist.PrefixStore(f"attempt-{attempt}", store),
        rank=rank,
        world_size=world,
        timeout=timeout,
    )


def _device_type() -> str:
    device = torch.accelerator.current_accelerator()
    return "cpu" if device is None else device.type


def check_world(accelerator: Accelerator) -> None:
    """Refuse the two ways in which CPU ranks are lost without a word.

    Args:
        accelerator: as constructed.

    Raises:
        RunError: One process runs where several were asked for, or each rank of several
            believes that it is alone.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    command = shlex.join(
        ["accelerate", "launch", "--config_file", _CONFIG, "-m", _module_name(), *sys.argv[1:]]
    )
    if world != accelerator.num_processes:
        raise RunError(
            f"accelerate must see all {world} ranks, got {accelerator.num_processes}; "
            f"without an accelerator run ACCELERATE_USE_CPU=true {command}"
        )
    # accelerate's launcher for one process sets these even when it was asked for several.
    asked = {"MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"} <= os.environ.keys()
    if asked and "WORLD_SIZE" not in os.environ and world == 1:
        raise RunError(
            "the launcher must start num_processes ranks, got 1; "
            f"run {command} (or unset MASTER_ADDR if one rank is what you want)"
        )


def _accelerators() -> int:
    """Return how many accelerators the layer can use; Apple's has no float64 for the sums."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return 0 if device is None or device.type == "mps" else torch.accelerator.device_count()


def _module_name() -> str:
    """Return what follows `-m` in the command that started this process."""
    main: Any = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    return spec.name if spec is not None else "launch.train"

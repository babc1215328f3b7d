"""`python -m sync_splitbn`: versions, and which kernels serve the CPU and each GPU, or why not."""

import argparse
import importlib.metadata
import platform
import warnings

import torch

from . import __version__, _kernels
from ._moments import COMPILED_TYPES

PACKAGES = ("torch", "triton", "accelerate", "timm")


def main() -> None:
    """Print the report."""
    argparse.ArgumentParser(
        prog="python -m sync_splitbn",
        description="Show versions, and which kernels serve the CPU and each GPU here.",
    ).parse_args()
    print(f"sync_splitbn {__version__}, Python {platform.python_version()}")
    print(", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    print()
    _report(torch.device("cpu"), f"CPU ({torch.backends.cpu.get_cpu_capability()})", "cpu")
    if not torch.cuda.is_available():
        print("CUDA: no device is available to torch")
    for i in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(i)
        _report(torch.device("cuda", i), f"CUDA device {i} ({name})", "triton")


def _report(device: torch.device, title: str, compiled: str) -> None:
    """Print who serves each type on a device with impl=None."""
    print(f"{title}:")
    for dtype in COMPILED_TYPES:
        x = torch.empty(0, 1, dtype=dtype, device=device)
        # The reason is printed below, where the warning would say it.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reason = _kernels.default_unavailable(x)
        serves = compiled if reason is None else f"aten; {compiled}: {reason}"
        print(f"  {str(dtype).removeprefix('torch.'):9}{serves}")
    if device.type == "cuda":
        print("  compiled graphs (torch.compile) take aten, which inductor fuses")


def _version(package: str) -> str:
    """Return the version of a package, or that it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()

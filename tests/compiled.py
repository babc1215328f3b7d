"""The kernel modules that a CPU can try: ATen's, and the compiled loops or the reason to skip."""

import pytest
import torch

from sync_splitbn._kernels import aten, cpu

UNAVAILABLE = cpu.unavailable(torch.empty(0, 1))
COMPILED = pytest.mark.skipif(UNAVAILABLE is not None, reason=f"no compiled loops: {UNAVAILABLE}")
IMPLS = ["aten", pytest.param("cpu", marks=COMPILED)]
KERNELS = [pytest.param(aten, id="aten"), pytest.param(cpu, id="cpu", marks=COMPILED)]

"""What a test of the CPU kernels needs: their compiled loops, or the reason to skip."""

import pytest

from sync_splitbn._kernels import cpu

COMPILED = pytest.mark.skipif(cpu.missing is not None, reason=f"no compiled loops: {cpu.missing}")
IMPLS = ["aten", pytest.param("cpu", marks=COMPILED)]

"""Who computes by default, Triton only where its first call agreed with ATen, and who sees it."""

import importlib.util
import subprocess
import sys
import types
import warnings

import pytest
import torch
from compiled import COMPILED
from torch._subclasses import FakeTensorMode

from sync_splitbn import _kernels
from sync_splitbn._kernels import aten

FUNCTIONS = [name for name in vars(_kernels.Kernels) if not name.startswith("_")]


@pytest.fixture
def as_triton(monkeypatch):
    """Have a stand-in for the Triton kernels: ATen's, with some functions replaced."""

    def replace(**functions):
        own = {name: getattr(aten, name) for name in FUNCTIONS}
        module = types.SimpleNamespace(**(own | functions))
        monkeypatch.setattr(_kernels, "_triton", lambda: module)
        monkeypatch.setattr(_kernels, "unavailable", lambda impl, x: None)

    monkeypatch.setattr(_kernels, "_triton_verdicts", {})
    return replace


def off(name):
    """Return a function of ATen's whose result is wrong."""

    def wrong(*arguments):
        result = getattr(aten, name)(*arguments)
        if name == "update_running_stats":
            return arguments[0][1].add_(0.01)
        return (result[0] + 0.01, result[1]) if isinstance(result, tuple) else result + 0.01

    return wrong


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_serves_where_it_agrees_with_aten(dtype, as_triton):
    as_triton()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _kernels._compare_triton(torch.empty(0, 1, dtype=dtype)) is None


@pytest.mark.parametrize("name", FUNCTIONS)
def test_triton_does_not_serve_where_any_kernel_differs(name, as_triton):
    as_triton(**{name: off(name)})
    with pytest.warns(UserWarning, match=r"its results differ from ATen's .* ATen serves instead"):
        reason = _kernels._compare_triton(torch.empty(0, 1))
    assert "differ" in reason


def test_triton_that_cannot_compile_is_named_in_one_warning(as_triton):
    def fail(*arguments):
        raise RuntimeError("Failed to find C compiler")

    as_triton(sums=fail)
    with pytest.warns(UserWarning, match="cannot compile: RuntimeError: Failed to find C"):
        _kernels._compare_triton(torch.empty(0, 1))


def test_fake_cuda_tensor_is_left_to_aten_without_a_verdict(as_triton):
    as_triton()
    with FakeTensorMode():
        x = torch.empty(4, 3, device="cuda")
        assert _kernels.choose(None, x) is aten
    assert not _kernels._triton_verdicts


def test_missing_triton_is_no_reason_to_warn(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _kernels._compare_triton(torch.empty(0, 1)) == "no Triton to import"


def test_comparison_runs_once_a_device_and_type_and_not_in_a_capture(as_triton, monkeypatch):
    as_triton()
    calls, capturing = [], True
    monkeypatch.setattr(_kernels, "_compare_triton", lambda x: calls.append(x))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    x = types.SimpleNamespace(is_cpu=False, is_cuda=True, device="cuda:0", dtype=torch.float32)
    assert "capture" in _kernels.default_unavailable(x)
    assert not calls
    capturing = False
    assert _kernels.default_unavailable(x) is None
    capturing = True
    assert _kernels.default_unavailable(x) is None
    assert len(calls) == 1


def test_report_tells_who_computes():
    command = [sys.executable, "-m", "sync_splitbn"]
    report = subprocess.run(command, capture_output=True, text=True, check=True, timeout=150)
    assert report.stderr == ""
    assert f"torch {torch.__version__}" in report.stdout
    serves = _kernels.default_unavailable(torch.empty(0, 1))
    assert f"float32  {'cpu' if serves is None else 'aten; cpu: ' + serves}" in report.stdout
    assert "CUDA" in report.stdout
    # On a CPU compiled graphs take the loops too.
    assert ("take aten" in report.stdout) == torch.cuda.is_available()


OTHER_TORCHES = {
    "none": ("del torch.Tensor.__dlpack_c_exchange_api__", "has no attribute '__dlpack_c_exchange"),
    "version 2": ("torch.Tensor.__dlpack_c_exchange_api__ = capsule", "torch must speak DLPack 1"),
}


@COMPILED
@pytest.mark.parametrize("torch_with", OTHER_TORCHES)
def test_aten_serves_where_torch_does_not_describe_its_tensors_in_dlpack_1(torch_with):
    change, reason = OTHER_TORCHES[torch_with]
    code = f"""
import ctypes, torch
new = ctypes.pythonapi.PyCapsule_New
new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
version_2 = (ctypes.c_uint32 * 32)(2)
capsule = new(ctypes.addressof(version_2), b"dlpack_exchange_api", None)
{change}
import sync_splitbn
from sync_splitbn._kernels import aten, choose, cpu
assert choose(None, torch.zeros(4, 3)) is aten
print(sync_splitbn.SyncSplitBatchNorm(3)(torch.randn(4, 3)).shape, cpu.unavailable(torch.zeros(1)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert reason in done.stdout, done.stderr


@COMPILED
def test_types_without_loops_are_named():
    reason = _kernels.default_unavailable(torch.empty(0, 1, dtype=torch.float8_e4m3fn))
    assert reason == "no compiled loops for torch.float8_e4m3fn on cpu"


def test_aten_serves_where_the_loops_are_of_another_version():
    code = """
import sys, types, torch
sys.modules["sync_splitbn._kernels._cpu"] = types.ModuleType("_cpu")
import sync_splitbn
from sync_splitbn._kernels import aten, choose, cpu
assert choose(None, torch.zeros(4, 3)) is aten
print(sync_splitbn.SyncSplitBatchNorm(3)(torch.randn(4, 3)).shape, cpu.unavailable(torch.zeros(1)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150)
    assert "compiled loops of another version; install the package again" in done.stdout, (
        done.stderr
    )

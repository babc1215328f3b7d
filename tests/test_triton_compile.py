"""The Triton kernels compiled for GPUs that are not here, and launched through a stand-in driver.

Every type, layout and kind of splits is compiled for every architecture, at sizes whose lines are
aligned; other sizes for one architecture. What ptxas says of registers and spills is read from
the binary, the width of loads and stores from PTX. No kernel runs.
"""

import itertools
import os
import re
import shutil
import subprocess
import sysconfig

import pytest
import torch

from sync_splitbn._moments import accumulation_dtype

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip(
        "TRITON_INTERPRET=1 leaves nothing to compile: run this file by itself",
        allow_module_level=True,
    )
triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402 - after Triton was found
from triton.backends.nvidia import driver as nvidia  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime import JITFunction, driver  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from sync_splitbn._kernels import triton as kernels  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SPLITS = {
    "equal": (4, 4, 4),
    "sizes": (1, 8, 3),
    "index": torch.arange(12) % 3,
}
LAYOUTS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}
CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
THREADS = 32 * kernels.NUM_WARPS
LAUNCHES = 15  # in a call of `train` with fewer than 17 splits


@pytest.fixture(autouse=True)
def no_device(monkeypatch, tmp_path_factory):
    """Let CPU tensors through to the launches, for a GPU of 132 processors."""
    monkeypatch.setattr(kernels, "unavailable", lambda x: None)
    monkeypatch.setattr(kernels, "_num_programs", lambda device: 528)
    cache = tmp_path_factory.getbasetemp() / "triton-cache"
    monkeypatch.setattr(triton.knobs.cache, "dir", str(cache))


def train(x, splits, num_splits):
    """Call all that a kernel module offers, as a layer does on several ranks and on one."""
    rows = (splits, None) if isinstance(splits, torch.Tensor) else (None, splits)
    features, wide = x.shape[1], accumulation_dtype(x.dtype)
    weights, biases = (
        [torch.ones(features, dtype=wide) for _ in range(num_splits)] for _ in range(2)
    )
    moments = kernels.moments(kernels.sums(x, *rows, num_splits))
    kernels.normalize(x, *rows, moments, weights, biases, 1e-5)
    sums = kernels.grad_sums(x, x, *rows, moments, 1e-5)
    kernels.grad_input(x, x, *rows, moments, weights, 1e-5, sums)
    kernels.normalize_batch(x, *rows, num_splits, weights, biases, 1e-5)
    kernels.grad_batch(x, x, *rows, moments, weights, 1e-5)
    statistics = [torch.ones(features) for _ in range(2 * num_splits)]
    counters = [torch.tensor(0) for _ in range(num_splits)]
    halves = statistics[:num_splits], statistics[num_splits:]
    for momentum in (0.1, None):
        kernels.update_running_stats(*halves, counters, momentum, moments)


@pytest.fixture
def launches(monkeypatch):
    """Record (kernel, programs, arguments) of each launch, instead of launching."""
    found = []
    monkeypatch.setattr(
        kernels, "_launch", lambda kernel, programs, *args: found.append((kernel, programs, args))
    )
    return found


def compile_for(target, kernel, arguments):
    """Compile a launch as Triton would on the target, through its own binder."""
    backend, options = make_backend(target), {"num_warps": kernels.NUM_WARPS, "debug": False}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = binder(*arguments, **options)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, rest
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=parsed.__dict__)


def resources(compiled, tmp_path):
    """Return the registers, the stack and the local memory of a thread, in registers and bytes."""
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [CUOBJDUMP, "-res-usage", binary], capture_output=True, text=True, check=True
    )
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage.stdout + usage.stderr)
    return tuple(map(int, found.groups()))


def assert_fits(compiled, tmp_path):
    """Without spills, and with registers for three programs of four warps on a processor."""
    registers, stack, local = resources(compiled, tmp_path)
    assert (stack, local) == (0, 0), f"{compiled.metadata.name} spills"
    assert registers <= 168, f"{compiled.metadata.name} takes {registers} registers"


def assert_wide(compiled, arguments):
    """Each load of x and dy, and each store of y or dx, has 128 bits or more."""
    config, ptx = arguments[-1], compiled.asm["ptx"]
    tensors = 1 if arguments[1] is None else 2
    tile = config.block_p * config.block_c * arguments[0].dtype.itemsize // (16 * THREADS)
    wide = r"ld\.global\S*\.(?:v4\.b32|v2\.b64)|cp\.async\.cg\.shared\.global.*\b(?:16|0x10)\b"
    wider = r"ld\.global\S*\.(?:v8\.b32|v4\.b64)"
    loads = len(re.findall(wide, ptx)) + 2 * len(re.findall(wider, ptx))
    assert loads >= tile * tensors >= 1, f"{compiled.metadata.name} has {loads} wide loads"
    if compiled.metadata.name == "apply_kernel":
        stores = re.findall(r"st\.global\S*", ptx)
        assert stores
        narrow = [s for s in stores if not re.search(r"v4\.b32|v2\.b64|v8\.b32|v4\.b64", s)]
        assert not narrow
    narrow = "b16" if arguments[0].dtype.itemsize == 2 else "no such"
    assert f"ld.global.{narrow}" not in ptx


def distinct(launches):
    """Return the launches that differ in more than numbers and addresses."""

    def kind(argument):
        if isinstance(argument, torch.Tensor):
            return argument.dtype
        if type(argument) is tuple:
            return tuple(map(kind, argument))
        return type(argument) if isinstance(argument, (int, float)) else argument

    return {(launch[0].__name__, *map(kind, launch[2])): launch for launch in launches}.values()


def assert_all_fit(launches, tmp_path):
    for kernel, _, arguments in distinct(launches):
        assert_fits(compile_for(TARGETS["sm_90"], kernel, arguments), tmp_path)


# Sizes differ from an index by how a program finds its rows: one architecture shows it.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_spills_and_move_16_bytes(target, dtype, launches, tmp_path):
    kinds = SPLITS if target == "sm_90" else {"equal", "index"}
    for layout, kind in itertools.product(LAYOUTS.values(), kinds):
        x = torch.zeros(12, 64, 56, 56, dtype=dtype).contiguous(memory_format=layout)
        train(x, SPLITS[kind], 3)
    assert len(launches) == 2 * len(kinds) * LAUNCHES
    for kernel, _, arguments in distinct(launches):
        compiled = compile_for(TARGETS[target], kernel, arguments)
        if TARGETS[target].backend == "cuda":
            assert_fits(compiled, tmp_path)
            if kernel.__name__ in ("sums_kernel", "apply_kernel"):
                assert_wide(compiled, arguments)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((6, 7, 7, 7), torch.bfloat16),
        ((6, 2048, 1, 1), torch.float16),
        ((6, 1, 28, 28), torch.float32),
        ((6, 65, 3, 5), torch.float64),
        ((6, 3, 224, 224), torch.bfloat16),
    ],
    ids=str,
)
def test_kernels_compile_without_spills_for_odd_sizes(shape, dtype, launches, tmp_path):
    for layout, splits in itertools.product(LAYOUTS.values(), [(1, 3, 2), torch.arange(6) % 3]):
        train(torch.zeros(shape, dtype=dtype).contiguous(memory_format=layout), splits, 3)
    assert_all_fit(launches, tmp_path)


@pytest.mark.parametrize("num_splits", [40, 256])
def test_kernels_compile_without_spills_for_hundreds_of_splits(num_splits, launches, tmp_path):
    sizes = tuple(1 + i % 3 for i in range(num_splits))
    train(torch.zeros(sum(sizes), 64, 4, 4, dtype=torch.bfloat16), sizes, num_splits)
    assert_all_fit(launches, tmp_path)


def test_kernels_compile_without_spills_for_64_bit_positions(launches, tmp_path, monkeypatch):
    int64 = triton.language.int64
    assert kernels._plan((3, 2**29, 2), (3,), 1, torch.float32, False, 528, 2, 3)[2].index == int64
    plan = kernels._plan

    def wide(*arguments):
        grid, schedule, config = plan(*arguments)
        return grid, schedule, config._replace(index=int64)

    monkeypatch.setattr(kernels, "_plan", wide)
    for layout, splits in itertools.product(LAYOUTS.values(), SPLITS.values()):
        x = torch.zeros(12, 64, 56, 56, dtype=torch.bfloat16).contiguous(memory_format=layout)
        train(x, splits, 3)
    assert_all_fit(launches, tmp_path)


class StandInUtils:
    """Takes a binary, and hands out as much shared memory as an H100 has."""

    def load_binary(self, *arguments):
        return 0, 0, 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}


class StandInDriver:
    """A driver of one H100, whose launches are counted in `launched`, by kernel."""

    def __init__(self, launched):
        self.utils = StandInUtils()
        self.launcher_cls = lambda source, metadata: (
            lambda *arguments: launched.append((source.fn.__name__, arguments))
        )

    def get_current_target(self):
        return TARGETS["sm_90"]

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0


@pytest.fixture
def launched(monkeypatch):
    """Run launches as far as the driver; return those, and the names of what was compiled."""
    launched, compiled = [], []
    monkeypatch.setattr(driver, "_active", StandInDriver(launched))
    for name in vars(kernels.jit):
        if isinstance(getattr(kernels.jit, name), JITFunction):
            getattr(kernels.jit, name).device_caches.clear()
    do_compile = JITFunction._do_compile

    def counted(self, *arguments):
        compiled.append(self.__name__)
        return do_compile(self, *arguments)

    monkeypatch.setattr(JITFunction, "_do_compile", counted)
    return launched, compiled


def batch(rows, layout, dtype=torch.bfloat16):
    return torch.zeros(rows, 24, 28, 28, dtype=dtype).contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_launches_are_compiled_once_for_any_number_of_rows(launched, layout):
    launched, compiled = launched
    layout = LAYOUTS[layout]
    train(batch(48, layout), (16, 16, 16), 3)
    train(batch(31, layout), (1, 0, 30), 3)
    train(batch(48, layout), torch.arange(48) % 3, 3)
    first, count = len(launched), len(compiled)
    assert first == 3 * LAUNCHES
    train(batch(3, layout), (1, 1, 1), 3)
    train(batch(48, layout), (16, 16, 16), 3)
    train(batch(49, layout), (16, 1, 32), 3)
    train(batch(17, layout), torch.arange(17) % 3, 3)
    assert len(launched) == first + 4 * LAUNCHES
    assert compiled[count:] == []


def test_launches_on_one_rank_are_three_forward_three_backward_and_one_update(launched):
    launched, _ = launched
    x = batch(12, torch.contiguous_format)
    weights = [torch.ones(24) for _ in range(3)]
    _, moments = kernels.normalize_batch(x, None, (4, 4, 4), 3, weights, [], 1e-5)
    kernels.grad_batch(x, x, None, (4, 4, 4), moments, weights, 1e-5)
    means, variances = torch.zeros(3, 24), torch.ones(3, 24)
    kernels.update_running_stats([*means], [*variances], [], 0.1, moments)
    order = ["sums_kernel", "total_kernel", "apply_kernel"]
    assert [name for name, _ in launched] == [*order, *order, "running_kernel"]


@pytest.mark.parametrize("momentum", [0.1, 0, 1, None])
def test_launches_take_any_momentum_and_do_not_compile_for_it(launched, momentum):
    _, compiled = launched
    statistics = [torch.zeros(5) for _ in range(4)]
    moments = torch.zeros(2, 11, dtype=torch.float64)
    for number in (momentum, momentum and momentum / 3):
        state = statistics[:2], statistics[2:], [torch.tensor(1)] * 2
        kernels.update_running_stats(*state, number, moments)
    assert compiled == ["running_kernel"]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc, as Triton's launcher does")
def test_launchers_in_c_are_right_for_our_arguments(launches, tmp_path):
    """Triton writes a C function for each signature: tuples of pointers and numbers, a double."""
    include = os.path.join(os.path.dirname(nvidia.__file__), "include")
    python = sysconfig.get_paths()["include"]
    if not os.path.exists(os.path.join(python, "Python.h")):
        pytest.skip("needs Python.h, as Triton's launcher does")
    for splits in SPLITS.values():
        train(batch(12, torch.contiguous_format), splits, 3)
    sources = set()
    for kernel, _, arguments in distinct(launches):
        compiled = compile_for(TARGETS["sm_90"], kernel, arguments)
        constants = {
            (kernel.arg_names.index(name),) if isinstance(name, str) else name: value
            for name, value in compiled.src.constants.items()
        }
        signature = dict(compiled.src.signature.items())
        sources.add(nvidia.make_launcher(constants, signature, None))
    assert len(sources) > 5
    for source in sources:
        (tmp_path / "launcher.c").write_text(source)
        command = ["gcc", "-fsyntax-only", "-Werror=incompatible-pointer-types", "launcher.c"]
        folders = [f"-I{folder}" for folder in (include, python)]
        done = subprocess.run(
            [*command, *folders], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

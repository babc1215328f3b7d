"""torch.compile: one graph, the same numbers, the same messages, few recompilations."""

import contextlib
import copy
import shutil

import pytest
import torch
import torch._dynamo.testing
from compiled import COMPILED
from ranks import run_ranks
from torch import nn
from torch._inductor import metrics
from torch._inductor.utils import run_and_get_code

from sync_splitbn import (
    SyncSplitBatchNorm,
    _kernels,
    assign_splits,
    convert_sync_split_batchnorm,
    revert_sync_split_batchnorm,
    sync_split_batch_norm,
)

# The first compilation of a process takes half a minute on two slow cores.
pytestmark = [
    pytest.mark.timeout(240),
    # torch's compiler uses what torch deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SECONDS = 200


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def no_loops(x):
    """Stand for `_kernels.default_unavailable`, so that ATen is traced, as it is on a GPU."""
    return "the loops are left out"


def model_of(seed=0, **options):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 1),
        SyncSplitBatchNorm(4, **options),
        nn.ReLU(),
        nn.Conv2d(4, 5, 1),
        SyncSplitBatchNorm(5, **options),
    )


def compare(compiled, eager, parts, x, dy, **assigned):
    """One step of both; `parts` are the modules whose gradients and buffers are compared."""
    leaves = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = []
    for module, part, leaf in zip((compiled, eager), parts, leaves, strict=True):
        part.zero_grad()
        with assign_splits(part, **assigned) if assigned else contextlib.nullcontext():
            outputs.append(module(leaf))
        outputs[-1].backward(dy)
    close = {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(*outputs, **close)
    torch.testing.assert_close(*(leaf.grad for leaf in leaves), **close)
    for (name, a), b in zip(parts[0].named_parameters(), parts[1].parameters(), strict=True):
        # A bias before a batch norm has no gradient but rounding.
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3, msg=name)
    for (name, a), b in zip(parts[0].named_buffers(), parts[1].buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def compiled_ranks(rank, world_size, backend, kernels):
    """Train compiled and eager side by side on this rank's data, over changing batch sizes."""
    report = {}
    if kernels == "aten":
        _kernels.default_unavailable = no_loops
    for options in ({}, {"momentum": None, "num_splits": 3}, {"track_running_stats": False}):
        torch._dynamo.reset()
        eager = model_of(**options)
        part = copy.deepcopy(eager)
        counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
        compiled = torch.compile(part, fullgraph=True, backend=counter)
        torch.manual_seed(10 + rank)
        # Up to 15 rows: at 16 the convolution itself asks for another graph.
        for rows in (n * options.get("num_splits", 2) for n in (2, 2, 3, 4, 5)):
            x, dy = torch.randn(rows, 3, 2, 2), torch.randn(rows, 5, 2, 2)
            compare(compiled, eager, (part, eager), x, dy)
        report[str(options)] = counter.frame_count
        if backend == "inductor" and not options:
            break
    compiled(x)
    forward, y = collectives_of(compiled, x)
    backward, _ = collectives_of(y.sum().backward)
    part.eval()
    with torch.no_grad():
        quiet, y = collectives_of(compiled, x)
    torch.testing.assert_close(y, part(x), rtol=1e-4, atol=1e-4)
    return report, (forward, backward, quiet)


def collectives_of(call, *args):
    """Count the messages of a call as the process group saw them, whoever sent them."""
    with torch.profiler.profile() as profile:
        result = call(*args)
    return sum(event.name.startswith("gloo:") for event in profile.events()), result


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="inductor needs a C++ compiler",
)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
@pytest.mark.parametrize("kernels", ["default", "aten"])
def test_compiled_model_equals_eager_on_every_rank(kernels, backend, tmp_path):
    """Compiled parameter gradients came back as sums over ranks elsewhere."""
    arguments = compiled_ranks, 2, tmp_path, backend, kernels
    for frames, messages in run_ranks(*arguments, seconds=SECONDS):
        assert messages == (2, 2, 0), "one all_reduce per layer and direction, none in evaluation"
        assert all(count <= 2 for count in frames.values()), frames


WAYS = {
    "sizes": lambda step, rows: {"sizes": (step % 4 + 1, rows - step % 4 - 1)},
    "only": lambda step, rows: {"only": step % 2},
    "index": lambda step, rows: {"index": torch.arange(rows) * (step + 1) % 2},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", WAYS)
def test_changing_assignments_recompile_a_bounded_number_of_times(how, training):
    eager = model_of().train(training)
    part = copy.deepcopy(eager)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(part, fullgraph=True, backend=counter)
    for step in range(12):
        rows = 6 + 2 * (step % 3)
        x, dy = torch.randn(rows, 3, 2, 2), torch.randn(rows, 5, 2, 2)
        compare(compiled, eager, (part, eager), x, dy, **WAYS[how](step, rows))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("sizes", [(2, 3), (4, 4)])
def test_compiled_sizes_that_do_not_fit_are_refused(sizes):
    compiled = torch.compile(layer := SyncSplitBatchNorm(3), backend="aot_eager")
    with assign_splits(layer, sizes=(2, 4)):
        compiled(torch.randn(6, 3))
    # Now that the layer is known to be compiled, sizes are a tensor of the graph.
    with assign_splits(layer, sizes=sizes), pytest.raises(RuntimeError, match="must sum to"):
        compiled(torch.randn(6, 3))


def test_first_compiled_sizes_that_do_not_fit_are_refused():
    compiled = torch.compile(layer := SyncSplitBatchNorm(3), backend="aot_eager")
    with assign_splits(layer, sizes=(2, 3)), pytest.raises(ValueError, match="must sum to"):
        compiled(torch.randn(6, 3))


def test_reverted_layer_keeps_nothing_of_its_compilation():
    layer = convert_sync_split_batchnorm(nn.BatchNorm1d(3))
    torch.compile(layer, backend="eager")(torch.randn(4, 3))
    assert vars(layer)["_is_compiled"]
    # torch.compile leaves a mark of its own.
    left = vars(revert_sync_split_batchnorm(layer)).keys() - vars(nn.BatchNorm1d(3)).keys()
    assert left <= {"_is_torch_compile"}


def test_eager_sizes_make_no_tensor(monkeypatch):
    """It was pinned and copied to the device at each use, and read by compiled graphs alone."""
    layer = SyncSplitBatchNorm(3)
    monkeypatch.setattr(torch, "tensor", None)
    with assign_splits(layer, sizes=(2, 4)):
        layer(torch.randn(6, 3))


def test_compiled_index_out_of_range_is_refused():
    compiled = torch.compile(layer := SyncSplitBatchNorm(3), backend="aot_eager")
    with (
        assign_splits(layer, index=torch.arange(6)),
        pytest.raises(RuntimeError, match="splits from 0"),
    ):
        compiled(torch.randn(6, 3))


def both_ways_with_ddp(rank, world_size):
    torch.manual_seed(rank)
    data = [(torch.randn(rows, 3, 2, 2), torch.randn(rows, 5, 2, 2)) for rows in (4, 4, 6)]
    results = []
    for order in ("compile(DDP)", "DDP(compile)", "eager"):
        torch._dynamo.reset()
        model = model_of()
        ddp = nn.parallel.DistributedDataParallel
        if order == "compile(DDP)":
            wrapped = torch.compile(ddp(model), backend="aot_eager")
        elif order == "DDP(compile)":
            wrapped = ddp(torch.compile(model, backend="aot_eager", fullgraph=True))
        else:
            wrapped = ddp(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, dy in data:
            optimizer.zero_grad()
            with assign_splits(wrapped, sizes=(1 + rank, len(x) - 1 - rank)):
                (wrapped(x) * dy).sum().backward()
            optimizer.step()
        results.append({name: value.clone() for name, value in model.state_dict().items()})
    for state in results[:2]:
        for name, value in state.items():
            torch.testing.assert_close(value, results[2][name], rtol=1e-4, atol=1e-4, msg=name)


def test_compiled_model_works_inside_ddp_and_around_it(tmp_path):
    run_ranks(both_ways_with_ddp, 2, tmp_path, seconds=SECONDS)


def generated_kernels(model, x):
    torch._dynamo.reset()
    metrics.reset()
    with torch.no_grad():
        torch.compile(model, fullgraph=True)(x)
    return metrics.generated_kernel_count


@needs_compiler
def test_inductor_fuses_what_follows_aten_kernels(monkeypatch):
    monkeypatch.setattr(_kernels, "default_unavailable", no_loops)
    x = torch.randn(6, 4, 5, 5)
    alone = generated_kernels(SyncSplitBatchNorm(4), x)
    assert alone > 0
    assert generated_kernels(nn.Sequential(SyncSplitBatchNorm(4), nn.ReLU()), x) == alone

    class Residual(nn.Sequential):
        def forward(self, x):
            return (super().forward(x) + x).relu()

    assert generated_kernels(Residual(SyncSplitBatchNorm(4)), x) == alone


@needs_compiler
@COMPILED
def test_compiled_graphs_on_a_cpu_call_the_loops():
    layer, x = SyncSplitBatchNorm(4), torch.randn(6, 4, 5, 5)
    with torch.no_grad():
        _, (code,) = run_and_get_code(torch.compile(layer, fullgraph=True), x)
    assert "sync_splitbn.normalize_batch" in code
    assert "sync_splitbn.update_running_stats" in code


@pytest.mark.parametrize("affine", ["own", "shared", "none"])
@pytest.mark.parametrize("num_splits", [1, 2, 3])
def test_forward_without_gradients_compiles_to_one_graph(num_splits, affine):
    """With one split, Dynamo took the arguments for one fewer, and broke the graph."""
    options = {"affine": affine != "none", "share_affine": affine == "shared"}
    layer = SyncSplitBatchNorm(4, num_splits=num_splits, **options)
    twin, x = copy.deepcopy(layer), torch.randn(6, 4, 3, 3)
    with torch.no_grad():
        y = torch.compile(layer, backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(y, twin(x))
    for (name, a), b in zip(layer.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_functional_compiles_to_one_graph():
    def operation(x, weight):
        return sync_split_batch_norm(x, 2, weight)[0].relu()

    x, weight = torch.randn(4, 3), torch.rand(2, 3)
    compiled = torch.compile(operation, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), operation(x, weight))

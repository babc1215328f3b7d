"""What only a GPU can show: no host sync, graph capture, half precision, gloo on CUDA tensors."""

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn

from sync_splitbn import (
    SyncSplitBatchNorm,
    _kernels,
    assign_splits,
    convert_sync_split_batchnorm,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(240),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def nccl(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture(params=["default", "aten"])
def kernels(request, monkeypatch):
    """Run a test with the kernels that serve here by default, and with ATen's."""
    if request.param == "aten":
        monkeypatch.setattr(_kernels, "default_unavailable", lambda x: "not in this test")


def model_of(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    return convert_sync_split_batchnorm(model, 2).cuda().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gpu_equals_cpu_in_float64(dtype, memory_format, kernels):
    layer = SyncSplitBatchNorm(8).cuda()
    truth = copy.deepcopy(layer).cpu().double()
    x = torch.randn(6, 8, 5, 5, device="cuda").to(dtype).contiguous(memory_format=memory_format)
    dy = torch.randn_like(x)
    wide = x.double().cpu().requires_grad_()
    x.requires_grad_()
    y, expected = layer(x), truth(wide)
    y.backward(dy)
    expected.backward(dy.double().cpu())
    tolerance = 4 * torch.finfo(dtype).eps if dtype.itemsize < 4 else 1e-5
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    for a, b in ((y, expected), (x.grad, wide.grad)):
        torch.testing.assert_close(a.double().cpu(), b, rtol=tolerance, atol=tolerance)
    for a, b in zip(layer.state_dict().values(), truth.state_dict().values(), strict=True):
        torch.testing.assert_close(a.double().cpu(), b.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["default", "sizes", "only", "index"])
def test_training_step_does_not_synchronize_with_the_host(how, nccl, kernels):
    model = model_of()
    x = torch.randn(6, 3, 5, 5, device="cuda")
    index = torch.tensor([0, 1, 1, 0, 1, 0], device="cuda")
    ways = {"sizes": {"sizes": (1, 5)}, "only": {"only": 1}, "index": {"index": index}}
    model(x).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        if how == "default":
            model(x).sum().backward()
        else:
            with assign_splits(model, **ways[how]):
                model(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_training_step_is_captured_and_replayed(nccl, kernels):
    model, twin = model_of(), model_of()
    static = torch.randn(6, 3, 5, 5, device="cuda")
    data = torch.randn(3, 6, 3, 5, 5, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(static).square().sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    model.load_state_dict(twin.state_dict())
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(static).square().sum().backward()
    model.load_state_dict(twin.state_dict())
    for x in data:
        static.copy_(x)
        graph.replay()
        twin.zero_grad()
        twin(x).square().sum().backward()
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_training_in_autocast_equals_eager(nccl):
    model, twin = model_of(), model_of()
    compiled = torch.compile(model, fullgraph=True)
    for rows in (4, 4, 6, 8):
        x = torch.randn(rows, 3, 5, 5, device="cuda")
        for module in (compiled, twin):
            with torch.autocast("cuda", torch.float16):
                y = module(x)
            y.float().square().sum().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=2e-2, atol=2e-2)
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def gloo_on_one_gpu(rank, world_size):
    layer = SyncSplitBatchNorm(5).cuda()
    torch.manual_seed(rank)
    x = torch.randn(4 + 2 * rank, 5, 3, device="cuda", requires_grad=True)
    layer(x).square().sum().backward()
    return x.detach().cpu(), layer.running_mean.cpu(), layer.aux_bn[0].running_mean.cpu()


def test_two_gloo_ranks_share_one_gpu(tmp_path):
    ranks = run_ranks(gloo_on_one_gpu, 2, tmp_path, seconds=120)
    for s in range(2):
        rows = torch.cat([x.chunk(2)[s] for x, *_ in ranks])
        for _, *means in ranks:
            torch.testing.assert_close(means[s], 0.1 * rows.mean((0, 2)))

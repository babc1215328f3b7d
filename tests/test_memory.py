"""The kernels read and write their own tensors alone: each lies amid poison, barely aligned."""

import contextlib
from itertools import chain

import pytest
import torch
from compiled import COMPILED, KERNELS

from sync_splitbn import SyncSplitBatchNorm, assign_splits
from sync_splitbn._kernels import aten, cpu

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(12, 1), (12, 3), (12, 37, 1), (12, 5, 7), (12, 9, 5, 5), (12, 130, 3), (12, 2, 43, 53)]
SIZES = (1, 8, 3)
INDEX = torch.tensor([2, 0, 1, 1, 0, 2, 2, 2, 0, 1, 1, 1])


EMPTY_LIKE, NEW_EMPTY = torch.empty_like, torch.Tensor.new_empty


class Poisoned:
    """Makes tensors inside larger allocations, as a context also the results of the kernels."""

    def __init__(self, guard=67):  # elements before and behind: odd, so that alignment is least
        self.guard = guard
        self.made = []

    def empty(self, shape, strides, dtype):
        count = torch.Size(shape).numel()
        poison = torch.nan if dtype.is_floating_point else 2**40 + 1
        memory = torch.full((count + 2 * self.guard,), poison, dtype=dtype)
        inside = slice(self.guard, self.guard + count)
        self.made.append((memory, memory.clone(), inside))
        return memory[inside].as_strided(shape, strides)

    def copy(self, tensor):
        """Copy a tensor without gaps, in its own layout."""
        return self.empty(tensor.shape, tensor.stride(), tensor.dtype).copy_(tensor)

    def __enter__(self):
        def empty_like(tensor, **options):
            strides = EMPTY_LIKE(tensor, device="meta", **options).stride()
            return self.empty(tensor.shape, strides, tensor.dtype)

        def new_empty(tensor, shape, dtype=None):
            strides = torch.empty(shape, device="meta").stride()
            return self.empty(shape, strides, dtype or tensor.dtype)

        torch.empty_like, torch.Tensor.new_empty = empty_like, new_empty
        return self

    def __exit__(self, *error):
        torch.empty_like, torch.Tensor.new_empty = EMPTY_LIKE, NEW_EMPTY

    def holds(self, tensor):
        address = tensor.untyped_storage().data_ptr()
        return any(memory.data_ptr() == address for memory, *_ in self.made)

    def check(self):
        for memory, before, inside in self.made:
            for part in (slice(0, inside.start), slice(inside.stop, None)):
                bits = memory[part].view(torch.uint8), before[part].view(torch.uint8)
                assert torch.equal(*bits), f"written beyond {inside} of {memory.dtype}"


def tensors_of(shape, dtype, last):
    torch.manual_seed(0)
    x, dy = (torch.randn(2, *shape) * 2 + 1).to(dtype)
    if last:
        x, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, dy))
    wide = torch.promote_types(dtype, torch.float32)
    state = [torch.rand(3, shape[1], dtype=wide).unbind() for _ in range(4)]
    return [x, dy, *(list(each) for each in state), list(torch.tensor([3, 1, 4]))]


def run(kernels, x, dy, rows, tensors, copy):
    """Return what each kernel makes of one batch, given and returned where `copy` puts it."""
    weights, biases, means, variances, counters = tensors
    sums = copy(kernels.sums(x, *rows, 3))
    moments = copy(kernels.moments(sums))
    y = kernels.normalize(x, *rows, moments, weights, biases, 1e-5)
    fused_y, fused_moments = kernels.normalize_batch(x, *rows, 3, weights, biases, 1e-5)
    grad_sums = copy(kernels.grad_sums(dy, x, *rows, moments, 1e-5))
    dx = kernels.grad_input(dy, x, *rows, moments, weights, 1e-5, grad_sums)
    fused_dx, fused_sums = kernels.grad_batch(dy, x, *rows, moments, weights, 1e-5)
    kernels.update_running_stats(means, variances, counters, 0.1, moments)
    results = [y, fused_y, dx, fused_dx, fused_moments, fused_sums, sums, moments]
    return results, [grad_sums, *means, *variances, *counters]


def check(kernels, shape, dtype, last, by_index, guard=67):
    x, dy, *state = tensors_of(shape, dtype, last)
    usual = [[t.clone() for t in each] for each in state]
    made = Poisoned(guard)
    state = [[made.copy(t) for t in each] for each in state]
    with made:
        rows = (made.copy(INDEX), None) if by_index else (None, SIZES)
        found = run(kernels, made.copy(x), made.copy(dy), rows, state, made.copy)
    made.check()
    rows = (INDEX, None) if by_index else (None, SIZES)
    plain = run(kernels, x, dy, rows, usual, lambda t: t)
    if kernels is cpu:
        assert all(made.holds(result) for result in found[0])
    for a, b in zip(chain(*found), chain(*plain), strict=True):
        assert a.isfinite().all()
        # ATen adds up in another order where memory is aligned otherwise.
        if kernels is cpu:
            assert a.equal(b)
        else:
            close = 2e-2 if a.dtype.itemsize == 2 else 1e-4
            torch.testing.assert_close(a, b, rtol=close, atol=close)


@pytest.mark.parametrize("by_index", [False, True], ids=["sizes", "index"])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernels", KERNELS)
def test_kernels_neither_read_nor_write_around_their_tensors(kernels, dtype, shape, last, by_index):
    check(kernels, shape, dtype, last, by_index)


@COMPILED
@pytest.mark.parametrize("threads", [2, 5])
def test_no_thread_reads_or_writes_around_its_tensors(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in ((12, 70, 7, 7), (12, 3, 47, 89), (12, 2100, 3), (12, 3001, 2)):
            for last in (False, True):
                check(cpu, shape, torch.float32, last, by_index=False)
                check(cpu, shape, torch.bfloat16, last, by_index=True)
    finally:
        torch.set_num_threads(before)


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
def test_stores_past_the_cache_stay_inside(last, dtype):
    """Of large results that are aligned to vectors; those that are not take another way."""
    rows = 2**24 // dtype.itemsize // (12 * 32 * 64) + 1
    for guard in (64, 65):
        check(cpu, (12, 32, rows, 64), dtype, last, by_index=False, guard=guard)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("how", ["sizes", "index"])
def test_training_step_of_a_layer_amid_poison_is_right(how, impl, monkeypatch):
    if impl is aten:
        monkeypatch.setattr("sync_splitbn._kernels.default_unavailable", lambda x: "not here")
    torch.manual_seed(0)
    x, dy = torch.randn(2, 12, 5, 3, 3)
    layers = [SyncSplitBatchNorm(5, num_splits=3) for _ in range(2)]
    made = Poisoned()
    for stats in (layers[0], *layers[0].aux_bn):
        for name, value in stats.named_parameters(recurse=False):
            setattr(stats, name, torch.nn.Parameter(made.copy(value.detach())))
        for name, value in stats.named_buffers(recurse=False):
            setattr(stats, name, made.copy(value))
    found = []
    for layer, copy in zip(layers, (made.copy, torch.clone), strict=True):
        leaf = copy(x).requires_grad_()
        amid = made if layer is layers[0] else contextlib.nullcontext()
        rows = {"sizes": SIZES} if how == "sizes" else {"index": copy(INDEX)}
        with amid, assign_splits(layer, **rows):
            layer(leaf).backward(copy(dy))
        gradients = [parameter.grad for parameter in layer.parameters()]
        found.append([leaf.grad, *gradients, *layer.buffers()])
    made.check()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

"""What plain batch norm refuses or survives, the layer must too: refused clearly, or right.

What might crash runs in a process of its own.
"""

import functools
import importlib
import multiprocessing
import pickle
import traceback
import warnings

import pytest
import ranks  # noqa: F401  # its preload list must not follow ours
import torch
from compiled import COMPILED, IMPLS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from sync_splitbn import (
    SyncSplitBatchNorm,
    _kernels,
    assign_splits,
    split_divergence,
    sync_split_batch_norm,
)

STATE = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
REFUSED = (RuntimeError, TypeError, ValueError, NotImplementedError)
ELSEWHERE = r"device|meta"
SECONDS = 100

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch.distributed", "torch._dynamo", "torch.fx.experimental.proxy_tensor", "pytest"]
)


def isolated(test):
    """Run a test in a process of its own: if that crashes, the test fails and no other."""

    @functools.wraps(test)
    def run(**arguments):
        here, there = _context.Pipe()
        call = (there, test.__module__.rpartition(".")[2], test.__name__, arguments)
        process = _context.Process(target=_child, args=call, daemon=True)
        process.start()
        there.close()
        try:
            assert here.poll(SECONDS), "no answer"
            error = pickle.loads(here.recv_bytes())
        except EOFError:
            process.join()
            pytest.fail(f"the process crashed with exit code {process.exitcode}")
        finally:
            process.kill()
            process.join()
        assert error is None, error

    return run


def _child(pipe, module, name, arguments):
    try:
        torch.set_num_threads(1)
        warnings.simplefilter("error")
        getattr(importlib.import_module(module), name).__wrapped__(**arguments)
        error = None
    except BaseException:
        error = traceback.format_exc()
    pipe.send_bytes(pickle.dumps(error))


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 8, 3, 4, 5, generator=generator).unbind()


def layer_of(impl=None):
    """Return a layer with parameters of its own in each split; `impl` only limits the default."""
    if impl == "aten":
        _kernels.default_unavailable = lambda x: "not in this test"
    layer, generator = SyncSplitBatchNorm(3), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return layer


def holder(layer, split):
    return layer if split == 0 else layer.aux_bn[split - 1]


def replace(layer, split, name, tensor):
    owner = holder(layer, split)
    if name in ("weight", "bias"):
        differentiable = tensor.is_floating_point() or tensor.is_complex()
        tensor = nn.Parameter(tensor, requires_grad=differentiable)
    setattr(owner, name, tensor)


def step(layer, x, dy):
    """Train on a batch; return its output and gradient."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad


def attempt(call):
    """Return the result of a call and None, or None and the message with which it was refused."""
    try:
        return call(), None
    except REFUSED as error:
        return None, str(error)


def snapshot(layer, but=()):
    """Copy the running statistics; `but` is a tensor that holds none to copy."""
    return [buffer.clone() for buffer in layer.buffers() if buffer is not but]


def definition(x, dy, weights, biases):
    """Output and gradient of a plain batch norm per chunk, in float64."""
    x = x.detach().double().requires_grad_()
    parameters = [
        (w.detach().double(), b.detach().double()) for w, b in zip(weights, biases, strict=True)
    ]
    chunks = x.chunk(2)
    y = torch.cat(
        [
            F.batch_norm(chunk, None, None, w, b, training=True)
            for chunk, (w, b) in zip(chunks, parameters, strict=True)
        ]
    )
    (dx,) = torch.autograd.grad(y, x, dy.double())
    return y.detach(), dx


def assert_right(found, layer, x, dy):
    """Compare the result of a step with the definition, and the running mean of split 1."""
    weights, biases = layer._parameters_by_split()
    for value, truth in zip(found, definition(x, dy, weights, biases), strict=False):
        tolerance = 1e-4 if value.dtype == torch.float32 else 3e-2
        torch.testing.assert_close(value.double(), truth, rtol=tolerance, atol=tolerance)


def assert_moved(layer, x, splits=(0, 1)):
    """The running statistics of a new layer are those of one step."""
    for split in splits:
        stats, chunk = holder(layer, split), x.chunk(2)[split].double()
        mean, var = 0.1 * chunk.mean((0, 2, 3)), 0.9 + 0.1 * chunk.var((0, 2, 3))
        tolerance = 1e-2 if stats.running_mean.dtype.itemsize == 2 else 1e-5
        for found, expected in ((stats.running_mean, mean), (stats.running_var, var)):
            torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("name", STATE)
@pytest.mark.parametrize("impl", IMPLS)
@isolated
def test_state_on_another_device_is_refused(impl, name, split):
    x, dy = batch()
    layer = layer_of(impl)
    elsewhere = getattr(holder(layer, split), name).detach().to("meta")
    path = name if split == 0 else f"aux_bn.0.{name}"
    before = snapshot(layer)
    with pytest.raises(REFUSED, match=ELSEWHERE):
        functional_call(layer, {path: elsewhere}, x)
    assert all(map(torch.equal, snapshot(layer), before))
    replace(layer, split, name, elsewhere)
    before = snapshot(layer, but=elsewhere)
    with pytest.raises(REFUSED, match=ELSEWHERE):
        step(layer, x, dy)
    assert all(map(torch.equal, snapshot(layer, but=elsewhere), before))
    if name != "num_batches_tracked":
        with pytest.raises(REFUSED, match=ELSEWHERE), assign_splits(layer, sizes=(4, 4)):
            layer.eval()(x)
        with pytest.raises(REFUSED, match=ELSEWHERE), assign_splits(layer, only=split):
            layer.eval()(x)


@pytest.mark.parametrize("impl", IMPLS)
@isolated
def test_layer_and_input_on_two_devices_are_refused(impl):
    x, dy = batch()
    for training in (True, False):
        for made, given in (("meta", "cpu"), ("cpu", "meta")):
            layer = layer_of(impl).to(made).train(training)
            with pytest.raises(REFUSED, match=ELSEWHERE):
                step(layer, x.to(given), dy.to(given))
    layer = layer_of(impl)
    y = layer(x.requires_grad_())
    with pytest.raises(REFUSED, match=ELSEWHERE):
        y.backward(dy.to("meta"))


@COMPILED
@pytest.mark.parametrize("left", [0, 8])
@pytest.mark.parametrize("name", STATE)
@isolated
def test_freed_state_is_refused(name, left):
    """ATen's operators crash or read what is not theirs here; the loops ask first."""
    x, dy = batch()
    for split in (0, 1):
        layer = layer_of()
        tensor = getattr(holder(layer, split), name).data
        tensor.untyped_storage().resize_(min(left, tensor.nbytes - 1))
        with pytest.raises(RuntimeError, match=f"{name} must have storage for its elements"):
            step(layer, x, dy)


@COMPILED
@pytest.mark.parametrize("left", [0, 4, 1900])
@pytest.mark.parametrize("what", ["x", "dy", "x before backward"])
@isolated
def test_freed_batch_is_refused(what, left):
    x, dy = batch()
    x, dy, layer = x.clone(), dy.clone(), layer_of()
    if what == "x before backward":
        y = layer(x.requires_grad_())
        x.untyped_storage().resize_(left)
        with pytest.raises(RuntimeError, match="x must have storage for its elements"):
            y.backward(dy)
    else:
        (x if what == "x" else dy).untyped_storage().resize_(left)
        with pytest.raises(RuntimeError, match=f"{what} must have storage for its elements"):
            step(layer, x, dy)


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("name", STATE)
@pytest.mark.parametrize("impl", IMPLS)
@isolated
def test_state_of_another_shape_is_refused_and_nothing_changes(impl, name, split):
    """One that is too short was written past its end, one of length 1 would broadcast."""
    x, dy = batch()
    shapes = [(2,), (5,), (1,), (0,), (3, 1), (1, 3)]
    for shape in [*shapes, *([] if name == "num_batches_tracked" else [()])]:
        layer = layer_of(impl)
        amiss = torch.ones(shape, dtype=getattr(layer, name).dtype)
        path = name if split == 0 else f"aux_bn.0.{name}"
        with pytest.raises(REFUSED, match=name):
            functional_call(layer, {path: amiss}, x)
        replace(layer, split, name, amiss)
        before = snapshot(layer)
        with pytest.raises(REFUSED, match=name):
            step(layer, x, dy)
        assert all(map(torch.equal, snapshot(layer), before)), shape
        if name != "num_batches_tracked":
            with pytest.raises(REFUSED), assign_splits(layer, sizes=(4, 4)):
                layer.eval()(x)


@pytest.mark.parametrize("impl", IMPLS)
@isolated
def test_states_of_length_one_in_all_splits_do_not_broadcast(impl):
    x, dy = batch()
    for names in (["running_mean", "running_var"], ["weight"], ["bias"], ["weight", "bias"]):
        layer = layer_of(impl)
        for name in names:
            for split in (0, 1):
                replace(layer, split, name, torch.ones(1))
        with pytest.raises(REFUSED, match=names[0]):
            step(layer, x, dy)
        with pytest.raises(REFUSED), assign_splits(layer, sizes=(4, 4)):
            layer.eval()(x)
        with pytest.raises(REFUSED):
            layer.eval()(x)


OTHER_DTYPES = [torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64]
FLOATING_DTYPES = [torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("impl", IMPLS)
@isolated
def test_running_statistics_are_of_any_floating_type_and_no_other(impl, name, split):
    """An integer would be rounded at every step, and a complex number lose a part."""
    x, dy = batch()
    for dtype in OTHER_DTYPES:
        layer = layer_of(impl)
        replace(layer, split, name, torch.ones(3).to(dtype))
        before = snapshot(layer)
        with pytest.raises(TypeError, match=r"must be .*, got torch\."):
            step(layer, x, dy)
        assert all(map(torch.equal, snapshot(layer), before)), dtype
    for dtype in FLOATING_DTYPES:
        layer = layer_of(impl)
        replace(layer, split, name, getattr(layer, name).to(dtype))
        assert_right(step(layer, x, dy), layer, x, dy)
        assert_moved(layer, x, splits=[1 - split])
        found, twin = getattr(holder(layer, split), name), layer_of(impl)
        assert found.dtype == dtype
        twin(x)
        expected = getattr(holder(twin, split), name).to(dtype)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("impl", IMPLS)
@isolated
def test_parameters_of_another_type_are_right_or_refused(impl, name, split):
    x, dy = batch()
    for dtype in OTHER_DTYPES + FLOATING_DTYPES:
        layer = layer_of(impl)
        replace(layer, split, name, torch.tensor([1, 0, 1]).to(dtype))
        found, refusal = attempt(lambda layer=layer: step(layer, x, dy))
        if refusal is None:
            assert not dtype.is_complex
            assert_right(found, layer, x, dy)
        else:
            assert dtype in OTHER_DTYPES, dtype
            assert refusal.startswith(name)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("impl", IMPLS)
@isolated
def test_counters_of_another_type_count_or_are_refused(impl, split, momentum):
    x, _ = batch()
    integers = [torch.int32, torch.int16, torch.uint8]
    for dtype in [*integers, torch.bool, torch.float32, torch.float16, torch.complex64]:
        layer = layer_of(impl)
        layer.momentum = momentum
        replace(layer, split, "num_batches_tracked", torch.ones((), dtype=dtype))
        before = snapshot(layer)
        _, refusal = attempt(lambda layer=layer: layer(x))
        if refusal is not None:
            assert dtype not in integers, dtype
            assert "num_batches_tracked" in refusal
            assert all(map(torch.equal, snapshot(layer), before)), dtype
        else:
            assert dtype != torch.bool
            counter = holder(layer, split).num_batches_tracked
            assert counter == 2
            assert counter.dtype == dtype
            mean = x.chunk(2)[split].mean((0, 2, 3)) * (0.1 if momentum else 0.5)
            torch.testing.assert_close(holder(layer, split).running_mean, mean)


UNUSUAL = {
    "zeros": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "negative": lambda t: torch._neg_view(-t),
    "conjugate": lambda t: torch.complex(t, -t).conj().imag,
    "copy on write": lambda t: torch._lazy_clone(t),
    "shared memory": lambda t: t.clone().share_memory_(),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[..., :1].clone().expand(t.shape),
    "inference": lambda t: torch.inference_mode()(torch.clone)(t),
}


@pytest.mark.parametrize("kind", [kind for kind in UNUSUAL if kind != "inference"])
@pytest.mark.parametrize("impl", IMPLS)
@isolated
def test_unusual_tensors_give_the_results_of_usual_ones(impl, kind):
    for what in ("x", "dy", "weight", "bias"):
        x, dy = batch()
        layer = layer_of(impl)
        if what in ("weight", "bias"):
            for split in (0, 1):
                replace(layer, split, what, UNUSUAL[kind](getattr(layer, what).detach()))
        x, dy = (UNUSUAL[kind](t) if what == name else t for name, t in (("x", x), ("dy", dy)))
        assert_right(step(layer, x, dy), layer, x, dy)
        assert_moved(layer, x)


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("impl", IMPLS)
@isolated
def test_unusual_running_statistics_are_updated_or_refused(impl, kind):
    """Plain batch norm leaves a negative view and the zeros as they are, without a word."""
    x, dy = batch()
    for name in STATE[2:]:
        if kind in ("negative", "conjugate", "expanded") and name == "num_batches_tracked":
            continue
        layer = layer_of(impl)
        old = getattr(layer, name)
        before = old.clone()
        replace(layer, 1, name, UNUSUAL[kind](old))
        _, refusal = attempt(lambda layer=layer: step(layer, x, dy))
        if refusal is None:
            assert_moved(layer, x)
            assert layer.aux_bn[0].num_batches_tracked == 1
            assert not old.equal(before), "split 0 must have its own update"
        else:
            assert kind in ("zeros", "negative", "conjugate", "expanded", "inference"), kind


@pytest.mark.parametrize("impl", IMPLS)
@isolated
def test_read_only_memory_is_read_alone(impl, tmp_path):
    x, dy = batch()
    layer = layer_of(impl)
    path = str(tmp_path / "batch")
    torch.stack([x, dy]).numpy().tofile(path)
    mapped = torch.from_file(path, shared=False, size=2 * x.numel()).view(2, *x.shape)
    assert_right(step(layer, *mapped), layer, x, dy)
    buffer = (bytes(x.numpy().tobytes()), bytes(dy.numpy().tobytes()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that such memory must not be written
        frozen = [torch.frombuffer(each, dtype=torch.float32).view(x.shape) for each in buffer]
    assert_right(step(layer_of(impl), *frozen), layer, x, dy)


@pytest.mark.parametrize("impl", IMPLS)
@isolated
def test_tensors_made_in_inference_mode_train_outside_as_constants(impl):
    x, _ = batch()
    with torch.inference_mode():
        layer, given = layer_of(impl), x.clone()
        inside = layer(given)
    assert_moved(layer, x)
    twin = layer_of(impl)
    with torch.no_grad():
        assert twin(given).equal(inside.clone())


@pytest.mark.parametrize("impl", IMPLS)
@isolated
def test_layouts_other_than_strided_are_refused(impl):
    """mkldnn input trains a plain batch norm; here it is refused by name."""
    warnings.simplefilter("ignore")
    x, dy = batch()
    others = {
        "sparse": x.to_sparse(),
        "csr": x[:, :, 0, 0].to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
        "mkldnn": x.to_mkldnn(),
        "jagged": torch.nested.nested_tensor(list(x), layout=torch.jagged),
    }
    for name, other in others.items():
        with pytest.raises(REFUSED):
            layer_of(impl)(other)
        if name in ("sparse", "mkldnn"):
            layer = layer_of(impl)
            y = layer(x.clone().requires_grad_())
            with pytest.raises(REFUSED):
                y.backward(dy.to_sparse() if name == "sparse" else dy.to_mkldnn())


@COMPILED
@isolated
def test_state_in_layouts_other_than_strided_is_refused():
    x, dy = batch()
    for name in STATE[:4]:
        for convert in (torch.Tensor.to_sparse, torch.Tensor.to_mkldnn):
            layer = layer_of()
            replace(layer, 1, name, convert(getattr(layer, name).detach()))
            with pytest.raises(REFUSED):
                step(layer, x, dy)


@pytest.mark.parametrize("of_input", [True, False])
@pytest.mark.parametrize("impl", IMPLS)
@isolated
def test_batched_gradients_equal_one_after_the_other(impl, of_input):
    x, _ = batch()
    layer = layer_of(impl)
    y = layer(x.requires_grad_(of_input))
    leaves = [x, *layer.parameters()] if of_input else [*layer.parameters()]
    upstream = torch.randn(5, *y.shape)
    one_by_one = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in upstream]
    expected = [torch.stack(parts) for parts in zip(*one_by_one, strict=True)]
    batched = functools.partial(torch.autograd.grad, y, leaves, retain_graph=True)
    for found in (
        batched(upstream, is_grads_batched=True),
        torch.vmap(batched)(upstream),
        torch.vmap(batched, in_dims=1)(upstream.movedim(0, 1)),
    ):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
@isolated
def test_vectorized_jacobian_and_hessian_equal_plain_ones(impl):
    layer, x = layer_of(impl).double(), torch.randn(4, 3, 2, dtype=torch.float64)
    for of, function in (
        (torch.autograd.functional.jacobian, layer),
        (torch.autograd.functional.hessian, lambda x: layer(x).tanh().sum()),
    ):
        torch.testing.assert_close(of(function, x, vectorize=True), of(function, x))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("impl", IMPLS)
@isolated
def test_traced_graph_gives_right_numbers_on_other_data(impl, mode):
    """A graph of `empty_like` alone returned memory that nobody had written."""
    layer = layer_of(impl)

    def training_step(x, dy):
        x = x.detach().requires_grad_()
        y = layer(x)
        (dx,) = torch.autograd.grad(y, x, dy)
        return y.detach(), dx

    graph = make_fx(training_step, tracing_mode=mode, _allow_non_fake_inputs=True)(*batch(0))
    layer.reset_running_stats()
    x, dy = batch(1)
    assert_right(graph(x, dy), layer, x, dy)
    assert_moved(layer, x)
    assert layer.num_batches_tracked == layer.aux_bn[0].num_batches_tracked == 1


@pytest.mark.parametrize("impl", IMPLS)
@isolated
def test_tracing_an_index_is_right_or_refused(impl):
    layer, (x, dy) = layer_of(impl), batch(1)

    def normalize(x, index):
        with assign_splits(layer, index=index):
            return layer(x)

    index = torch.arange(8) % 2
    for mode in ("real", "fake", "symbolic"):
        trace = make_fx(normalize, tracing_mode=mode, _allow_non_fake_inputs=True)
        graph, refusal = attempt(lambda trace=trace: trace(x, index))
        if refusal is None:
            order = index.flip(0).argsort(stable=True)
            found = graph(x, index.flip(0))[order].detach()
            expected = definition(x[order], dy, *layer._parameters_by_split())[0]
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
        else:
            assert "data-dependent" in refusal


@pytest.mark.parametrize("impl", IMPLS)
@isolated
def test_fake_tensors_have_the_form_of_real_ones(impl):
    x, dy = batch()
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, dy)]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for given in ((x, dy), last):
        layer = layer_of(impl)
        real = step(layer, *given)
        fakes = [mode.from_tensor(t) for t in given]
        before = snapshot(layer)
        with mode:
            inside = step(layer, *fakes)
        for found in (inside, step(layer, *fakes)):
            for a, b in zip(found, real, strict=True):
                assert isinstance(a, FakeTensor)
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert all(map(torch.equal, snapshot(layer), before)), "a fake batch moved real statistics"


@pytest.mark.parametrize("impl", IMPLS)
@isolated
def test_real_tensors_under_a_fake_mode_become_fake_or_are_refused(impl):
    x, dy = batch()
    layer = layer_of(impl)
    before = snapshot(layer)
    with FakeTensorMode(allow_non_fake_inputs=True):
        y, dx = step(layer, x, dy)
    assert isinstance(y, FakeTensor)
    assert isinstance(dx, FakeTensor)
    assert y.shape == dx.shape == x.shape
    with (
        FakeTensorMode(),
        pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"),
    ):
        layer(x)
    assert all(map(torch.equal, snapshot(layer), before))


@pytest.mark.parametrize("name", STATE)
@pytest.mark.parametrize("impl", IMPLS)
@isolated
def test_one_fake_tensor_among_real_ones_makes_no_real_number(impl, name):
    x, dy = batch()
    mode, moved = FakeTensorMode(allow_non_fake_inputs=True), layer_of(impl)
    step(moved, x, dy)
    for split in (0, 1):
        layer = layer_of(impl)
        before = snapshot(layer)
        replace(layer, split, name, mode.from_tensor(getattr(layer, name).detach()))
        y, _ = step(layer, x, dy)
        if name in ("weight", "bias"):
            assert isinstance(y, FakeTensor)
        else:
            assert_right((y,), layer, x, dy)
            for found, old, new in zip(layer.buffers(), before, snapshot(moved), strict=True):
                assert isinstance(found, FakeTensor) or found.equal(old) or found.equal(new)
    layer = layer_of(impl)
    y = layer(x.requires_grad_())
    (dx,) = torch.autograd.grad(y, x, mode.from_tensor(dy))
    assert isinstance(dx, FakeTensor)


class Logged(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Doubled(TorchDispatchMode):
    """Doubles what the operation is given."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name().endswith(("::normalize_batch", "::grad_batch")):
            args = (2 * args[0], *args[1:])
        return function(*args, **(kwargs or {}))


class Seen(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("impl", IMPLS)
@isolated
def test_modes_see_the_operation(impl):
    x, dy = batch()
    layer = layer_of(impl)
    with Logged() as log, Seen():
        found = step(layer, x, dy)
    assert_right(found, layer, x, dy)
    assert_moved(layer, x)
    own = [name.split(".")[1] for name in log.names if name.startswith("sync_splitbn")]
    assert own == (
        [] if impl == "aten" else ["normalize_batch", "update_running_stats", "grad_batch"]
    )


@COMPILED
@isolated
def test_mode_replaces_what_the_operation_is_given():
    x, dy = batch()
    layer = layer_of()
    with Doubled():
        y, dx = step(layer, x, dy)
    expected, _ = definition(2 * x, dy, *layer._parameters_by_split())
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    twin = layer_of()
    leaf = x.clone().requires_grad_()
    (twice,) = torch.autograd.grad(twin(2 * leaf), leaf, 2 * dy)
    assert dx.isfinite().all()
    assert twice.isfinite().all()


@COMPILED
@isolated
def test_functionalized_update_writes_what_the_plain_one_writes():
    """Ahead-of-time autograd turns it into a function without effects, and copies back."""
    warnings.simplefilter("ignore", DeprecationWarning)
    values = torch.tensor([[2.0, 3.0, 4.0, 9.0, 4.0]] * 2).double()
    given = [*torch.rand(2, 2, 2), torch.zeros(2, dtype=torch.int64)]
    results = []

    def update(means, variances, counters):
        lists = [list(each.unbind()) for each in (means, variances, counters)]
        torch.ops.sync_splitbn.update_running_stats(*lists, 0.5, values)
        return means + 1

    for function in (update, torch.compile(update, backend="aot_eager", fullgraph=True)):
        state = [t.clone() for t in given]
        results.append([*state, function(*state)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert results[1][2].tolist() == [1, 1]
    with pytest.raises(RuntimeError, match="alias annotations"):
        torch.func.functionalize(update)(*given)


@pytest.mark.parametrize("impl", IMPLS)
@isolated
def test_functorch_transforms_are_refused(impl):
    x, _ = batch()
    layer = layer_of(impl)
    for transform in (torch.func.functionalize, torch.vmap, lambda f: torch.func.jacrev(f)):
        with pytest.raises(RuntimeError, match="setup_context"):
            transform(layer)(x if transform is not torch.vmap else torch.stack([x, x]))


class Plain(torch.Tensor):
    pass


class Wrapper(torch.Tensor):
    """Holds another tensor, and no storage of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        result = function(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs or {}))
        if function._schema.name == "sync_splitbn::update_running_stats":
            return None
        return tree_map(lambda t: cls(t) if isinstance(t, torch.Tensor) else t, result)


def unwrapped(tensor):
    return tensor.inner if isinstance(tensor, Wrapper) else tensor


@pytest.mark.parametrize("what", ["all", "x", "dy", "weight", "bias", *STATE[2:]])
@pytest.mark.parametrize("impl", IMPLS)
@isolated
def test_subclasses_give_the_results_of_plain_tensors(impl, what):
    x, dy = batch()
    for subclass in (Plain, Wrapper):
        make = (lambda t: t.as_subclass(Plain)) if subclass is Plain else Wrapper
        layer = layer_of(impl)
        for split in (0, 1):
            for name in STATE:
                if what in (name, "all"):
                    replace(layer, split, name, make(getattr(holder(layer, split), name).detach()))
        given = [make(t) if what in (name, "all") else t for name, t in (("x", x), ("dy", dy))]
        found = [unwrapped(t).detach().as_subclass(torch.Tensor) for t in step(layer, *given)]
        plain = layer_of(impl)
        assert_right(found, plain, x, dy)
        for name, value in layer.named_buffers():
            owner, _, leaf = name.rpartition(".")
            setattr(plain.get_submodule(owner), leaf, unwrapped(value).as_subclass(torch.Tensor))
        assert_moved(plain, x)


INDICES = {
    "int32": lambda ids: ids.int(),
    "uint8": lambda ids: ids.byte(),
    "column": lambda ids: torch.stack([ids, ids + 5], 1)[:, 0],
    "reversed": lambda ids: ids.flip(0)[torch.arange(7, -1, -1)],
    "copy on write": lambda ids: torch._lazy_clone(ids),
    "shared memory": lambda ids: ids.clone().share_memory_(),
    "subclass": lambda ids: ids.as_subclass(Plain),
    "wrapper": lambda ids: Wrapper(ids),
}


@pytest.mark.parametrize("kind", INDICES)
@pytest.mark.parametrize("impl", IMPLS)
@isolated
def test_unusual_index_gives_the_results_of_a_usual_one(impl, kind):
    x, dy = batch()
    ids = torch.arange(8) // 4
    layer = layer_of(impl)
    with assign_splits(layer, index=INDICES[kind](ids)):
        found = step(layer, x, dy)
    assert_right([unwrapped(t) for t in found], layer, x, dy)


@pytest.mark.parametrize("impl", IMPLS)
@isolated
def test_index_that_is_amiss_is_refused(impl):
    x, dy = batch()
    good = torch.arange(8) // 4
    amiss = {
        "too large": good + 1,
        "far too large": good + 2**40,
        "negative": good - 1,
        "smallest": torch.full((8,), -(2**63)),
        "on meta": good.to("meta"),
        "short": good[:7],
        "long": torch.cat([good, good]),
        "scalar": good[0],
        "of two dimensions": good.view(8, 1),
        "zeros": torch._efficientzerotensor(7, dtype=torch.int64),
        "floating": good.float(),
        "sparse": good.to_sparse(),
    }
    for name, index in amiss.items():
        layer = layer_of(impl)
        before = snapshot(layer)
        with pytest.raises(REFUSED), assign_splits(layer, index=index):
            step(layer, x, dy)
        assert all(map(torch.equal, snapshot(layer), before)), name


@COMPILED
@isolated
def test_index_that_changes_after_its_check_is_checked_again():
    """The function asks first, for every kernel; the loops ask of what they use."""
    x, _ = batch()
    for wrong in (2, -1, 2**40):
        index = torch.full((8,), wrong)
        with pytest.raises(ValueError, match="index must hold splits"):
            torch.ops.sync_splitbn.sums(x, index, None, 2)
    for sizes in ((4, 3), (4, 5), (9, -1), (4, 4, 4)):
        with pytest.raises((ValueError, RuntimeError)):
            torch.ops.sync_splitbn.sums(x, None, sizes, 2)


@pytest.mark.parametrize("impl", IMPLS)
@isolated
def test_memory_filled_before_use_is_all_written(impl):
    """Deterministic mode fills new memory with NaN: no result may hold any."""
    x, dy = batch()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    for given in ((x, dy), [t.contiguous(memory_format=torch.channels_last) for t in (x, dy)]):
        for rows in ({"sizes": (4, 4)}, {"index": torch.arange(8) // 4}):
            layer = layer_of(impl)
            with assign_splits(layer, **rows):
                found = step(layer, *given)
            assert_right(found, layer, x, dy)
            assert_moved(layer, x)


def arguments_of_operators():
    """Arguments of each operator, with sizes and with an index."""
    x, dy = batch()
    weights, biases = ([*torch.rand(2, 3)] for _ in range(2))
    ops = torch.ops.sync_splitbn
    for rows in ((None, [3, 5]), (torch.arange(8) % 2, None)):
        sums = ops.sums(x, *rows, 2)
        moments = ops.moments(sums)
        local = ops.grad_sums(dy, x, *rows, moments, 1e-5)
        yield "sums", (x, *rows, 2)
        yield "moments", (sums,)
        yield "normalize", (x, *rows, moments, weights, biases, 1e-5)
        yield "normalize", (x.half(), *rows, moments, [], [], 1e-5)
        yield "normalize_batch", (x, *rows, 2, weights, biases, 1e-5)
        yield "grad_sums", (dy, x, *rows, moments, 1e-5)
        yield "grad_input", (dy, x, *rows, moments, weights, 1e-5, local)
        yield "grad_batch", (dy, x, *rows, moments, weights, 1e-5)
        running = [[*torch.rand(2, 3)], [*torch.rand(2, 3)], [*torch.zeros(2, dtype=torch.int64)]]
        yield "update_running_stats", (*running, 0.1, moments)
        yield "update_running_stats", (*running[:2], [], None, moments)


@COMPILED
def test_operators_pass_the_checks_of_torch_library():
    """Schema, fake tensors, autograd registration, and tracing ahead of time."""
    seen = set()
    for name, arguments in arguments_of_operators():
        seen.add(name)
        torch.library.opcheck(getattr(torch.ops.sync_splitbn, name).default, arguments)
    assert len(seen) == 8


@COMPILED
def test_operators_refuse_what_does_not_fit():
    """They are public to the process: whoever calls them gets an error, no crash."""
    x, dy = batch()
    ops, rows = torch.ops.sync_splitbn, (None, [4, 4])
    moments = ops.moments(ops.sums(x, *rows, 2))
    narrow, short = moments[:, :-2], moments[:1]
    weights = [torch.ones(3)] * 2
    local, last = torch.zeros(2, 6), x.contiguous(memory_format=torch.channels_last)
    for call in (
        lambda: ops.sums(x[0, 0, 0], *rows, 2),
        lambda: ops.sums(x.long(), *rows, 2),
        lambda: ops.sums(x, None, None, 2),
        lambda: ops.sums(x, torch.zeros(8, dtype=torch.int64), [4, 4], 2),
        lambda: ops.sums(x, *rows, -1),
        lambda: ops.sums(x, *rows, 2**40),
        lambda: ops.moments(moments[0]),
        lambda: ops.moments(moments.float()),
        lambda: ops.normalize(x, *rows, narrow, [], [], 1e-5),
        lambda: ops.normalize(x, *rows, short, [], [], 1e-5),
        lambda: ops.normalize(x, *rows, moments.float(), [], [], 1e-5),
        lambda: ops.normalize(x, *rows, moments, weights[:1], [], 1e-5),
        lambda: ops.normalize(x, *rows, moments, [torch.ones(2)] * 2, [], 1e-5),
        lambda: ops.normalize(x, *rows, moments, [torch.ones(3).double()] * 2, [], 1e-5),
        lambda: ops.normalize(x, *rows, moments, weights, [torch.ones(4)] * 2, 1e-5),
        lambda: ops.grad_sums(dy[:4], x, *rows, moments, 1e-5),
        lambda: ops.grad_sums(torch.ones(1, 1, 1, 1), last, *rows, moments, 1e-5),
        lambda: ops.grad_sums(dy.transpose(2, 3), x, *rows, moments, 1e-5),
        lambda: ops.grad_sums(dy, x, *rows, narrow, 1e-5),
        lambda: ops.grad_input(dy, x, *rows, moments, weights, 1e-5, local[:, :4]),
        lambda: ops.grad_input(dy, x, *rows, moments, weights, 1e-5, local.double()),
        lambda: ops.grad_input(dy, x, *rows, moments, weights, 1e-5, local[:1]),
        lambda: ops.grad_batch(dy, x, *rows, moments, weights[:1], 1e-5),
        lambda: ops.grad_batch(dy.to("meta"), x, *rows, moments, weights, 1e-5),
        lambda: ops.update_running_stats([], [], [], 0.1, moments),
        lambda: ops.update_running_stats(weights, weights[:1], [], 0.1, moments),
        lambda: ops.update_running_stats(weights, weights, [torch.tensor(1)], 0.1, moments),
        lambda: ops.update_running_stats(weights, weights, [], 0.1, narrow),
        lambda: ops.update_running_stats(weights, weights, [], 0.1, moments[0]),
    ):
        with pytest.raises((*REFUSED, AttributeError, IndexError)):
            call()


@pytest.mark.parametrize("kept_bytes", [0, 16])
@isolated
def test_index_without_its_storage_is_refused(kept_bytes):
    index = torch.zeros(8, dtype=torch.int64)
    index.untyped_storage().resize_(kept_bytes)
    with pytest.raises(RuntimeError, match="index must have storage for its 8 elements"):
        sync_split_batch_norm(torch.randn(8, 3), 2, index=index)


FREED = {
    "evaluation": lambda layer: layer.eval()(torch.randn(4, 3)),
    "evaluation by index": lambda layer: in_evaluation(layer, torch.tensor([0, 1, 0, 1])),
    "divergence": split_divergence,
    "divergence of a batch": lambda layer: split_divergence(layer, torch.randn(4, 3)),
}


def in_evaluation(layer, index):
    with assign_splits(layer.eval(), index=index):
        layer(torch.randn(4, 3))


@pytest.mark.parametrize(
    ("use", "name"),
    [
        (use, name)
        for use in FREED
        for name in ("weight", "running_mean", "running_var")
        if "divergence" not in use or name != "weight"
    ],
)
@isolated
def test_freed_state_is_refused_outside_of_training(use, name):
    layer = SyncSplitBatchNorm(3)
    getattr(layer, name).data.untyped_storage().resize_(4)
    with pytest.raises(RuntimeError, match="storage"):
        FREED[use](layer)


@isolated
def test_index_whose_end_lies_behind_its_storage_is_refused():
    index = torch.zeros(10, dtype=torch.int64)[2:]
    index.untyped_storage().resize_(64)
    with pytest.raises(RuntimeError, match="index must have storage for its 8 elements, got 64"):
        sync_split_batch_norm(torch.randn(8, 3), 2, index=index)


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize(
    "name", ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
)
def test_state_that_one_split_lacks_is_refused(name, split):
    """Where split 0 lacked it, that of the others was dropped without a word."""
    layer = SyncSplitBatchNorm(3)
    setattr(layer if split == 0 else layer.aux_bn[0], name, None)
    with pytest.raises(RuntimeError, match=f"{name} must be a tensor in every split or None"):
        layer(torch.randn(4, 3))


def test_missing_running_variances_are_refused():
    layer = SyncSplitBatchNorm(3)
    layer.running_var = layer.aux_bn[0].running_var = None
    with pytest.raises(RuntimeError, match="running_var must be a tensor where running_mean is"):
        layer(torch.randn(4, 3))


@COMPILED
def test_overlapping_running_statistics_are_refused_before_any_moves():
    layer = SyncSplitBatchNorm(3)
    layer.aux_bn[0].running_mean = torch.zeros(1).expand(3)
    with pytest.raises(RuntimeError, match="running_mean must not overlap itself in memory"):
        layer(torch.randn(4, 3))
    assert layer.num_batches_tracked == 0
    assert layer.running_mean.equal(torch.zeros(3))

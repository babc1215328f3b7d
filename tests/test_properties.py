"""Properties that must hold for every drawn case, whatever its ranks, splits, shapes and types.

Ranks are threads that meet in memory, for a sample of the cases real gloo ranks. Each property is
tried on 200 cases; `EXAMPLES=2000 pytest tests/test_properties.py` tries 2,000. A failure prints
the smallest case that fails, and how to run it again.
"""

import contextlib
import copy
import dataclasses
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import oracle
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch import Tensor, nn

from sync_splitbn import (
    SyncSplitBatchNorm,
    _collectives,
    assign_splits,
    convert_sync_split_batchnorm,
    revert_sync_split_batchnorm,
)

EXAMPLES = int(os.environ.get("EXAMPLES", "200"))
TRIED = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=False,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
SAMPLE = max(1, EXAMPLES // 5)  # cases for real ranks
pytestmark = pytest.mark.timeout(180 + EXAMPLES)

Account = dict[str, Tensor]  # results of a step by name
WIDE = {torch.bfloat16: torch.float32}  # what half precision is computed in
ROUNDINGS = 16  # of the widest operand: those behind each other, with room for sums


@pytest.fixture(autouse=True)
def _one_thread_a_rank() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Rows:
    """Rows of each split on one rank at one step, and how the layer is told."""

    sizes: tuple[int, ...]
    how: str


@dataclass(frozen=True)
class Case:
    """One layer, and what each rank feeds it at each step: `steps[step][rank]`."""

    steps: tuple[tuple[Rows, ...], ...]
    features: int
    positions: tuple[int, ...]
    dtype: torch.dtype
    parameter_dtype: torch.dtype
    layouts: tuple[str, str]  # of x and dy
    momentum: float | None
    eps: float
    affine: str
    tracked: bool
    mean: float
    std: float
    seed: int

    @property
    def ranks(self) -> int:
        return len(self.steps[0])

    @property
    def splits(self) -> int:
        return len(self.steps[0][0].sizes)


@dataclass(frozen=True)
class Batch:
    """The rows of all ranks, float64 but exact in the type of the case; split and rank of each."""

    x: Tensor
    dy: Tensor
    split: Tensor
    rank: Tensor
    how: tuple[str, ...]  # of each rank


@st.composite
def rows(draw: Any, splits: int) -> Rows:
    how = draw(st.sampled_from(["default", "sizes", "only", "index"]))
    count = st.sampled_from([0, 1, 2, 3, 4, 0, 1])  # what is special, more often
    if how == "default":
        return Rows((draw(count),) * splits, how)
    if how == "only":
        used, total = draw(st.integers(0, splits - 1)), draw(count)
        return Rows(tuple(total * (s == used) for s in range(splits)), how)
    return Rows(tuple(draw(count) for _ in range(splits)), how)


@st.composite
def cases(draw: Any, ranks: int | None = None) -> Case:
    ranks = ranks or draw(st.integers(1, 4))
    splits = draw(st.integers(1, 4))
    types = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
    layout = st.sampled_from(["contiguous", "channels last", "strided"])
    step = st.tuples(*[rows(splits)] * ranks)
    return Case(
        steps=tuple(draw(step) for _ in range(draw(st.integers(1, 2)))),
        features=draw(st.integers(1, 5)),
        positions=tuple(draw(st.integers(1, 3)) for _ in range(draw(st.integers(0, 3)))),
        dtype=draw(types),
        parameter_dtype=draw(types),
        layouts=(draw(layout), draw(layout)),
        momentum=draw(st.sampled_from([0.1, None, 0.0, 1.0]) | st.floats(0, 1)),
        eps=draw(st.sampled_from([1e-5, 1e-3, 0.5])),
        affine=draw(st.sampled_from(["affine", "shared", "no bias", "none"])),
        tracked=draw(st.sampled_from([True, True, True, False])),
        mean=draw(st.sampled_from([0.0, 3.0, -100.0])),
        std=draw(st.sampled_from([1.0, 0.0, 0.01, 30.0])),
        seed=draw(st.integers(0, 2**16)),
    )


def batches_of(case: Case) -> list[Batch]:
    generator = torch.Generator().manual_seed(case.seed)
    batches = []
    for step in case.steps:
        split = []
        for own in step:
            ids = torch.repeat_interleave(torch.tensor(own.sizes))
            if own.how == "index":
                ids = ids[torch.randperm(len(ids), generator=generator)]
            split.append(ids)
        rank = torch.repeat_interleave(torch.tensor([len(ids) for ids in split]))
        shape = (len(rank), case.features, *case.positions)
        x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        x = (x * case.std + case.mean).to(case.dtype).double()
        dy = dy.to(case.dtype).double()
        batches.append(Batch(x, dy, torch.cat(split), rank, tuple(own.how for own in step)))
    return batches


def initial_state(case: Case) -> oracle.State:
    state = oracle.State.initial(case.ranks, case.splits, case.features)
    for name in ("weight", "bias"):
        value = getattr(state, name).detach().to(case.parameter_dtype).double()
        if case.affine == "shared":
            value = value[:, :1].expand_as(value).clone()
        if case.affine == "none" or (case.affine, name) == ("no bias", "bias"):
            value = torch.full_like(value, float(name == "weight"))
        setattr(state, name, value.requires_grad_())
    return state


def layer_of(case: Case) -> SyncSplitBatchNorm:
    layer = SyncSplitBatchNorm(
        case.features,
        case.eps,
        case.momentum,
        affine=case.affine != "none",
        track_running_stats=case.tracked,
        num_splits=case.splits,
        dtype=case.parameter_dtype,
        share_affine=case.affine == "shared",
        bias=case.affine != "no bias",
    )
    state = initial_state(case)
    with torch.no_grad():
        for name in ("weight", "bias"):
            for s, parameter in enumerate(parameters_of(layer, name)):
                parameter.copy_(getattr(state, name)[0, s])
    return layer


def parameters_of(layer: SyncSplitBatchNorm, name: str) -> list[nn.Parameter]:
    """The parameter `name` of each split, one alone where it is shared, or none."""
    holders = (layer,) if layer.share_affine else (layer, *layer.aux_bn)
    return [p for holder in holders if (p := getattr(holder, name)) is not None]


def in_layout(tensor: Tensor, layout: str) -> Tensor:
    if layout == "channels last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1)[..., 0]
    return tensor.contiguous()


def assigned(layer: nn.Module, how: str, split: Tensor, splits: int) -> Any:
    if how == "sizes":
        return assign_splits(layer, sizes=torch.bincount(split, minlength=splits).tolist())
    if how == "only":
        return assign_splits(layer, only=int(split[0]) if len(split) else splits - 1)
    return assign_splits(layer, index=split) if how == "index" else contextlib.nullcontext()


def train(rank: int, case: Case, batches: list[Batch]) -> list[Account]:
    """What a rank has after each step."""
    layer, steps = layer_of(case), []
    for batch in batches:
        mine = batch.rank == rank
        x = in_layout(batch.x[mine].to(case.dtype), case.layouts[0]).requires_grad_()
        dy = in_layout(batch.dy[mine].to(case.dtype), case.layouts[1])
        layer.zero_grad()
        with assigned(layer, batch.how[rank], batch.split[mine], case.splits):
            y = layer(x)
        y.backward(dy)
        assert y.dtype == x.grad.dtype == case.dtype
        step = {"y": y.detach(), "dx": x.grad}
        for name in ("weight", "bias"):
            if grads := [parameter.grad for parameter in parameters_of(layer, name)]:
                step[f"d{name}"] = torch.stack(grads)
        if case.tracked:
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                buffers = [getattr(stats, name) for stats in (layer, *layer.aux_bn)]
                step[name] = torch.stack(buffers).clone()
        steps.append(step)
    return steps


class Threads:
    """Stands in for `torch.distributed` in the file that calls it: threads are the ranks."""

    GroupMember = SimpleNamespace(NON_GROUP_MEMBER=object())

    def __init__(self, ranks: int) -> None:
        self.ProcessGroup, self.group = Threads, SimpleNamespace(WORLD=self)
        self.sent: list[list[Tensor]] = [[] for _ in range(ranks)]
        self._barrier = threading.Barrier(ranks, timeout=60)
        self._own = threading.local()

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def get_world_size(self, group: Any) -> int:
        return len(self.sent)

    def all_reduce(self, packed: Tensor, group: Any) -> None:
        self.sent[self._own.rank].append(packed.clone())
        self._barrier.wait()
        together = [sent[-1] for sent in self.sent]
        assert len({(tensor.shape, tensor.dtype) for tensor in together}) == 1
        packed.copy_(torch.stack(together).sum(0))
        self._barrier.wait()

    def run(self, body: Callable[..., Any], *args: Any) -> list[Any]:
        """Return `body(rank, *args)` of every rank."""

        def as_rank(rank: int) -> Any:
            self._own.rank = rank
            try:
                return body(rank, *args)
            except BaseException:
                self._barrier.abort()
                raise

        with (
            patch.object(_collectives, "dist", self),
            ThreadPoolExecutor(len(self.sent)) as threads,
        ):
            running = [threads.submit(as_rank, rank) for rank in range(len(self.sent))]
        errors = [error for each in running if (error := each.exception()) is not None]
        # Of ranks that fail, those that waited for another do not know why.
        for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise error
        return [each.result() for each in running]


def together(batches: list[Batch], ranks: list[list[Account]]) -> list[Account]:
    """One account of all ranks: rows as in the batch, gradients [W, ...], buffers once."""
    account = []
    for batch, *steps in zip(batches, *ranks, strict=True):
        whole = {}
        for name, first in steps[0].items():
            values = [step[name] for step in steps]
            if name in ("y", "dx"):
                whole[name] = torch.empty(batch.x.shape, dtype=first.dtype)
                for rank, value in enumerate(values):
                    whole[name][batch.rank == rank] = value
            elif name in ("dweight", "dbias"):
                whole[name] = torch.stack(values)
            else:
                assert all(value.equal(first) for value in values), f"ranks differ in {name}"
                whole[name] = first
        account.append(whole)
    return account


def expected(case: Case, batches: list[Batch]) -> list[Account]:
    """The oracle's account."""
    state, account, largest = initial_state(case), [], torch.zeros(1)
    for name in ("running_mean", "running_var"):
        # Each by itself: autograd of one split refuses a change of another one's in place.
        setattr(state, name, [value.clone() for value in getattr(state, name)])
    for batch in batches:
        x = batch.x.clone().requires_grad_()
        y = oracle.forward(x, batch.split, batch.rank, state, eps=case.eps, momentum=case.momentum)
        # Without rows, x is not used.
        grads = torch.autograd.grad(
            y, (x, state.weight, state.bias), batch.dy, materialize_grads=True
        )
        step = dict(zip(("y", "dx", "dweight", "dbias"), (y.detach(), *grads), strict=True))
        for name in ("dweight", "dbias"):
            step[f"{name} terms"] = step[name].abs()
        if case.affine == "shared":
            for name in ("dweight", "dbias", "dweight terms", "dbias terms"):
                step[name] = step[name].sum(1, keepdim=True)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            step[name] = torch.stack([*getattr(state, name)])
        # Running statistics keep the errors of earlier batches.
        largest = torch.cat([largest, batch.x.abs().flatten()]).amax(0, keepdim=True)
        account.append(step | {"largest": largest})
    return account


def bounds(case: Case, batch: Batch, truth: Account) -> Account:
    """One rounding of each result, given how far x is from 0 in units of its deviation."""
    wide = torch.finfo(WIDE.get(case.dtype, case.dtype)).eps
    last, stored = torch.finfo(case.dtype).eps, torch.finfo(case.parameter_dtype).eps
    state = initial_state(case)
    weight = state.weight[0].abs().amax(0).view(-1, *(1 for _ in case.positions))
    dims = (0, *range(2, batch.x.dim()))
    error, slope = torch.zeros_like(batch.x), torch.zeros_like(batch.x)
    for s in range(case.splits):
        mine = batch.split == s
        part, dy = batch.x[mine], batch.dy[mine]
        if not part.numel():
            continue
        var, mean = torch.var_mean(part, dims, correction=0, keepdim=True)
        invstd = (var + case.eps).rsqrt()
        reach = 1 + part.abs().amax(dims, keepdim=True) * invstd
        normal = 1 + ((part - mean) * invstd).abs()
        # The wire holds sums about 0 in float64, whose variance is off by the square.
        error[mine] = normal * (wide * reach + 2**-52 * reach**2)
        slope[mine] = invstd * dy.abs().amax(dims, keepdim=True)
    largest = truth["largest"]
    sums = (error * batch.dy.abs()).sum() + wide * batch.dy.abs().sum()
    stored_or_wide = max(stored, wide)
    return {
        "y": weight * error + last * truth["y"].abs() + wide * (1 + truth["y"].abs()),
        "dx": weight * error * slope + last * truth["dx"].abs(),
        "dweight": sums + stored * truth["dweight terms"],
        "dbias": sums + stored * truth["dbias terms"],
        "running_mean": stored_or_wide * (1 + largest + truth["running_mean"].abs()),
        "running_var": stored_or_wide * (1 + truth["running_var"]) + 2**-52 * largest**2,
        "num_batches_tracked": torch.tensor(0.0),
    }


def assert_close(found: Account, truth: Account, bound: Account) -> None:
    for name, value in found.items():
        error = (value.double() - truth[name].double()).abs()
        assert value.shape == truth[name].shape, name
        # Not `error > ...`: NaN must fail.
        assert (error <= ROUNDINGS * bound[name]).all(), (
            f"{name} must be within {ROUNDINGS} roundings, got an error of {error.max():.3g}\n"
            f"got {value}\nexpected {truth[name]}"
        )


def assert_equal_to_oracle(case: Case, ranks: list[list[Account]]) -> None:
    batches = batches_of(case)
    found = together(batches, ranks)
    for batch, step, truth in zip(batches, found, expected(case, batches), strict=True):
        assert_close(step, truth, bounds(case, batch, truth))


@TRIED
@given(cases())
def test_layer_equals_the_oracle_and_its_ranks_agree(case: Case) -> None:
    threads = Threads(case.ranks)
    assert_equal_to_oracle(case, threads.run(train, case, batches_of(case)))
    forward = case.splits * (2 * case.features + 1), torch.float64
    backward = 2 * case.splits * case.features, WIDE.get(case.dtype, case.dtype)
    each_step = [forward, backward] if case.ranks > 1 else []
    for sent in threads.sent:
        assert [(each.numel(), each.dtype) for each in sent] == each_step * len(case.steps)


def train_all(rank: int, world_size: int, drawn: list[Case]) -> list[Any]:
    return [train(rank, case, batches_of(case)) for case in drawn]


def test_layer_equals_the_oracle_on_gloo_ranks(tmp_path: Path) -> None:
    """One launch for all cases, so they are drawn first and not made smaller afterwards."""
    drawn: list[Case] = []

    @settings(TRIED, max_examples=SAMPLE, phases=[Phase.generate])
    @given(cases(4))
    def draw(case: Case) -> None:
        drawn.append(case)

    draw()
    answers = run_ranks(train_all, 4, tmp_path, drawn, seconds=100 + EXAMPLES)
    for case, *ranks in zip(drawn, *answers, strict=True):
        try:
            assert_equal_to_oracle(case, ranks)
        except AssertionError as error:
            raise AssertionError(f"{case}\n{error}") from None


def rearranged(batch: Batch, order: Tensor, **changes: Any) -> Batch:
    return dataclasses.replace(batch, x=batch.x[order], dy=batch.dy[order], **changes)


def assert_same_in_another_order(
    case: Case, batches: list[Batch], others: list[Batch], orders: list[Tensor]
) -> None:
    """`others` has the rows of `batches` in another order, perhaps on another number of ranks."""
    runs = [
        together(each, Threads(len(each[0].how)).run(train, case, each))
        for each in (batches, others)
    ]
    for batch, order, one, other, truth in zip(
        batches, orders, *runs, expected(case, batches), strict=True
    ):
        bound = bounds(case, batch, truth)
        for name in ("dweight", "dbias"):
            own = [bound[name].sum(0)]
            for run in (one, other):
                if name in run:
                    # Each rank's part is rounded, and parts may be larger than their sum.
                    parts = run[name].double()
                    own.append(parts.abs().sum(0) * torch.finfo(run[name].dtype).eps)
                    run[name] = parts.sum(0)
            bound[name] = torch.stack(own).amax(0)
        for name in ("y", "dx"):
            one[name], bound[name] = one[name][order], bound[name][order]
        assert_close(other, one, bound)


@TRIED
@given(cases(), st.integers(1, 4), st.integers(0, 2**16))
def test_results_do_not_depend_on_how_rows_are_dealt_to_ranks(
    case: Case, ranks: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches, others, orders = batches_of(case), [], []
    for batch in batches:
        count = len(batch.split)
        order = torch.randperm(count, generator=generator)
        rank = torch.randint(ranks, (count,), generator=generator)
        changes = {"split": batch.split[order], "rank": rank, "how": ("index",) * ranks}
        others.append(rearranged(batch, order, **changes))
        orders.append(order)
    assert_same_in_another_order(case, batches, others, orders)


@TRIED
@given(cases(), st.integers(0, 2**16))
def test_permuting_rows_inside_a_split_permutes_the_results(case: Case, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches, orders = batches_of(case), []
    for batch in batches:
        order = torch.arange(len(batch.split))
        for s in range(case.splits):
            rows = order[batch.split == s]
            order[batch.split == s] = rows[torch.randperm(len(rows), generator=generator)]
        orders.append(order)
    others = [rearranged(batch, order) for batch, order in zip(batches, orders, strict=True)]
    assert_same_in_another_order(case, batches, others, orders)


def evaluate(rank: int, case: Case, batch: Batch, state: oracle.State) -> Tensor:
    layer, mine = layer_of(case).eval(), batch.rank == rank
    for s, stats in enumerate((layer, *layer.aux_bn)):
        stats.running_mean.copy_(state.running_mean[s])
        stats.running_var.copy_(state.running_var[s])
    x = in_layout(batch.x[mine].to(case.dtype), case.layouts[0])
    with assigned(layer, batch.how[rank], batch.split[mine], case.splits):
        return layer(x).detach()


@TRIED
@given(cases())
def test_evaluation_takes_the_running_statistics_of_each_split(case: Case) -> None:
    case = dataclasses.replace(case, tracked=True)
    batch, state = batches_of(case)[0], initial_state(case)
    generator = torch.Generator().manual_seed(case.seed)
    for value in (state.running_mean, state.running_var):
        drawn = torch.rand(value.shape, generator=generator, dtype=torch.float64) + 0.5
        value.copy_(drawn.to(case.parameter_dtype))
    threads = Threads(case.ranks)
    outputs = threads.run(evaluate, case, batch, state)
    assert not any(threads.sent), "evaluation must not communicate"
    for rank, y in enumerate(outputs):
        mine = batch.rank == rank
        split = batch.split[mine] * (batch.how[rank] != "default")
        shape = (*y.shape[:2], *(1 for _ in case.positions))
        weight, bias, mean, var = (
            value.detach()[split].view(shape)
            for value in (state.weight[0], state.bias[0], state.running_mean, state.running_var)
        )
        truth = (batch.x[mine] - mean) / (var + case.eps).sqrt() * weight + bias
        reach = 1 + batch.x[mine].abs() + mean.abs()
        wide = torch.finfo(WIDE.get(case.dtype, case.dtype)).eps
        bound = 4 * wide * reach + torch.finfo(case.dtype).eps * truth.abs()
        assert_close({"y": y}, {"y": truth}, {"y": bound})


@dataclass(frozen=True)
class Norm:
    """One batch norm of a drawn model; a shared one is called at the next place too."""

    eps: float
    momentum: float | None
    affine: bool
    tracked: bool
    shared: bool


NORMS = st.builds(
    Norm,
    st.sampled_from([1e-3, 0.1]),
    st.sampled_from([0.1, None, 1.0]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)


def model_of(norms: list[Norm], dims: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    batch_norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    blocks: list[nn.Module] = []
    for norm in norms:
        layer = batch_norm(3, norm.eps, norm.momentum, norm.affine, norm.tracked)
        if norm.affine:
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
        block = [conv(3, 3, 1), layer, nn.Tanh()]
        if norm.shared:
            block += [conv(3, 3, 1), layer]
        blocks.append(nn.Sequential(*block))
    return nn.Sequential(*blocks).double()


def run_part(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    y.square().sum().backward()
    return y.detach()


def run_converted(
    rank: int, models: list[nn.Module], parts: list[list[Tensor]]
) -> tuple[Tensor, ...]:
    own, model = parts[rank], models[rank]
    sizes = [len(part) for part in own]
    with assign_splits(model, sizes=sizes):
        return run_part(model, torch.cat(own)).split(sizes)


def sums_of_gradients(models: list[nn.Module]) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    for model in models:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] = sums.get(name, 0) + parameter.grad
    return sums


@TRIED
@given(
    st.lists(NORMS, min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.lists(st.integers(0, 3), min_size=4, max_size=16),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_converted_model_equals_one_plain_model_a_split(
    norms: list[Norm],
    dims: int,
    ranks: int,
    counts: list[int],
    synced: bool,
    shared: bool,
    seed: int,
) -> None:
    splits = len(counts) // ranks
    rows = [counts[rank * splits : (rank + 1) * splits] for rank in range(ranks)]
    plain = model_of(norms, dims, seed)
    generator = torch.Generator().manual_seed(seed)
    # Two positions at least: plain batch norm refuses a single value.
    parts = [
        [torch.randn(n, 3, *(2,) * dims, generator=generator, dtype=torch.float64) for n in own]
        for own in rows
    ]
    # What is not used gets a zero gradient in both.
    twins = [copy.deepcopy(plain) for _ in range(splits)]
    outputs = []
    for twin, each in zip(twins, zip(*parts, strict=True), strict=True):
        whole = torch.cat(each)
        outputs.append(
            run_part(twin, whole).split([len(part) for part in each]) if len(whole) else each
        )

    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain)) if synced else plain
    model = convert_sync_split_batchnorm(copy.deepcopy(model), splits, share_affine=shared)
    models = [copy.deepcopy(model) for _ in range(ranks)]
    found = Threads(ranks).run(run_converted, models, parts)
    close = {"rtol": 1e-8, "atol": 1e-8}
    for rank, s in itertools.product(range(ranks), range(splits)):
        torch.testing.assert_close(found[rank][s], outputs[s][rank], **close)
    grads, of_split = sums_of_gradients(models), [sums_of_gradients([twin]) for twin in twins]
    total = sums_of_gradients(twins)
    for name, grad in grads.items():
        path, _, rest = name.partition(".aux_bn.")
        own = f"{path}.{rest.partition('.')[2]}" if rest else name
        is_of_norm = own.split(".")[1] == "1"
        split = int(rest.partition(".")[0]) + 1 if rest else 0
        truth = of_split[split] if is_of_norm and not shared else total
        torch.testing.assert_close(grad, truth.get(own, torch.zeros_like(grad)), **close)

    buffers = [dict(model.named_buffers()) for model in models]
    for name, buffer in buffers[0].items():
        assert all(other[name].equal(buffer) for other in buffers), f"ranks differ in {name}"
    for s, twin in enumerate(twins):
        back = revert_sync_split_batchnorm(copy.deepcopy(models[0]), s).state_dict()
        torch.testing.assert_close(dict(back), dict(twin.state_dict()), **close)


def test_soak_passes_a_short_run() -> None:
    command = [sys.executable, str(Path(__file__).with_name("soak.py")), "--steps", "50"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "largest drift" in done.stdout

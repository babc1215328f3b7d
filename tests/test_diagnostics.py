"""The divergence between splits is the textbook one, of running statistics and of a batch."""

import copy
import itertools

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.distributions import Normal, kl_divergence

from sync_splitbn import (
    SyncSplitBatchNorm,
    assign_splits,
    convert_sync_split_batchnorm,
    split_divergence,
)
from sync_splitbn.diagnostics import plot_split_divergence


def symmetric_kl(mean, var, other_mean, other_var, eps):
    """The mean over channels, by torch's own distributions."""
    p = Normal(mean.double(), (var.double() + eps).sqrt())
    q = Normal(other_mean.double(), (other_var.double() + eps).sqrt())
    return (kl_divergence(p, q) + kl_divergence(q, p)).mean().item()


def of_parts(parts, eps=1e-5):
    """The divergence of every pair of batches [n, C, ...]."""
    stats = []
    for part in parts:
        values = part.double().transpose(0, 1).flatten(1)
        mean = values.mean(dim=1)
        stats.append((mean, (values - mean[:, None]).square().mean(dim=1)))
    return {
        (i, j): symmetric_kl(*stats[i], *stats[j], eps)
        for i, j in itertools.combinations(range(len(parts)), 2)
        if len(parts[i]) and len(parts[j])
    }


def test_divergence_of_running_statistics_is_the_symmetric_kl_of_every_pair():
    torch.manual_seed(0)
    model = nn.Sequential(SyncSplitBatchNorm(4, num_splits=3), nn.ReLU(), SyncSplitBatchNorm(4))
    for layer in (model[0], model[2]):
        for stats in (layer, *layer.aux_bn):
            stats.running_mean.normal_()
            stats.running_var.uniform_(0.5, 2)
    found = split_divergence(model)
    assert {path: [*pairs] for path, pairs in found.items()} == {
        "0": [(0, 1), (0, 2), (1, 2)],
        "2": [(0, 1)],
    }
    for path, pairs in found.items():
        layer = model.get_submodule(path)
        stats = [layer, *layer.aux_bn]
        for (i, j), value in pairs.items():
            expected = symmetric_kl(
                stats[i].running_mean,
                stats[i].running_var,
                stats[j].running_mean,
                stats[j].running_var,
                layer.eps,
            )
            assert value == pytest.approx(expected, rel=1e-9)


def test_equal_splits_do_not_diverge():
    assert split_divergence(SyncSplitBatchNorm(4)) == {"": {(0, 1): 0.0}}


class Model(nn.Module):
    """Two batch norms, a dropout between them."""

    def __init__(self):
        super().__init__()
        self.bn1, self.drop, self.bn2 = nn.BatchNorm2d(3), nn.Dropout(0.5), nn.BatchNorm2d(3)

    def forward(self, input):
        return self.bn2(self.drop(self.bn1(input)))


def batch():
    torch.manual_seed(0)
    return torch.cat([torch.randn(2, 3, 5, 5), 3 + 2 * torch.randn(4, 3, 5, 5)])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("converted", [True, False])
@pytest.mark.parametrize("rows", ["sizes", "index"])
def test_divergence_of_a_batch_is_that_of_its_parts_at_every_batch_norm(rows, converted, training):
    model, x = Model().train(training), batch()
    if converted:
        model = convert_sync_split_batchnorm(model, 1)
    seen = []
    given = {"sizes": (2, 0, 4)}
    parts = [x[:2], x[:0], x[2:]]
    if rows == "index":
        given = {"index": torch.tensor([0, 2, 0, 2, 0, 2])}
        parts = [x[::2], x[:0], x[1::2]]
    torch.manual_seed(1)
    found = split_divergence(model, x, **given)
    torch.manual_seed(1)
    model.bn2.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(x)
    order = torch.tensor([0, 2, 4, 1, 3, 5]) if rows == "index" else torch.arange(6)
    inner = seen[0][order].split((3, 0, 3) if rows == "index" else (2, 0, 4))
    for path, expected in (("bn1", of_parts(parts)), ("bn2", of_parts(inner))):
        assert found[path].keys() == {(0, 2)}
        assert found[path] == pytest.approx(expected, rel=1e-9)


def test_parts_of_a_split_model_are_its_own_splits():
    model, x = convert_sync_split_batchnorm(Model(), 2).train(), batch()
    found = split_divergence(model, x)
    assert found["bn1"] == pytest.approx(of_parts(x.chunk(2)), rel=1e-9)
    with assign_splits(model, sizes=(2, 4)):
        found = split_divergence(model, x)
    assert found["bn1"] == pytest.approx(of_parts([x[:2], x[2:]]), rel=1e-9)
    # Each split is normalized by itself, so behind the layer they do not differ any more.
    assert found["bn2"][0, 1] < 0.2 * found["bn1"][0, 1]


@pytest.mark.parametrize("splits", [None, 1, 2])
def test_comparing_a_batch_changes_nothing(splits):
    model, x = Model().train(), batch()
    if splits is not None:
        model = convert_sync_split_batchnorm(model, splits)
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    split_divergence(model, x, sizes=(2, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_model_that_fails_keeps_its_state_too():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Linear(7, 7)).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        split_divergence(model, batch(), sizes=(2, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model[0]._forward_pre_hooks


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"sizes must sum to input.shape\[0\]=6, got \(2, 3\)"):
        split_divergence(Model(), batch(), sizes=(2, 3))
    with pytest.raises(ValueError, match="sizes and index must come with input, got input=None"):
        split_divergence(Model(), sizes=(2, 3))


@pytest.mark.parametrize(
    "model",
    [
        nn.BatchNorm1d(2),
        SyncSplitBatchNorm(2, num_splits=1),
        SyncSplitBatchNorm(2, track_running_stats=False),
    ],
)
def test_model_without_split_statistics_is_refused(model):
    with pytest.raises(ValueError, match="model must contain a SyncSplitBatchNorm with 2 or"):
        split_divergence(model)


def test_what_holds_no_values_is_refused():
    meta = SyncSplitBatchNorm(2, device="meta")
    with pytest.raises(ValueError, match=r"model must hold values at its layer, got .* on meta"):
        split_divergence(meta)
    with pytest.raises(ValueError, match=r"model must hold values at 0, got .* on meta"):
        split_divergence(nn.Sequential(meta), torch.empty(6, 2, device="meta"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input": [1.0]}, "input must be a tensor .*, got list"),
        ({"input": torch.ones(2, 3), "index": [0, 1]}, "index must be an integer tensor.*got list"),
        ({"input": torch.ones(2, 3), "index": torch.ones(2)}, "integer tensor .*got torch.float"),
        ({"input": torch.ones(2, 3), "sizes": 2}, "sizes must be a sequence of ints, got 2"),
    ],
)
def test_arguments_of_another_kind_are_refused(given, message):
    with pytest.raises(TypeError, match=message):
        split_divergence(nn.BatchNorm1d(3), **given)


@pytest.mark.parametrize(
    "given", [{"sizes": []}, {"sizes": [6]}, {"index": torch.full((6,), -1)}], ids=str
)
def test_fewer_than_two_parts_are_refused(given):
    with pytest.raises(ValueError, match="must give rows to 2 parts or more, got fewer"):
        split_divergence(Model(), batch(), **given)


def test_layer_called_by_keyword_is_observed():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(input=x)

    x = torch.randn(6, 3)
    found = split_divergence(Named(), x, sizes=(2, 4))
    assert found["norm"] == pytest.approx(of_parts([x[:2], x[2:]]), rel=1e-9)


def test_buffers_that_the_model_replaces_are_put_back():
    class Average(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            return self.norm(x)

    model = Average()
    split_divergence(model, torch.randn(6, 3), sizes=(2, 4))
    assert model.mean.equal(torch.zeros(3))


def test_layer_with_one_split_is_left_out():
    model = nn.Sequential(SyncSplitBatchNorm(2, num_splits=1), SyncSplitBatchNorm(2))
    assert [*split_divergence(model)] == ["1"]


def test_part_of_one_element_is_compared_and_one_part_alone_is_refused():
    model, x = nn.Sequential(nn.BatchNorm1d(3)), torch.arange(12.0).view(4, 3)
    found = split_divergence(model, x, sizes=(1, 3))
    assert found["0"] == pytest.approx(of_parts([x[:1], x[1:]]), rel=1e-9)
    with pytest.raises(ValueError, match="must give rows to 2 parts or more, got fewer"):
        split_divergence(model, x, sizes=(4, 0))


def diverge(rank, world_size):
    torch.manual_seed(0)
    model = convert_sync_split_batchnorm(Model(), 2).eval()
    wrapped = nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(rank)
    x = torch.randn(4, 3, 5, 5) + torch.arange(4).view(4, 1, 1, 1)
    # On one rank alone: an evaluated model does not communicate.
    alone = split_divergence(wrapped.module, x, sizes=(1, 3)) if rank == 1 else None
    together = split_divergence(wrapped, x, sizes=(1, 3))
    return alone, together, of_parts([x[:1], x[1:]])


def test_one_rank_alone_compares_its_batch_and_all_together_through_ddp(tmp_path):
    alone, together, expected = run_ranks(diverge, 2, tmp_path)[1]
    assert [*together] == ["module.bn1", "module.bn2"]
    assert together["module.bn1"] == pytest.approx(expected, rel=1e-9)
    assert alone["bn1"] == pytest.approx(expected, rel=1e-9)


def test_plot_draws_a_line_for_each_pair():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots()
    divergence = {
        "a": {(0, 1): 0.1, (0, 2): 2.0},
        "b": {(0, 1): 0.0},
        "c": {(0, 1): 0.2, (0, 2): 3},
    }
    plot_split_divergence(divergence, axes)
    assert [list(line.get_ydata()) for line in axes.lines] == [[0.1, 0.0, 0.2], [2.0, 3.0]]
    assert [list(line.get_xdata()) for line in axes.lines] == [[1, 2, 3], [1, 3]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "splits 0 and 1",
        "splits 0 and 2",
    ]
    assert "nats" in axes.get_ylabel()
    assert axes.get_yscale() == "log"


def test_plot_of_equal_splits_has_no_logarithms():
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    plot_split_divergence({"a": {(0, 1): 0.0}}, axes)
    assert axes.get_yscale() == "linear"

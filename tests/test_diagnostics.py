"""The divergence between splits is the textbook one, layer by layer."""

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from sync_splitbn import SyncSplitBatchNorm, split_divergence
from sync_splitbn.diagnostics import plot_split_divergence


def test_divergence_is_the_symmetric_kl_of_two_normals():
    torch.manual_seed(0)
    model = nn.Sequential(SyncSplitBatchNorm(4, num_splits=3), nn.ReLU(), SyncSplitBatchNorm(4))
    for layer in (model[0], model[2]):
        for stats in (layer, *layer.aux_bn):
            stats.running_mean.normal_()
            stats.running_var.uniform_(0.5, 2)
    found = split_divergence(model)
    assert {path: len(values) for path, values in found.items()} == {"0": 2, "2": 1}
    for path, values in found.items():
        layer = model.get_submodule(path)
        normals = [
            Normal(stats.running_mean.double(), (stats.running_var.double() + layer.eps).sqrt())
            for stats in (layer, *layer.aux_bn)
        ]
        for value, other in zip(values, normals[1:], strict=True):
            both = kl_divergence(normals[0], other) + kl_divergence(other, normals[0])
            assert value == pytest.approx(both.mean().item(), rel=1e-9)


def test_equal_splits_do_not_diverge():
    assert split_divergence(SyncSplitBatchNorm(4)) == {"": [0.0]}


def test_model_without_split_statistics_is_refused():
    for model in (
        nn.BatchNorm1d(2),
        SyncSplitBatchNorm(2, num_splits=1),
        SyncSplitBatchNorm(2, track_running_stats=False),
    ):
        with pytest.raises(ValueError, match="model must contain a SyncSplitBatchNorm with 2 or"):
            split_divergence(model)


def test_plot_draws_a_line_for_each_auxiliary_split():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots()
    plot_split_divergence({"a": [0.1, 2.0], "b": [0.0], "c": [0.2, 3.0]}, axes)
    assert [list(line.get_ydata()) for line in axes.lines] == [[0.1, 0.0, 0.2], [2.0, 3.0]]
    assert [list(line.get_xdata()) for line in axes.lines] == [[1, 2, 3], [1, 3]]
    assert "nats" in axes.get_ylabel()

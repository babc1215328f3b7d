"""Contexts nest, reach wrapped models, end with their body, and refuse what cannot fit."""

import pytest
import torch
from torch import nn

from sync_splitbn import (
    SyncSplitBatchNorm,
    assign_splits,
    frozen_stats,
    sync_group,
    sync_split_batch_norm,
)


def tracked(layer):
    return [stats.num_batches_tracked.item() for stats in (layer, *layer.aux_bn)]


def test_innermost_assignment_wins_and_the_outer_one_returns():
    layer = SyncSplitBatchNorm(3, num_splits=3)
    x = torch.randn(6, 3)
    with assign_splits(layer, only=1):
        with assign_splits(layer, sizes=(0, 0, 6)):
            layer(x)
        assert tracked(layer) == [0, 0, 1]
        layer(x)
    assert tracked(layer) == [0, 1, 1]
    layer(x)
    assert tracked(layer) == [1, 2, 2]


def test_inner_context_may_speak_to_a_part_of_the_model():
    model = nn.Sequential(SyncSplitBatchNorm(3), SyncSplitBatchNorm(3))
    with assign_splits(model, only=1), assign_splits(model[0], only=0):
        model(torch.randn(4, 3))
    assert [tracked(layer) for layer in model] == [[1, 0], [0, 1]]


def test_contexts_end_when_the_body_raises():
    layer = SyncSplitBatchNorm(3)
    with pytest.raises(KeyError), assign_splits(layer, only=1), frozen_stats(layer):
        raise KeyError
    layer(torch.randn(4, 3))
    assert tracked(layer) == [1, 1]


def test_index_may_be_of_any_integer_type():
    torch.manual_seed(0)
    x, ids = torch.randn(6, 3), torch.tensor([1, 0, 1, 1, 0, 0])
    outputs = []
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.uint16):
        with assign_splits(layer := SyncSplitBatchNorm(3), index=ids.to(dtype)):
            outputs.append(layer(x))
    assert outputs[0].equal(outputs[1])
    assert outputs[0].equal(outputs[2])


def test_mixed_order_equals_sorted_order():
    torch.manual_seed(0)
    x, ids = torch.randn(7, 3, 2), torch.tensor([2, 0, 1, 1, 0, 2, 2])
    order = ids.argsort(stable=True)
    a, b = SyncSplitBatchNorm(3, num_splits=3), SyncSplitBatchNorm(3, num_splits=3)
    with assign_splits(a, index=ids), assign_splits(b, sizes=(2, 2, 3)):
        torch.testing.assert_close(a(x)[order], b(x[order]))


LAYER = SyncSplitBatchNorm(3, num_splits=4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "exactly one of sizes, only and index must be given, got none"),
        ({"only": 1, "sizes": (1, 1, 1, 1)}, ValueError, "must be given, got sizes, only"),
        ({"only": 4}, ValueError, "only must be a split from 0 to num_splits - 1 = 3, got 4"),
        ({"only": -1}, ValueError, "only must be a split"),
        ({"only": True}, TypeError, "only must be an int, got bool"),
        ({"only": 0.5}, TypeError, "only must be an int, got float"),
        ({"sizes": (1.5, 1, 1, 1)}, TypeError, r"sizes must be a sequence of ints, got \(1.5"),
        ({"sizes": 4}, TypeError, "sizes must be a sequence of ints, got 4"),
        ({"sizes": (3, 3)}, ValueError, r"sizes must hold num_splits=4 numbers .*got \(3, 3\)"),
        ({"sizes": (7, -1, 0, 0)}, ValueError, "each 0 or more"),
    ],
    ids=str,
)
def test_assignment_that_cannot_fit_is_refused_on_entry(options, error, message):
    with pytest.raises(error, match=message), assign_splits(LAYER, **options):
        raise AssertionError("entered")


def test_assignment_must_fit_every_layer():
    model = nn.Sequential(SyncSplitBatchNorm(3, num_splits=3), SyncSplitBatchNorm(3))
    for options, message in (
        ({"sizes": (2, 2, 2)}, "sizes must hold num_splits=2"),
        ({"only": 2}, "only must be a split from 0 to num_splits - 1 = 1, got 2"),
    ):
        with pytest.raises(ValueError, match=message), assign_splits(model, **options):
            raise AssertionError("entered")
    assert model[0]._assignment is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"sizes": (1, 1, 1, 1)},
            ValueError,
            r"sizes must sum to input.shape\[0\]=6, got .* sum 4",
        ),
        ({"index": torch.tensor([0, 1])}, ValueError, r"shape .input.shape\[0\].=.6., got .2."),
        ({"index": [0, 1]}, TypeError, "index must be an integer tensor of shape .N., got list"),
        ({"index": torch.zeros(6)}, TypeError, "index must hold integers, got torch.float32"),
        ({"index": torch.ones(6) > 0}, TypeError, "index must hold integers, got torch.bool"),
        ({"index": torch.arange(6)}, ValueError, "splits from 0 to num_splits - 1 = 3, got 0 to 5"),
        ({"index": torch.arange(-1, 5)}, ValueError, "got -1 to 4"),
        ({"index": torch.zeros(6, dtype=int, device="meta")}, ValueError, "on the device of input"),
    ],
    ids=str,
)
def test_assignment_that_does_not_fit_the_batch_is_refused(options, error, message, training):
    LAYER.train(training)
    with assign_splits(LAYER, **options), pytest.raises(error, match=message):
        LAYER(torch.randn(6, 3))


def test_model_without_the_layer_is_refused():
    for context in (assign_splits(nn.Linear(1, 1), only=0), frozen_stats(nn.BatchNorm1d(1))):
        with pytest.raises(ValueError, match="model must contain a SyncSplitBatchNorm"), context:
            raise AssertionError("entered")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: LAYER.train()(torch.randn(30, 3)),
            ValueError,
            r"shape\[0\] must be divisible by num_splits=4, got 30",
        ),
        (
            lambda: LAYER(torch.randn(8)),
            ValueError,
            r"at least 2 dimensions \[N, C, ...\], got shape \(8,\)",
        ),
        *(
            (
                lambda x=x: LAYER(x),
                TypeError,
                f"input must be a dense tensor, got layout {x.layout}",
            )
            for x in (torch.ones(8, 3).to_sparse(), torch.ones(8, 3, 2, 2).to_mkldnn())
        ),
        (
            lambda: LAYER(torch.randn(8, 2)),
            ValueError,
            r"input.shape\[1\] must equal num_features=3, got 2",
        ),
        (
            lambda: LAYER(torch.ones(8, 3, dtype=int)),
            TypeError,
            "input must be floating point, got torch.int64",
        ),
        (
            lambda: SyncSplitBatchNorm(3, num_splits=0),
            ValueError,
            "num_splits must be at least 1, got 0",
        ),
        *(
            (lambda w=w: sync_split_batch_norm(torch.ones(4, 3), 2, w), TypeError, message)
            for w, message in (
                ([1.0, 2.0], r"weight must be tensors of shape \[C\], got float; wrap numbers in"),
                (2.0, r"weight must be tensors of shape \[C\], got float"),
                ([torch.ones(3), None], r"weight must be tensors of shape \[C\], got NoneType"),
            )
        ),
        (lambda: LAYER([1.0]), TypeError, "input must be a tensor, got list"),
        (lambda: SyncSplitBatchNorm(3, eps=None), TypeError, "eps must be a number, got NoneType"),
        (
            lambda: SyncSplitBatchNorm(3, num_splits=True),
            TypeError,
            "num_splits must be an int, got bool",
        ),
        (
            lambda: sync_split_batch_norm(torch.ones(4, 3), 2, torch.ones(3, device="meta")),
            ValueError,
            "weight must be on the device of input, cpu, got meta; move the layer there",
        ),
        (
            lambda: SyncSplitBatchNorm(3, process_group="nccl"),
            TypeError,
            "process_group must be .*got str",
        ),
        (
            lambda: SyncSplitBatchNorm(
                3, process_group=torch.distributed.GroupMember.NON_GROUP_MEMBER
            ),
            ValueError,
            "process_group must contain this rank",
        ),
        *(
            (call, ValueError, f"eps must be positive and finite, got {eps}")
            for eps in (0, -1e-5, float("nan"), float("inf"))
            for call in (
                lambda eps=eps: SyncSplitBatchNorm(3, eps=eps),
                lambda eps=eps: sync_split_batch_norm(torch.randn(4, 3), 2, eps=eps),
            )
        ),
        (
            lambda: sync_split_batch_norm(torch.randn(4, 3), 0),
            ValueError,
            "num_splits must be at least 1",
        ),
        (
            lambda: sync_split_batch_norm(torch.randn(4, 3), 2, impl="cuda"),
            ValueError,
            "impl must be one of .*'triton' or None, got 'cuda'",
        ),
        (
            lambda: sync_split_batch_norm(torch.randn(4, 3), 2, torch.ones(2)),
            ValueError,
            "weight must have shape",
        ),
        (
            lambda: sync_split_batch_norm(torch.randn(4, 3), 2, bias=torch.ones(3, 3)),
            ValueError,
            "bias must have shape",
        ),
        (
            lambda: sync_split_batch_norm(torch.randn(4, 3), 2, [torch.ones(3)] * 3),
            ValueError,
            r"weight must have shape .* or be S tensors \[C\], got \[\[3\], \[3\], \[3\]\]",
        ),
        (
            lambda: sync_split_batch_norm(torch.randn(4, 3), 2, torch.tensor(1.0)),
            ValueError,
            r"weight must have shape .*, got \[\]",
        ),
        (
            lambda: sync_split_batch_norm(torch.randn(4, 3), 2, sizes=(4,)),
            ValueError,
            "sizes must hold num_splits=2",
        ),
        (
            lambda: sync_split_batch_norm(torch.randn(4, 3), 2, sizes=(2, 2), index=torch.zeros(4)),
            ValueError,
            "at most one of sizes and index",
        ),
        (
            lambda: sync_group(2),
            RuntimeError,
            "torch.distributed must be initialized before sync_group",
        ),
    ],
)
def test_wrong_use_says_what_must_hold_and_what_came(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: sync_split_batch_norm(torch.randn(4, 3), "2"),
        lambda: sync_split_batch_norm(torch.randn(4, 3), 2, process_group="nccl"),
        lambda: SyncSplitBatchNorm(3, num_splits=2.0),
        lambda: assign_splits([LAYER], only=0).__enter__(),
        lambda: frozen_stats(None).__enter__(),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused(call):
    with pytest.raises(TypeError, match="must be a"):
        call()


def test_functional_takes_one_weight_for_all_splits_or_one_each():
    x, weight = torch.randn(4, 3), torch.rand(3)
    one, _ = sync_split_batch_norm(x, 2, weight)
    each, _ = sync_split_batch_norm(x, 2, weight.expand(2, 3))
    assert one.equal(each)

import collections
import copy
import os
import pickle
import random
import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, slice_tensors
from ranks import Collectives, run_ranks
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler

from sync_splitbn import SyncSplitBatchNorm
from sync_splitbn.data import SplitViews, merge_views, until_all_done

SPLITS = 3


def pairs(size):
    """Item i is the pair (image of value i, label i)."""
    return [(torch.full((2,), float(i)), i) for i in range(size)]


def shifted(split):
    """The transform of one split: its views are told apart by their thousands."""
    return lambda image: image + 1000 * split


def views_of(size):
    return SplitViews(pairs(size), [shifted(split) for split in range(SPLITS)])


def assert_whole(views, labels):
    """Every row is the view that its place promises, of the sample that its label names."""
    merged, repeated = merge_views(views, labels)
    batch = len(labels)
    for split in range(SPLITS):
        rows = slice(split * batch, (split + 1) * batch)
        expected = (labels + 1000.0 * split)[:, None].expand(-1, 2)
        torch.testing.assert_close(merged[rows], expected, rtol=0, atol=0)
        assert repeated[rows].tolist() == labels.tolist()


class Noisy(Dataset):
    """Items, views and their labels all drawn at random, from each generator."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.rand(3), index + random.random()


def noisy_view(image):
    return image + random.random() + torch.randn(3)


def noisy_views(seed=0):
    return SplitViews(Noisy(), [noisy_view, noisy_view], seed=seed)


def test_item_stacks_one_view_for_each_transform():
    views, label = views_of(4)[2]
    assert views.tolist() == [[2, 2], [1002, 1002], [2002, 2002]]
    assert label == 2


def test_negative_index_shows_the_same_views_as_the_positive_one():
    views = noisy_views()
    assert torch.equal(views[-1][0], views[len(views) - 1][0])
    for index in (-13, 12):
        with pytest.raises(IndexError, match=r"index must be in \[-12, 12\), got"):
            views[index]


def test_merge_views_orders_split_by_split():
    assert_whole(*next(iter(DataLoader(views_of(8), batch_size=8))))


@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (0, 3)], ids=["one", "one-split", "empty"])
def test_merge_views_copies_only_what_must_move(shape):
    views, labels = torch.randn(*shape, 2), torch.arange(shape[0])
    merged, repeated = merge_views(views, labels)
    assert merged.shape == (shape[0] * shape[1], 2)
    assert len(repeated) == len(merged)
    assert merged.data_ptr() == views.data_ptr()


def test_merge_views_keeps_the_shape_of_soft_labels():
    merged, labels = merge_views(torch.randn(4, SPLITS, 1, 5, 5), torch.randn(4, 10))
    assert merged.shape == (12, 1, 5, 5)
    assert labels.shape == (12, 10)


@pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
@pytest.mark.parametrize("split_batches", [True, False], ids=["split", "whole"])
def test_ranks_of_accelerate_get_whole_samples(split_batches, even):
    # 11 samples in batches of 4: the last one is short, whoever it is dealt to.
    seen = set()
    for rank in range(2):
        batches = BatchSampler(SequentialSampler(range(11)), 4, drop_last=False)
        shard = BatchSamplerShard(batches, 2, rank, split_batches, even)
        for views, labels in DataLoader(views_of(11), batch_sampler=shard):
            assert_whole(views, labels)
            seen |= set(labels.tolist())
    assert seen == set(range(11))


def dispatched(rank, world_size, split_batches):
    """What accelerate's dispatching loader gives this rank."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size)}
    config = DataLoaderConfiguration(dispatch_batches=True, split_batches=split_batches)
    accelerator = Accelerator(cpu=True, dataloader_config=config)
    assert accelerator.num_processes == world_size
    loader = accelerator.prepare(DataLoader(views_of(11), batch_size=4))
    assert isinstance(loader, DataLoaderDispatcher)
    return list(loader)


@pytest.mark.parametrize("split_batches", [True, False], ids=["split", "whole"])
def test_dispatched_batches_of_accelerate_hold_whole_samples(split_batches, tmp_path):
    seen = set()
    for batches in run_ranks(dispatched, 2, tmp_path, split_batches):
        for views, labels in batches:
            assert_whole(views, labels)
            seen |= set(labels.tolist())
    assert seen == set(range(11))


def test_views_concatenated_by_the_collation_are_cut_through():
    # Why the views are stacked: the same rows of this layout are no whole samples.
    views, labels = next(iter(DataLoader(views_of(8), batch_size=8)))
    merged, repeated = merge_views(views, labels)
    half = slice_tensors((merged, repeated), slice(0, 12))
    with pytest.raises(AssertionError):
        assert_whole(half[0].unflatten(0, (SPLITS, 4)).transpose(0, 1), half[1][:4])


@pytest.mark.parametrize("workers", [0, 2])
def test_seeded_views_depend_on_epoch_and_index_alone(workers):
    expected = {}
    for epoch in (0, 1):
        reference = noisy_views()
        reference.set_epoch(epoch)
        expected[epoch] = torch.stack([reference[i][0] for i in reversed(range(12))]).flip(0)
    assert not torch.equal(expected[0], expected[1])
    dataset = noisy_views()
    loader = DataLoader(dataset, batch_size=5, num_workers=workers, persistent_workers=workers > 0)
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        assert torch.equal(torch.cat([views for views, _ in loader]), expected[epoch])


def test_seed_may_be_an_integer_of_numpy():
    np = pytest.importorskip("numpy")
    seeds = 5, np.int64(5), torch.tensor(5)
    views = [SplitViews(Noisy(), [noisy_view], seed=seed)[1][0] for seed in seeds]
    assert all(view.equal(views[0]) for view in views)


def test_seeds_and_indices_draw_different_views():
    first, other = noisy_views(0), noisy_views(1)
    assert not torch.equal(first[3][0], other[3][0])
    assert not torch.equal(first[3][0], first[4][0])
    assert first[3][1] == noisy_views(0)[3][1]


def test_seeded_views_put_every_generator_back():
    numpy = pytest.importorskip("numpy")

    def draw():
        return random.random(), torch.rand(1).item(), numpy.random.rand()

    def seed():
        random.seed(5)
        torch.manual_seed(5)
        numpy.random.seed(5)

    seed()
    expected = draw()
    seed()
    noisy_views()[0]
    assert draw() == expected


def test_seeded_views_decide_what_numpy_draws():
    numpy = pytest.importorskip("numpy")

    def view(image):
        return image + float(numpy.random.rand())

    views = SplitViews(pairs(2), [view], seed=0)
    first = views[0][0]
    numpy.random.rand()
    assert torch.equal(first, views[0][0])


def test_unseeded_views_follow_the_global_generators():
    torch.manual_seed(0)
    random.seed(0)
    views = noisy_views(seed=None)
    first = views[0][0]
    assert not torch.equal(first, views[0][0])
    torch.manual_seed(0)
    random.seed(0)
    assert torch.equal(first, views[0][0])


def test_views_survive_copy_and_pickle_with_their_epoch():
    views = noisy_views()
    views.set_epoch(3)
    for other in (copy.deepcopy(views), pickle.loads(pickle.dumps(views))):
        assert torch.equal(views[1][0], other[1][0])


class Stream(IterableDataset):
    """Has everything a map-style dataset has, and is none."""

    def __getitem__(self, index):
        raise AssertionError

    def __iter__(self):
        raise AssertionError

    def __len__(self):
        return 1


class Endless:
    """Has items and no length."""

    def __getitem__(self, index):
        raise AssertionError


@pytest.mark.parametrize(
    "dataset", [Stream(), iter([]), Endless()], ids=["iterable", "iterator", "endless"]
)
def test_dataset_that_is_not_map_style_is_refused(dataset):
    message = r"dataset must be map-style, .*, got (Stream|list_iter|Endless)"
    with pytest.raises(TypeError, match=message):
        SplitViews(dataset, [noisy_view])


def test_missing_transforms_are_refused():
    with pytest.raises(ValueError, match="transforms must hold one function for each split, got"):
        SplitViews(pairs(1), [])


@pytest.mark.parametrize(
    ("item", "got"),
    [({"image": 1, "label": 2}, "dict"), ((1, 2, 3), "tuple of length 3"), (torch.ones(2), "Tens")],
    ids=["dict", "triple", "tensor"],
)
def test_item_that_is_no_pair_is_refused(item, got):
    views = SplitViews([item], [noisy_view])
    with pytest.raises(TypeError, match=rf"dataset\[0\] must be an .* pair, got {got}"):
        views[0]


def test_view_that_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match=r"transforms\[1\] must return a tensor, got list"):
        SplitViews(pairs(1), [shifted(0), torch.Tensor.tolist])[0]


@pytest.mark.parametrize("change", [lambda x: x[:1], torch.Tensor.long], ids=["shape", "dtype"])
def test_views_that_differ_in_shape_or_dtype_are_refused(change):
    with pytest.raises(ValueError, match=r"transforms\[1\] must return shape \(2,\)"):
        SplitViews(pairs(1), [shifted(0), change])[0]


@pytest.mark.parametrize("shape", [(8,), (8, 0, 2)], ids=["no-splits", "zero-splits"])
def test_views_without_splits_are_refused(shape):
    with pytest.raises(ValueError, match=r"views must have shape \[B, S, ...\] with S >= 1, got"):
        merge_views(torch.ones(shape), torch.arange(8))


@pytest.mark.parametrize("labels", [torch.arange(24), torch.tensor(1)], ids=["repeated", "scalar"])
def test_labels_that_are_not_one_a_sample_are_refused(labels):
    with pytest.raises(ValueError, match="labels must hold one entry for each of the 8 samples"):
        merge_views(torch.ones(8, 3, 2), labels)


# The rows of every batch of each of two ranks, which disagree in their number too.
UNEVEN = ((4, 3, 5, 2, 3), (2, 6, 3))


def uneven_batches(rank):
    data = torch.Generator().manual_seed(rank)
    return [
        (torch.randn(rows, 6, generator=data), torch.randint(3, (rows,), generator=data))
        for rows in UNEVEN[rank]
    ]


def network(norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), norm, nn.ReLU(), nn.Linear(4, 3))


def uneven_epoch(rank, world_size, has_length):
    """One epoch under DDP, with the loss of the docstring."""
    model = network(SyncSplitBatchNorm(4, num_splits=1))
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    batches, sizes = uneven_batches(rank), []
    with Collectives() as seen:
        for images, labels in until_all_done(batches if has_length else iter(batches)):
            sizes.append(len(images))
            start = len(seen.calls)
            rows = torch.tensor(float(len(images)))
            torch.distributed.all_reduce(rows)
            loss = F.cross_entropy(wrapped(images), labels, reduction="sum")
            optimizer.zero_grad()
            (world_size * loss / rows).backward()
            optimizer.step()
            del seen.calls[start:]
    return (
        sizes,
        len(seen.calls),
        {name: value.clone() for name, value in model.state_dict().items()},
    )


@pytest.mark.parametrize("has_length", [True, False], ids=["length", "no-length"])
def test_uneven_epoch_equals_one_process_with_all_rows(has_length, tmp_path):
    model = network(nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    none = (torch.empty(0, 6), torch.empty(0, dtype=torch.int64))
    for step in range(5):
        parts = [(uneven_batches(rank) + [none] * 2)[step] for rank in range(2)]
        images, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    ranks = run_ranks(uneven_epoch, 2, tmp_path, has_length)
    assert [sizes for sizes, *_ in ranks] == [[4, 3, 5, 2, 3], [2, 6, 3, 0, 0]]
    for _, messages, state in ranks:
        # all_gather_object gathers sizes and objects: the lengths, then who has a batch.
        assert messages == (2 if has_length else 2 + 2 * 6)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)


def uneven_shards(rank, world_size, sync_with_dataloader):
    """accelerate's shards with even_batches=False: rank 0 has a batch more, nothing is repeated."""
    accelerator = Accelerator(
        cpu=True,
        dataloader_config=DataLoaderConfiguration(even_batches=False),
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            3, sync_with_dataloader=sync_with_dataloader
        ),
    )
    loader = accelerator.prepare(DataLoader(views_of(9), batch_size=2))
    seen, averaging = [], []
    for _, labels in until_all_done(loader):
        with accelerator.accumulate():
            seen.append(labels.tolist())
            averaging.append(accelerator.sync_gradients)
    return seen, averaging


def test_uneven_shards_of_accelerate_end_together(tmp_path):
    (first, averaging), (second, averaging_too) = run_ranks(uneven_shards, 2, tmp_path, False)
    assert first == [[0, 1], [4, 5], [8]]
    assert second == [[2, 3], [6, 7], []]
    assert averaging == averaging_too == [False, False, True]
    # Why the documentation asks for sync_with_dataloader=False: ranks would average apart.
    (_, averaging), (_, averaging_too) = run_ranks(uneven_shards, 2, tmp_path, True)
    assert averaging != averaging_too


def stepping(rank, world_size, images, how):
    """Steps inside a loader of accelerate that gives rank 0 a batch more; what was warned of."""
    even = how in ("override", "even")
    accelerator = Accelerator(
        cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=even)
    )
    layer = SyncSplitBatchNorm(3, num_splits=1)
    dataset = Streamed(images) if how == "stream" else torch.randn(images, 3)
    model, loader = accelerator.prepare(
        nn.Sequential(nn.Linear(3, 3), layer), DataLoader(dataset, batch_size=2)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Before any loader is begun, nothing is known of it.
        model(torch.randn(2, 3))
        run = torch.compile(model, backend="eager") if how == "compiled" else model
        if how == "override":
            # On GPUs, join_uneven_inputs(model, even_batches=False) does this for its scope.
            loader.batch_sampler.even_batches = False
        if how == "skipped":
            loader = accelerator.skip_first_batches(loader, 1)
        steps = 0
        for rows in until_all_done(loader) if how == "until_all_done" else loader:
            run(rows if rows.dim() == 2 else rows[:, None].expand(-1, 3).float())
            steps += 1
            if steps == 2 and how != "until_all_done":
                break
    return steps, [str(each.message) for each in caught if "accelerate" in str(each.message)]


@pytest.mark.parametrize("how", ["loader", "override", "compiled", "skipped"])
def test_loader_that_may_leave_ranks_waiting_is_warned_of_once(how, tmp_path):
    for steps, (message,) in run_ranks(stepping, 2, tmp_path, 13, how):
        assert steps == 2
        assert "must yield as many batches on each rank, got 7 batches for 2 ranks" in message


@pytest.mark.parametrize(
    ("images", "how"),
    [(9, "until_all_done"), (7, "loader"), (8, "override"), (5, "even"), (8, "stream")],
)
def test_loader_whose_ranks_end_together_is_not_warned_of(images, how, tmp_path):
    steps = (images + 3) // 4
    assert run_ranks(stepping, 2, tmp_path, images, how) == [(steps, []), (steps, [])]


class Streamed(IterableDataset):
    """A stream whose length is a guess."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(torch.arange(self.rows))

    def __len__(self):
        return 4


Pair = collections.namedtuple("Pair", "image name")


def structures(rank, world_size):
    """What empty batches look like, on a rank with one batch beside one with two."""
    image, used = torch.ones(2, 3), collections.UserDict(label=torch.zeros(2))
    batch = (
        Pair(image, ["a", "b"]),
        {"own": used, "scale": torch.tensor(2.0), "epoch": 7, "no": None},
    )
    (same, empty) = until_all_done([batch] * (2 - rank))
    streams = [rows.tolist() for rows in until_all_done(DataLoader(Streamed(2 + 3 * rank), 2))]
    nothing = list(until_all_done([]))
    return same is batch, empty if rank == 1 else None, streams, nothing


def test_empty_batches_have_the_structure_of_the_first(tmp_path):
    ranks = run_ranks(structures, 2, tmp_path)
    pair, rest = ranks[1][1]
    assert type(pair) is Pair
    assert pair.image.shape == (0, 3)
    assert pair.name == []
    assert type(rest["own"]) is collections.UserDict
    assert rest["own"]["label"].shape == (0,)
    assert (rest["scale"], rest["epoch"], rest["no"]) == (2, 7, None)
    assert [same for same, *_ in ranks] == [True, True]
    assert [streams for *_, streams, _ in ranks] == [[[0, 1], [], []], [[0, 1], [2, 3], [4]]]
    assert [nothing for *_, nothing in ranks] == [[], []]


def faulty_loaders(rank, world_size):
    row = torch.ones(2)
    for loader in ([row] * (1 - rank), iter([row] * (1 - rank))):
        with pytest.raises(
            ValueError, match=r"yield a batch on every rank, got none on ranks \[1\]"
        ):
            list(until_all_done(loader))
    with pytest.raises(TypeError, match=r"loader must yield tensors, .* got object; collate"):
        list(until_all_done([{"image": object()}]))
    for rows, got in ((1, "1"), (3, "more")):
        with pytest.raises(RuntimeError, match=rf"yield len\(loader\)=2 batches, got {got};"):
            list(until_all_done(Lengthy([row] * rows)))


class Lengthy(list):
    """Says that it holds two, whatever it holds."""

    def __len__(self):
        return 2


def test_loaders_that_cannot_end_together_are_refused(tmp_path):
    run_ranks(faulty_loaders, 2, tmp_path)


def test_one_rank_gets_its_own_batches_alone():
    batches = [torch.ones(2), {}]
    assert list(until_all_done(batches)) == batches
    with pytest.raises(TypeError, match=r"loader must yield tensors, .* got object; collate"):
        list(until_all_done([object()]))

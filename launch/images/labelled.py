"""Few labelled images beside many unlabelled ones, as items that a loader batches together."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from sync_splitbn.data import SplitViews

from ..recipe.errors import RunError
from .sets import TestImages, Transform


def divide(
    targets: Sequence[int], labelled: int, *, missing_classes: int, seed: int
) -> tuple[list[int], list[int]]:
    """Return the indices of labelled and of unlabelled images.

    Args:
        targets: the class of every image.
        labelled: number of labelled images, the same of every class that has any.
        missing_classes: the last classes, of which no image is labelled.
        seed: decides which images are labelled.

    Raises:
        RunError: the number does not divide, or a class has too few images.
    """
    classes = torch.tensor(targets)
    known = int(classes.max()) + 1 - missing_classes
    if known < 1 or labelled % known or labelled < known:
        raise RunError(
            f"--labelled must be a multiple of the {known} labelled classes, got {labelled}"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen: list[int] = []
    for number in range(known):
        members = (classes == number).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        chosen += members[order[: labelled // known]].tolist()
    if len(chosen) < labelled:
        raise RunError(f"--labelled must leave enough images of every class, got {labelled}")
    taken = set(chosen)
    return sorted(chosen), [index for index in range(len(targets)) if index not in taken]


def known_classes(images: TestImages, missing: int) -> Dataset[Any]:
    """Return the test images whose class has labelled images: all but the last classes.

    Args:
        images: test images of all classes.
        missing: number of the classes without a labelled image.
    """
    targets = images.targets
    known = max(targets) + 1 - missing
    return Subset(images, [index for index, label in enumerate(targets) if label < known])


class LabelledAndUnlabelled(Dataset[tuple[Tensor, int, Tensor]]):
    """One labelled image and `mu` unlabelled ones an item; an epoch has each unlabelled one once.

    Args:
        images: (image, class) pairs.
        labelled: indices of the labelled images, taken in turn.
        unlabelled: indices of the unlabelled images; what does not fill an item is left out.
        mu: unlabelled images for each labelled one.
        labelled_view: from a labelled image to [C, H, W].
        unlabelled_views: from an unlabelled image to each of V views.
        seed: decides the views, with the epoch and the image.

    An item is the labelled view [C, H, W], its class, and the unlabelled views [mu, V, C, H, W].
    """

    def __init__(
        self,
        images: Dataset[Any],
        labelled: Sequence[int],
        unlabelled: Sequence[int],
        *,
        mu: int,
        labelled_view: Transform,
        unlabelled_views: Sequence[Transform],
        seed: int,
    ) -> None:
        self.mu = mu
        self.labelled = SplitViews(Subset(images, labelled), [labelled_view], seed=seed)
        self.unlabelled = SplitViews(Subset(images, unlabelled), unlabelled_views, seed=seed)

    def set_epoch(self, epoch: int) -> None:
        """Draw new views from here on."""
        self.labelled.set_epoch(epoch)
        self.unlabelled.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.unlabelled) // self.mu

    def __getitem__(self, index: int) -> tuple[Tensor, int, Tensor]:
        index = operator.index(index)
        view, label = self.labelled[index % len(self.labelled)]
        # Far apart, so that the classes of a folder's images mix.
        others = range(index, len(self) * self.mu, len(self))
        return view[0], label, torch.stack([self.unlabelled[each][0] for each in others])


class FirstView(Dataset[tuple[Tensor, int]]):
    """The first view of every image, [C, H, W], with its class."""

    def __init__(self, views: SplitViews) -> None:
        self.views = views

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        views, label = self.views[index]
        return views[0], label

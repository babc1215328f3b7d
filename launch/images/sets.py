"""Training and test images of a recipe: the bundled digits, or a folder of one's own."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from ..recipe.errors import RunError
from ..recipe.parser import flag_of
from .augment import RandAugment
from .digits import MNIST_MEAN, MNIST_STD, Digits, mnist
from .folders import (
    ImageFolder,
    class_names,
    data_config,
    split_folder,
    test_transform,
    training_transforms,
)
from .views import RandomErasing, View

Transform = Callable[[Any], Tensor]


@dataclass(frozen=True)
class ImageSets:
    """Images of both sets, and the ways from an image to the input of a model, [C, H, W].

    Attributes:
        classes: their names, by their numbers.
        train: (PIL image, class) pairs, with `targets`; crop and flip, which all views of an image
            share, are done.
        test: ([C, H, W], class) pairs, without randomness, with `targets`.
        clean: converts and normalizes a training image.
        erased: does this, and may erase a rectangle.
        augmented: augments before, and may erase a rectangle.
        mean: mean of each band, as a fraction of white.
        std: standard deviation of each band, as a fraction of white.
    """

    classes: Sequence[str]
    train: Digits | ImageFolder
    test: "TestImages"
    clean: Transform
    erased: Transform
    augmented: Transform
    mean: Sequence[float]
    std: Sequence[float]

    def views(self, num_splits: int, *, resplit: bool) -> list[Transform]:
        """Return one transform for each split: the first clean, the others augmented, as in timm.

        Args:
            num_splits: number of views, at least 1; with 1 the only view is augmented.
            resplit: whether the first view is spared from erasing.
        """
        if num_splits == 1:
            return [self.augmented]
        first = self.clean if resplit else self.erased
        return [first] + [self.augmented] * (num_splits - 1)


def classes_of(options: argparse.Namespace) -> Sequence[str]:
    """Return the names of the classes, by their numbers: those of the training images.

    Args:
        options: of `recipe.options.add_data_options`; where weights are scored, also `classes`:
            what their run says of them, or None.
    """
    known: Sequence[str] | None = getattr(options, "classes", None)
    if known is not None:
        return known
    if options.data is None:
        return mnist()[0].classes
    return class_names(split_folder(options.data, options.train_split))


def count_channels(options: argparse.Namespace) -> int:
    """Return the number of bands of the images."""
    return 1 if options.data is None else 3


def load_images(options: argparse.Namespace, model: nn.Module) -> ImageSets:
    """Return the images that the options name, with the transforms that suit the model.

    Args:
        options: of `recipe.options.add_data_options`, and `aa` and `reprob`.
        model: a timm model carries its input size, mean, std and crop.

    Raises:
        RunError: a folder, a class, a policy or a number does not fit.
    """
    return _digits(options) if options.data is None else _folder(options, model)


def load_test_images(options: argparse.Namespace, model: nn.Module | None) -> "TestImages":
    """Return the test images alone, as `ImageSets.test` has them, with `targets`.

    Raises:
        RunError: they have not the classes that `classes_of` returns.
    """
    if options.data is None:
        return _Transformed(mnist()[1], View((MNIST_MEAN,), (MNIST_STD,)))
    return _test_folder(options, _config(options, model), classes_of(options))


def _digits(options: argparse.Namespace) -> ImageSets:
    for name in ("img_size", "crop_pct", "mean", "std"):
        if getattr(options, name) is not None:
            raise RunError(f"{flag_of(name)} must come with DATA, got the bundled digits")
    mean, std = (MNIST_MEAN,), (MNIST_STD,)
    try:
        policy = RandAugment.parse(options.aa, round(255 * MNIST_MEAN)) if options.aa else None
    except ValueError as error:
        raise RunError(str(error)) from error
    erase = RandomErasing(options.reprob) if options.reprob > 0 else None
    clean = View(mean, std)
    train, test = mnist()
    return ImageSets(
        classes=train.classes,
        train=train,
        test=_Transformed(test, clean),
        clean=clean,
        erased=View(mean, std, None, erase),
        augmented=View(mean, std, policy, erase),
        mean=mean,
        std=std,
    )


def _folder(options: argparse.Namespace, model: nn.Module) -> ImageSets:
    config = _config(options, model)
    base, augment, erased = training_transforms(config, aa=options.aa, reprob=options.reprob)
    _, _, clean = training_transforms(config, aa=options.aa, reprob=0.0)
    train = ImageFolder(split_folder(options.data, options.train_split), base)
    test = _test_folder(options, config, train.classes)
    return ImageSets(
        classes=train.classes,
        train=train,
        test=test,
        clean=clean,
        erased=erased,
        augmented=_Then(augment, erased),
        mean=config["mean"],
        std=config["std"],
    )


def _test_folder(
    options: argparse.Namespace, config: dict[str, Any], classes: Sequence[str]
) -> ImageFolder:
    test = ImageFolder(split_folder(options.data, options.val_split), test_transform(config))
    if list(test.classes) != list(classes):
        differing = sorted(set(classes) ^ set(test.classes))
        raise RunError(
            f"{test.path} must have the classes of the training images, got a difference in "
            f"{', '.join(differing[:5])}; add or remove these folders"
        )
    return test


def _config(options: argparse.Namespace, model: nn.Module | None) -> dict[str, Any]:
    """Return timm's input size, mean, std and crop, by the options or the model."""
    for name in ("mean", "std"):
        given = getattr(options, name)
        if given is not None and len(given) != 3:
            raise RunError(f"--{name} must hold one number for each of 3 bands, got {given}")
    return data_config(
        model, {name: getattr(options, name) for name in ("img_size", "crop_pct", "mean", "std")}
    )


class _Transformed(Dataset[tuple[Any, int]]):
    """Digits that are transformed."""

    def __init__(self, dataset: Digits, transform: Transform) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.dataset[index]
        return self.transform(image), label

    @property
    def targets(self) -> list[int]:
        """The class of every image."""
        return self.dataset.targets


@dataclass(frozen=True)
class _Then:
    """One transform after the other; a class, because loaders pickle it for their workers."""

    first: Callable[[Any], Any]
    second: Transform

    def __call__(self, image: Any) -> Tensor:
        return self.second(self.first(image))


TestImages = _Transformed | ImageFolder

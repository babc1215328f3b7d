"""Folders of images in ImageNet's layout, with timm's reader and timm's transforms."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from ..recipe.errors import RunError, require_timm

_SYNONYMS = ("val", "validation")


class ImageFolder(Dataset[tuple[Any, int]]):
    """The images under `path/<class>/`, in colour, with timm's numbers of the classes.

    Args:
        path: folder that holds a folder for each class.
        transform: applied to each image; None leaves it a PIL image.

    Raises:
        RunError: the folder, its classes or an image is missing or unreadable.
    """

    def __init__(self, path: Path, transform: Callable[[Any], Any] | None = None) -> None:
        readers = require_timm("timm.data.readers", "a folder of images")
        try:
            self.reader = readers.create_reader("", root=str(path))
        except RuntimeError as error:
            raise RunError(f"{path} must hold a folder of images a class, got none") from error
        self.path, self.transform = path, transform
        self.classes = tuple(sorted(self.reader.class_to_idx, key=self.reader.class_to_idx.get))
        found = {label for _, label in self.reader.samples}
        empty = [name for number, name in enumerate(self.classes) if number not in found]
        on_disk = {entry.name for entry in path.iterdir() if entry.is_dir()}
        empty += sorted(name for name in on_disk if name not in self.classes)
        if empty:
            raise RunError(
                f"{path} must hold an image of every class, got none of {', '.join(empty)}; "
                "remove the empty folder, there and in the other set"
            )

    @property
    def targets(self) -> list[int]:
        """The class of every image."""
        return [label for _, label in self.reader.samples]

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            file, label = self.reader[index]
            with file:
                image = Image.open(file).convert("RGB")
        # What damaged files raise: OSError, and for some formats SyntaxError or ValueError.
        except (OSError, SyntaxError, ValueError) as error:
            path = self.path / self.reader.filename(index)
            raise RunError(
                f"{path} must be an image, got {error}; remove or replace the file",
                is_of_one_rank=True,
            ) from error
        return (image if self.transform is None else self.transform(image)), label


def split_folder(root: Path, split: str) -> Path:
    """Return the folder of the training or test images, or raise."""
    names = _SYNONYMS if split in _SYNONYMS else (split,)
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise RunError(f"{root} must hold a folder {' or '.join(names)}, got none; see DATA in --help")


def class_names(path: Path) -> tuple[str, ...]:
    """Return the classes of the images under `path`, by their numbers."""
    return ImageFolder(path).classes


def data_config(model: nn.Module | None, overrides: dict[str, Any]) -> dict[str, Any]:
    """Return timm's input size, mean, std, crop and interpolation for a model."""
    data = require_timm("timm.data", "a folder of images")
    given = {name: value for name, value in overrides.items() if value is not None}
    config: dict[str, Any] = data.resolve_data_config(given, model=model)
    return config


def training_transforms(
    config: dict[str, Any], *, aa: str | None, reprob: float
) -> tuple[Callable[[Any], Any], Callable[[Any], Any], Callable[[Any], Any]]:
    """Return timm's three parts: crop and flip, augmentation, and normalization with erasing."""
    data = require_timm("timm.data", "a folder of images")
    try:
        base, augment, final = data.create_transform(
            config["input_size"],
            is_training=True,
            separate=True,
            auto_augment=aa,
            # As timm's trainer, whose defaults are not those of the function.
            interpolation="random",
            mean=config["mean"],
            std=config["std"],
            re_prob=reprob,
            re_mode="pixel",
            use_prefetcher=False,
        )
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        raise RunError(f"--aa must be a policy that timm knows, got {aa!r}: {error}") from error
    return base, augment, final


def test_transform(config: dict[str, Any]) -> Callable[[Any], Any]:
    """Return timm's way from a test image to the input of the model."""
    data = require_timm("timm.data", "a folder of images")
    transform: Callable[[Any], Any] = data.create_transform(
        config["input_size"],
        is_training=False,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_pct=config["crop_pct"],
        crop_mode=config.get("crop_mode"),
        use_prefetcher=False,
    )
    return transform

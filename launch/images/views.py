"""From an image to the view of it that each split sees.

Every draw comes from Python's `random` or torch's CPU generator, so that `SplitViews(seed=...)`
decides it.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .augment import RandAugment


@dataclass(frozen=True)
class RandomErasing:
    """The replacement of a random rectangle of a normalized image by normal noise.

    Our own lines, because kornia's costs 0.4 ms an image here and a second of import for each
    rank, and these cost 0.02 ms.

    Args:
        probability: probability that an image loses a rectangle.

    Source:
        Zhong et al. 2017, arXiv 1708.04896, with timm's ranges of area and aspect.
    """

    probability: float

    def __call__(self, image: Tensor) -> Tensor:
        """Erase in place, or do nothing, and return the image `[C, H, W]`."""
        if random.random() > self.probability:
            return image
        channels, height, width = image.shape
        # A rectangle that does not fit is drawn again, ten times at most.
        for _ in range(10):
            area = random.uniform(0.02, 1 / 3) * height * width
            aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if rows < height and columns < width:
                top, left = random.randint(0, height - rows), random.randint(0, width - columns)
                noise = torch.randn(channels, rows, columns)
                image[:, top : top + rows, left : left + columns] = noise
                break
        return image


@dataclass(frozen=True)
class View:
    """The way from an image to one view of it: augment, convert, normalize, erase.

    Args:
        mean: mean of each band, as a fraction of white.
        std: standard deviation of each band, as a fraction of white.
        augment: applied to the image; None leaves it clean.
        erase: applied to the normalized tensor; None leaves it whole.
    """

    mean: Sequence[float]
    std: Sequence[float]
    augment: RandAugment | None = None
    erase: RandomErasing | None = None

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the view `[C, H, W]`, float32."""
        if self.augment is not None:
            image = self.augment(image)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).div_(255)
        pixels = pixels.reshape(image.height, image.width, -1).permute(2, 0, 1)  # [C, H, W]
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        view = (pixels - mean[:, None, None]) / std[:, None, None]
        return view if self.erase is None else self.erase(view)

"""A shift of images: noise, inversion, contrast and blur, for domains that differ on purpose.

Every draw comes from torch's CPU generator, so that `SplitViews(seed=...)` decides it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps


@dataclass(frozen=True)
class Shift:
    """What is done to an image of the other domain, in this order.

    Args:
        invert: whether black becomes white.
        contrast: factor of the distance from the mean grey; 1 leaves it.
        blur: radius of a Gaussian blur in pixels; 0 leaves it.
        salt_and_pepper: share of the pixels that become black or white, 0 to 1.
    """

    invert: bool = False
    contrast: float = 1.0
    blur: float = 0.0
    salt_and_pepper: float = 0.0

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the shifted image."""
        if self.invert:
            image = ImageOps.invert(image)
        if self.contrast != 1:
            image = ImageEnhance.Contrast(image).enhance(self.contrast)
        if self.blur > 0:
            image = image.filter(ImageFilter.GaussianBlur(self.blur))
        return self._add_noise(image) if self.salt_and_pepper > 0 else image

    def _add_noise(self, image: Image.Image) -> Image.Image:
        pixels = np.array(image)
        # One draw a pixel, the same for all its bands.
        draw = torch.rand(pixels.shape[:2]).numpy()
        pixels[draw < self.salt_and_pepper / 2] = 0
        pixels[draw > 1 - self.salt_and_pepper / 2] = 255
        return Image.fromarray(pixels)


@dataclass(frozen=True)
class Shifted:
    """A transform of shifted images."""

    shift: Shift
    transform: Callable[[Any], torch.Tensor]

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Shift, then transform."""
        return self.transform(self.shift(image))

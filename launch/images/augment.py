"""RandAugment for single images, in timm's grammar.

Pillow computes the operations because timm's are defined by it: ours give the same image bit for
bit. Every draw comes from Python's `random`, so that `SplitViews(seed=...)` decides it. A level
is a magnitude divided by 10.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from PIL import Image, ImageEnhance, ImageOps

Fill = int | tuple[int, ...]
Operation = Callable[[Image.Image, Any, Fill], Image.Image]


def _either_sign(value: float) -> float:
    return -value if random.random() > 0.5 else value


def _affine(matrix: Callable[[float, tuple[int, int]], tuple[float, ...]]) -> Operation:
    """Return the operation that maps output to input coordinates by `matrix(argument, size)`."""

    def apply(image: Image.Image, argument: float, fill: Fill) -> Image.Image:
        resample = random.choice((Image.Resampling.BILINEAR, Image.Resampling.BICUBIC))
        coefficients = matrix(argument, image.size)
        return image.transform(
            image.size, Image.Transform.AFFINE, coefficients, resample=resample, fillcolor=fill
        )

    return apply


def _rotate(image: Image.Image, degrees: float, fill: Fill) -> Image.Image:
    resample = random.choice((Image.Resampling.BILINEAR, Image.Resampling.BICUBIC))
    return image.rotate(degrees, resample=resample, fillcolor=fill)


def _bands(image: Image.Image) -> int:
    return len(image.getbands())


def _posterize(image: Image.Image, bits: int, fill: Fill) -> Image.Image:
    # Not ImageOps.posterize: since Pillow 13 it refuses 0 bits, which the highest level asks for.
    return image.point([value & (256 - 2 ** (8 - bits)) for value in range(256)] * _bands(image))


def _solarize_add(image: Image.Image, amount: int, fill: Fill) -> Image.Image:
    brightened = [min(255, value + amount) if value < 128 else value for value in range(256)]
    return image.point(brightened * _bands(image))


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, factor, fill: kind(image).enhance(factor)


# Name: what it does to (image, argument, fill).
OPERATIONS: dict[str, Operation] = {
    "AutoContrast": lambda image, _, fill: ImageOps.autocontrast(image),
    "Equalize": lambda image, _, fill: ImageOps.equalize(image),
    "Invert": lambda image, _, fill: ImageOps.invert(image),
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": lambda image, threshold, fill: ImageOps.solarize(image, threshold),
    "SolarizeAdd": _solarize_add,
    "Color": _enhance(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    "ShearX": _affine(lambda factor, size: (1, factor, 0, 0, 1, 0)),
    "ShearY": _affine(lambda factor, size: (1, 0, 0, factor, 1, 0)),
    "TranslateXRel": _affine(lambda share, size: (1, 0, share * size[0], 0, 1, 0)),
    "TranslateYRel": _affine(lambda share, size: (1, 0, 0, 0, 1, share * size[1])),
}

# Name: from level to argument. An operation that is missing here takes none.
ARGUMENTS: dict[str, Callable[[float], float]] = {
    "Rotate": lambda level: _either_sign(level * 30.0),
    "Posterize": lambda level: int(level * 4),
    "Solarize": lambda level: min(256, int(level * 256)),
    "SolarizeAdd": lambda level: min(128, int(level * 110)),
    **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), lambda x: x * 1.8 + 0.1),
    **dict.fromkeys(("ShearX", "ShearY"), lambda level: _either_sign(level * 0.3)),
    **dict.fromkeys(("TranslateXRel", "TranslateYRel"), lambda x: _either_sign(x * 0.45)),
}

# The same for `inc1`: with these the damage grows with the level, as one would expect.
INCREASING_ARGUMENTS: dict[str, Callable[[float], float]] = {
    **ARGUMENTS,
    "Posterize": lambda level: 4 - int(level * 4),
    "Solarize": lambda level: 256 - min(256, int(level * 256)),
    **dict.fromkeys(
        ("Color", "Contrast", "Brightness", "Sharpness"),
        lambda level: max(0.1, 1.0 + _either_sign(level * 0.9)),
    ),
}


@dataclass(frozen=True)
class RandAugment:
    """`n` operations drawn for each image, each applied with probability `p`.

    Args:
        fill: grey value, or one value for each band, of the pixels that move into the image.
        m: magnitude, 0 (nothing) to `mmax`.
        n: operations for each image.
        p: probability of each operation.
        mstd: standard deviation of normal noise on the magnitude; above 100 the magnitude is drawn
            uniformly from 0 to `m`.
        mmax: upper bound of the magnitude, noise included.
        inc: whether every operation's damage grows with the magnitude.

    Source:
        Cubuk et al. 2019, arXiv 1909.13719; the grammar and the magnitude noise are timm's.
    """

    fill: Fill
    m: int = 10
    n: int = 2
    p: float = 0.5
    mstd: float = 0.0
    mmax: int = 10
    inc: int = 0

    @classmethod
    def parse(cls, spec: str, fill: Fill) -> RandAugment:
        """Read timm's notation, such as `rand-m9-mstd0.5-inc1`.

        Args:
            spec: the policy.
            fill: as of the class.

        Raises:
            ValueError: `spec` is not understood; the message lists what is.
        """
        kinds = {f.name: int if f.type == "int" else float for f in fields(cls)[1:]}
        name, *parts = spec.split("-")
        matches = [re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part) for part in parts]
        try:
            options: dict[str, Any] = {
                match[1]: kinds[match[1]](match[2]) for match in matches if match
            }
            understood = name == "rand" and None not in matches and len(options) == len(parts)
        except (KeyError, ValueError):
            understood = False
        if not understood or options.get("inc", 0) > 1 or options.get("p", 0) > 1:
            raise ValueError(
                "--aa must be 'rand' with options among -m<int> (magnitude), "
                "-n<int> (operations for each image), -p<0..1> (probability of each), "
                "-mstd<float> (noise of the magnitude), -mmax<int> (its bound) and -inc<0|1> "
                f"(damage grows with it), each at most once, got {spec!r}; "
                "try rand-m9-mstd0.5-inc1"
            )
        return cls(fill, **options)

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the image after `n` operations."""
        for name in random.choices(list(OPERATIONS), k=self.n):
            image = self.apply(name, image)
        return image

    def apply(self, name: str, image: Image.Image) -> Image.Image:
        """Return the image after one operation or, with probability `1 - p`, as it is."""
        if self.p < 1 and random.random() > self.p:
            return image
        magnitude: float = self.m
        if self.mstd > 100:
            magnitude = random.uniform(0, magnitude)
        elif self.mstd > 0:
            magnitude = random.gauss(magnitude, self.mstd)
        level = max(0.0, min(magnitude, self.mmax)) / 10
        arguments = INCREASING_ARGUMENTS if self.inc else ARGUMENTS
        argument = arguments[name](level) if name in arguments else 0
        return OPERATIONS[name](image, argument, self.fill)

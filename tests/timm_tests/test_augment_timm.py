"""Our augmentation beside timm's: the same draws must give the same image, bit for bit."""

import random

import numpy as np
import pytest
import torch
from timm_environment import timm

assert timm is not None

from PIL import Image  # noqa: E402
from timm.data import random_erasing  # noqa: E402
from timm.data.auto_augment import rand_augment_transform  # noqa: E402
from timm.loss import JsdCrossEntropy  # noqa: E402

from launch.images.augment import OPERATIONS, RandAugment  # noqa: E402
from launch.images.views import RandomErasing  # noqa: E402
from launch.recipe.losses import jsd_cross_entropy  # noqa: E402

FILL = {"L": 33, "RGB": (124, 116, 104)}


def picture(mode):
    generator = np.random.RandomState(0)
    bands = {"L": (), "RGB": (3,)}[mode]
    return Image.fromarray(generator.randint(0, 256, (28, 20, *bands), dtype=np.uint8))


def timm_operations(spec, mode):
    """timm's operations of a policy, by our names for them."""
    transform = rand_augment_transform(spec, {"img_mean": FILL[mode]})
    return {op.name.removesuffix("Increasing"): op for op in transform.ops}


def timm_image(operation, image):
    """timm's image; black where timm asks Pillow for no bits, which Pillow 13 refuses."""
    try:
        return operation(image)
    except ValueError as error:
        if operation.name.startswith("Posterize") and "bits" in str(error):
            return Image.new(image.mode, image.size)
        raise


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("inc", [0, 1])
@pytest.mark.parametrize("options", ["m0", "m3", "m9", "m10", "m9-mstd0.5", "m8-mstd101", "m9-p1"])
def test_every_operation_gives_timms_image(options, inc, mode):
    spec = f"rand-{options}-inc{inc}"
    ours, theirs = RandAugment.parse(spec, FILL[mode]), timm_operations(spec, mode)
    assert theirs.keys() == OPERATIONS.keys()
    changed = set()
    for name in OPERATIONS:
        for seed in range(12):
            random.seed(seed)
            image = ours.apply(name, picture(mode))
            random.seed(seed)
            expected = timm_image(theirs[name], picture(mode))
            assert image.tobytes() == expected.tobytes(), (name, seed)
            if image.tobytes() != picture(mode).tobytes():
                changed.add(name)
    assert len(changed) >= 3


def test_policy_defaults_are_timms():
    ours = RandAugment.parse("rand", FILL["L"])
    theirs = rand_augment_transform("rand", {"img_mean": FILL["L"]})
    assert ours.n == theirs.num_layers
    for op in theirs.ops:
        assert (ours.p, ours.m, ours.mstd) == (op.prob, op.magnitude, op.magnitude_std)


def test_erasing_gives_timms_rectangle_and_noise():
    ours = RandomErasing(0.5)
    theirs = random_erasing.RandomErasing(0.5, mode="pixel", device="cpu")
    erased = 0
    for seed in range(50):
        images = []
        for erase in (ours, theirs):
            random.seed(seed)
            torch.manual_seed(seed)
            images.append(erase(torch.zeros(3, 28, 20)))
        assert torch.equal(*images)
        erased += bool(images[0].any())
    assert 10 < erased < 40


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_consistency_loss_is_timms(smoothing):
    torch.manual_seed(0)
    logits, labels = torch.randn(12, 10), torch.randint(10, (4,)).repeat(3)
    ours = jsd_cross_entropy(logits, labels, num_splits=3, smoothing=smoothing)
    theirs = JsdCrossEntropy(num_splits=3, alpha=12, smoothing=smoothing)(logits, labels)
    torch.testing.assert_close(ours, theirs)

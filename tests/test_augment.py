import random

import pytest
import torch

pytest.importorskip("PIL", reason="the launch extra is not installed")
np = pytest.importorskip("numpy")

from PIL import Image  # noqa: E402

from launch.images.augment import ARGUMENTS, INCREASING_ARGUMENTS, OPERATIONS, RandAugment  # noqa: E402
from launch.images.sets import load_images  # noqa: E402
from launch.images.views import RandomErasing, View  # noqa: E402
from launch.recipe.models import SmallResNet  # noqa: E402
from launch.train import parse_arguments  # noqa: E402

MEAN, STD = [0.25], [0.5]


def picture(mode="L", size=28):
    generator = np.random.RandomState(0)
    bands = {"L": (), "RGB": (3,)}[mode]
    return Image.fromarray(generator.randint(0, 256, (size, size, *bands), dtype=np.uint8))


def test_policy_reads_every_option():
    policy = RandAugment.parse("rand-m9-n3-p0.7-mstd0.5-mmax15-inc1", fill=3)
    assert policy == RandAugment(fill=3, m=9, n=3, p=0.7, mstd=0.5, mmax=15, inc=1)
    assert RandAugment.parse("rand", fill=3) == RandAugment(fill=3)


@pytest.mark.parametrize(
    "spec",
    ["augmix-m3", "rand-", "rand-x3", "rand-m", "rand-m9.5", "rand-m9-m8", "rand-inc2", "rand-p2"],
)
def test_policy_that_is_not_understood_is_refused(spec):
    with pytest.raises(ValueError, match=f"--aa must be 'rand' with options among .* got '{spec}'"):
        RandAugment.parse(spec, fill=0)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_keeps_mode_and_size_at_every_magnitude(name, mode):
    fill = 9 if mode == "L" else (9, 8, 7)
    for m in (0, 5, 10):
        for inc in (0, 1):
            random.seed(m)
            image = RandAugment(fill, m=m, p=1.0, inc=inc).apply(name, picture(mode))
            assert (image.mode, image.size) == (mode, (28, 28))


def test_arguments_that_increase_leave_the_image_alone_at_magnitude_zero():
    for name in ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness"):
        harm = {True: INCREASING_ARGUMENTS, False: ARGUMENTS}
        image = OPERATIONS[name](picture(), harm[True][name](0.0), 0)
        if name != "Posterize":  # its mildest argument keeps 4 of 8 bits
            assert image.tobytes() == picture().tobytes()
        if name != "Color":  # a grey image has none
            assert OPERATIONS[name](picture(), harm[False][name](0.0), 0).tobytes() != (
                picture().tobytes()
            )


def test_posterize_to_no_bits_is_black():
    assert set(OPERATIONS["Posterize"](picture(), 0, 0).tobytes()) == {0}


def test_probability_zero_changes_nothing_and_one_always_does():
    random.seed(0)
    image = picture()
    assert RandAugment(0, n=5, p=0.0)(image).tobytes() == image.tobytes()
    assert RandAugment(0, p=1.0).apply("Invert", image).tobytes() != image.tobytes()


def test_magnitude_noise_is_bounded_by_mmax_and_zero():
    seen = []
    policy = RandAugment(0, m=9, p=1.0, mstd=5.0, inc=0)
    original = OPERATIONS["Solarize"]
    OPERATIONS["Solarize"] = lambda image, threshold, fill: seen.append(threshold) or image
    try:
        random.seed(0)
        for _ in range(200):
            policy.apply("Solarize", picture())
    finally:
        OPERATIONS["Solarize"] = original
    assert min(seen) == 0
    assert max(seen) == 256
    assert len(set(seen)) > 50


def test_magnitude_noise_above_100_is_uniform_up_to_m():
    draws = []
    policy = RandAugment(0, m=5, p=1.0, mstd=101.0)
    original = OPERATIONS["Solarize"]
    OPERATIONS["Solarize"] = lambda image, threshold, fill: draws.append(threshold) or image
    try:
        random.seed(0)
        for _ in range(400):
            policy.apply("Solarize", picture())
    finally:
        OPERATIONS["Solarize"] = original
    assert max(draws) <= 128
    assert 54 < sum(draws) / len(draws) < 74


def test_policy_draws_anew_for_each_image():
    random.seed(0)
    policy = RandAugment.parse("rand-m9-mstd0.5-inc1", fill=0)
    results = {policy(picture()).tobytes() for _ in range(20)}
    assert len(results) > 8


def test_clean_view_is_the_normalized_image():
    view = View(MEAN, STD)(picture())
    pixels = torch.from_numpy(np.array(picture(), dtype=np.float32))
    assert view.shape == (1, 28, 28)
    torch.testing.assert_close(view[0], (pixels / 255 - 0.25) / 0.5)


def test_colour_view_puts_the_bands_first():
    view = View([0.1, 0.2, 0.3], [1.0, 1.0, 1.0])(picture("RGB"))
    pixels = torch.from_numpy(np.array(picture("RGB"), dtype=np.float32)) / 255
    torch.testing.assert_close(
        view, pixels.permute(2, 0, 1) - torch.tensor([0.1, 0.2, 0.3]).reshape(3, 1, 1)
    )


def test_erasing_replaces_one_rectangle_of_a_fiftieth_to_a_third():
    random.seed(0)
    torch.manual_seed(0)
    erase = RandomErasing(1.0)
    for _ in range(100):
        gone = (erase(torch.full((1, 28, 28), 7.0)) != 7.0)[0]
        rows, columns = gone.any(dim=1).sum(), gone.any(dim=0).sum()
        assert gone.sum() == rows * columns
        assert 0.01 * 784 < gone.sum() < 0.37 * 784


def test_erasing_happens_with_its_probability():
    random.seed(0)
    erase = RandomErasing(0.25)
    erased = sum(bool((erase(torch.zeros(1, 28, 28)) != 0).any()) for _ in range(400))
    assert 70 < erased < 130


def views_of_digits(num_splits, *options, resplit=False):
    options = parse_arguments(["--aa", "rand-m9", "--reprob", "0.5", *options])
    return load_images(options, SmallResNet()).views(num_splits, resplit=resplit)


@pytest.mark.parametrize("resplit", [True, False])
def test_resplit_spares_the_first_view_from_erasing(resplit):
    views = views_of_digits(3, resplit=resplit)
    assert [view.augment is not None for view in views] == [False, True, True]
    assert [view.erase is not None for view in views] == [not resplit, True, True]


def test_single_view_is_augmented_and_erased():
    (view,) = views_of_digits(1)
    # The pixels that move in are grey like the mean of all, 0.1307 of white.
    assert view.augment == RandAugment(fill=33, m=9)
    assert view.erase == RandomErasing(0.5)

"""`launch.advprop`: its attack and its loss beside an oracle, and whole runs of two ranks."""

import copy
import json
import re
from types import SimpleNamespace

import pytest
import torch
from launches import few_digits
from networks import logits_by, network
from ranks import run_ranks
from torch.nn import functional as F

for package in ("accelerate", "matplotlib", "mlxtend", "PIL", "tensorboard", "tqdm"):
    pytest.importorskip(package, reason=f"the launch extra is not installed: no {package}")

import numpy as np  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from launch import advprop  # noqa: E402
from launch.advprop import loss_of_batch, parse_arguments  # noqa: E402
from launch.recipe.attack import Attack  # noqa: E402

MEAN, STD = (0.3, 0.5), (0.2, 0.4)


def images(rows=6, seed=1):
    """Normalized images whose pixels are within black and white."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(rows, 2, 6, 6, dtype=torch.float64, generator=generator)
    shape = (1, 2, 1, 1)
    return (pixels - torch.tensor(MEAN).view(shape)) / torch.tensor(STD).view(shape)


LABELS = torch.tensor([0, 2, 1, 1, 0, 2])


def pgd(predict, rows, labels, epsilon, step, steps, sign=1):
    """The attack on pixels of 0 to 255, one image and band after the other where it matters."""
    shape = (1, 2, 1, 1)
    mean, std = torch.tensor(MEAN).double().view(shape), torch.tensor(STD).double().view(shape)
    original = (rows * std + mean) * 255
    pixels = original.clone()
    for _ in range(steps):
        pixels.requires_grad_()
        loss = -predict((pixels / 255 - mean) / std).log_softmax(1)[range(len(rows)), labels].mean()
        (gradient,) = torch.autograd.grad(loss, pixels)
        pixels = pixels.detach() + sign * step * gradient.sign()
        pixels = torch.minimum(torch.maximum(pixels, original - epsilon), original + epsilon)
        pixels = pixels.clamp(0, 255)
    return (pixels / 255 - mean) / std


def attack_of(**changes):
    settings = {"epsilon": 8, "step_size": 3, "steps": 4, "random_start": False, "targeted": False}
    return Attack(**(settings | changes), mean=MEAN, std=STD)


def test_attack_is_projected_gradient_descent_through_one_split():
    model, rows = network(2, 2), images()
    options = options_of("--attack-steps", "4")
    seen = []

    def record(forward, *batch):
        seen.append((attack_of()(forward, *batch), attack_of()))
        return seen[-1][0]

    loss_of_batch(options, ALONE, record, model, (rows[:, None], LABELS))
    expected = pgd(lambda x: logits_by(model, 1, x), rows, LABELS, 8, 3, 4)
    torch.testing.assert_close(seen[0][0], expected, rtol=0, atol=1e-5)
    assert not torch.equal(seen[0][0], rows)


@pytest.mark.parametrize("random_start", [True, False])
@pytest.mark.parametrize("targeted", [True, False])
def test_attack_stays_within_epsilon_and_within_black_and_white(targeted, random_start):
    model, rows = network(1, 2).eval(), images()
    attack = attack_of(epsilon=20, step_size=50, targeted=targeted, random_start=random_start)
    torch.manual_seed(0)
    attacked = attack(model, rows, LABELS)
    shape = (1, 2, 1, 1)
    mean, std = torch.tensor(MEAN).view(shape), torch.tensor(STD).view(shape)
    change = ((attacked - rows) * std * 255).abs()
    assert change.max() == pytest.approx(20, rel=1e-4)
    pixels = attacked * std + mean
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    torch.manual_seed(0)
    assert torch.equal(attack(model, rows, LABELS), attacked)


def test_targeted_attack_descends_to_another_class_than_the_right_one():
    model, rows = network(1, 2).eval(), images()
    torch.manual_seed(5)
    attacked = attack_of(epsilon=60, step_size=10, steps=10, targeted=True)(model, rows, LABELS)
    torch.manual_seed(5)
    aims = (LABELS + torch.randint(1, 3, LABELS.shape)) % 3
    assert (aims != LABELS).all()
    before, after = (F.cross_entropy(model(each), aims) for each in (rows, attacked))
    assert after < before


def test_attack_leaves_parameters_gradients_and_statistics_as_they_are():
    model, rows = network(2, 2), images()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = copy.deepcopy(model.state_dict())
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    options = options_of()

    def only_attack(forward, *batch):
        attack_of()(forward, *batch)
        raise KeyError

    with pytest.raises(KeyError):
        loss_of_batch(options, ALONE, only_attack, model, (rows[:, None], LABELS))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


ALONE = SimpleNamespace(unwrap_model=lambda model: model)


def options_of(*arguments):
    options = parse_arguments(["--smoothing", "0", *arguments])
    options.norm = "auxiliary"
    return options


@pytest.mark.parametrize(("share", "attacked"), [("1", 6), ("0.5", 3), ("0.01", 1)])
@pytest.mark.parametrize("fine_grained", [True, False])
def test_loss_and_gradients_are_those_of_batch_norms_for_each_part(fine_grained, share, attacked):
    arguments = ["--adversarial-share", share]
    arguments += ["--fine-grained", "--aa", "rand-m5"] if fine_grained else []
    model = network(3 if fine_grained else 2, 2)
    clean, augmented = images(seed=1), images(seed=2)
    views = torch.stack([clean, augmented], dim=1) if fine_grained else clean[:, None]
    adversarial = images(seed=3)[:attacked]
    loss = loss_of_batch(
        options_of(*arguments), ALONE, lambda *batch: adversarial, model, (views, LABELS)
    )
    parts = [(clean, LABELS), (adversarial, LABELS[:attacked])]
    parts += [(augmented, LABELS)] if fine_grained else []
    losses = [
        -logits_by(model, split, rows).log_softmax(1)[range(len(rows)), labels]
        for split, (rows, labels) in enumerate(parts)
    ]
    expected = torch.cat(losses).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    found, others = (
        torch.autograd.grad(each, list(model.parameters())) for each in (loss, expected)
    )
    for one, other in zip(found, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--epsilon -1", r"--epsilon must be in \[0, 255\], got -1.0"),
        ("--step-size nan", r"--step-size must be in \[0, 255\], got nan"),
        ("--adversarial-share 1.5", r"--adversarial-share must be in \(0, 1\], got 1.5"),
        ("--adversarial-share 0", r"--adversarial-share must be in \(0, 1\], got 0.0"),
        ("--fine-grained", "--fine-grained must come with --aa, got no policy of augmentation"),
        ("--aa rand-m9", "--aa must come with --fine-grained, got rand-m9"),
        ("--reprob 0.5", "--reprob must come with --fine-grained, got 0.5"),
        ("--attack-steps -1", r"--attack-steps must be in \[0, 1000\], got -1"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(arguments.split())
    assert re.fullmatch(rf"error: {message}; see launch.advprop --help\n", capsys.readouterr().err)


def test_images_of_ones_own_have_defaults_of_their_own(tmp_path):
    for arguments, defaults in (([], (38, 16, 3)), ([str(tmp_path)], (4, 1, 300))):
        options = parse_arguments(arguments)
        assert (options.epsilon, options.step_size, options.epochs) == defaults


SMALL = ["--epochs", "2", "--log-interval", "3", "--lr", "0.01", "--attacked-tests", "9"]
SMALL += ["--attack-steps", "2", "--test-attack-steps", "2"]


def test_one_process_with_twice_the_batch_has_the_same_losses(tmp_path):
    losses = []
    for world_size in (1, 2):
        arguments = [*SMALL, "-b", str(32 // world_size), "--max-steps", "3"]
        arguments += ["--output", str(tmp_path / str(world_size))]
        answers = run_ranks(few_digits, world_size, tmp_path, "launch.advprop", arguments)
        assert answers[0][0] == 0, answers[0][1]
        file = tmp_path / str(world_size) / "auxiliary-seed0" / "results.json"
        losses.append(json.loads(file.read_text())["losses"])
    # Later, signs of the attack's gradient change in the last bit, and so do whole grey values.
    torch.testing.assert_close(*losses, rtol=0, atol=2e-3)


def test_variants_are_compared_and_resumed_to_the_same_bits(tmp_path):
    arguments = [*SMALL, "-b", "16", "--random-start", "--targeted", "--fine-grained"]
    arguments += ["--aa", "rand-m5", "--adversarial-share", "0.5"]
    whole = [*arguments, "--compare", "--output", str(tmp_path / "whole")]
    (code, said), _ = run_ranks(few_digits, 2, tmp_path, "launch.advprop", whole)
    assert code == 0, said
    comparison = json.loads((tmp_path / "whole" / "comparison.json").read_text())["variants"]
    assert [*comparison] == ["auxiliary", "joint", "clean"]
    assert [*comparison["joint"]] == [key for key, _, _ in advprop.COLUMNS]
    assert (tmp_path / "whole" / "summary.png").is_file()

    parts = [*arguments, "--output", str(tmp_path / "parts")]
    (code, said), _ = run_ranks(
        few_digits, 2, tmp_path, "launch.advprop", [*parts, "--max-steps", "5"]
    )
    assert code == 0, said
    (code, said), _ = run_ranks(
        few_digits, 2, tmp_path, "launch.advprop", [*parts, "--resume", "auto"]
    )
    assert code == 0, said
    states = [
        load_file(tmp_path / name / "auxiliary-seed0" / "split.safetensors")
        for name in ("whole", "parts")
    ]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    rows = [
        json.loads((tmp_path / name / "auxiliary-seed0" / "results.json").read_text())["epochs"][-1]
        for name in ("whole", "parts")
    ]
    assert rows[0]["attacked_accuracy"] == rows[1]["attacked_accuracy"]
    assert np.isfinite(rows[0]["train_loss"])

"""`launch.semi_supervised`: its loss beside an oracle, its images, and whole runs of two ranks."""

import json
import pickle
import random
import re
from types import SimpleNamespace

import pytest
import torch
from launches import few_digits
from networks import logits_by, network
from ranks import run_ranks

for package in ("accelerate", "matplotlib", "mlxtend", "PIL", "tensorboard", "tqdm"):
    pytest.importorskip(package, reason=f"the launch extra is not installed: no {package}")

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

from launch import semi_supervised  # noqa: E402
from launch.images.labelled import LabelledAndUnlabelled, divide  # noqa: E402
from launch.images.shift import Shift, Shifted  # noqa: E402
from launch.recipe.comparison import mean_and_error  # noqa: E402
from launch.recipe.consistency import pseudo_label_loss, virtual_adversary  # noqa: E402
from launch.recipe.errors import RunError  # noqa: E402
from launch.semi_supervised import loss_of_batch, parse_arguments  # noqa: E402


def batch(views=1):
    """Two labelled images, and six unlabelled ones of another mean and spread."""
    torch.manual_seed(1)
    labelled = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    unlabelled = 2 * torch.randn(2, 3, views, 1, 6, 6, dtype=torch.float64) + 1
    return labelled, torch.tensor([0, 2]), unlabelled


def gradients(loss, model):
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros(()) if each is None else each for each in found]


def options_of(*arguments):
    return parse_arguments(["--smoothing", "0", "--threshold", "0.4", *arguments])


ALONE = SimpleNamespace(unwrap_model=lambda model: model)


@pytest.mark.parametrize("targets", ["frozen", "same"])
@pytest.mark.parametrize("method", ["pseudo-label", "fixmatch"])
@pytest.mark.parametrize("norm", ["split", "joint"])
def test_loss_and_gradients_are_those_of_batch_norms_for_each_part(norm, method, targets):
    splits = 2 if norm == "split" else 1
    model, rows = network(splits, 1), batch(2 if method == "fixmatch" else 1)
    arguments = ["--norm", norm, "--method", method, "--targets", targets]
    options = options_of(*arguments, *(["--aa", "rand"] if method == "fixmatch" else []))
    options.norm = norm
    loss = loss_of_batch(options, ALONE, model, rows)

    labelled, labels, unlabelled = rows
    weak, strong = (view.flatten(0, 1) for view in (unlabelled[:, :, 0], unlabelled[:, :, -1]))
    trained = strong
    if method == "fixmatch" and targets == "same":
        trained = torch.cat([weak, strong])
    if norm == "split":
        logits, others = logits_by(model, 0, labelled), logits_by(model, 1, trained)
        sure = logits_by(model, 1, weak)
    else:
        together = logits_by(model, 0, torch.cat([labelled, trained]))
        logits, others = together.split((2, len(trained)))
        sure = logits_by(model, 0, weak)
    if targets == "same":
        sure, others = others.chunk(2) if method == "fixmatch" else (others, others)
    probabilities = sure.detach().softmax(dim=1)
    used = probabilities.max(dim=1).values >= 0.4
    assert 0 < used.sum() < len(used) or used.all()
    picked = -others.log_softmax(dim=1)[range(len(used)), probabilities.argmax(dim=1)]
    supervised = -logits.log_softmax(dim=1)[[0, 1], labels].mean()
    expected = supervised + (picked * used).sum() / len(used)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for found, other in zip(gradients(loss, model), gradients(expected, model), strict=True):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-6)


def test_frozen_targets_are_not_remembered_by_running_statistics():
    model, other = network(2, 1), network(2, 1)
    rows = batch()
    options = options_of("--targets", "frozen")
    options.norm = "split"
    loss_of_batch(options, ALONE, model, rows)
    semi_supervised.forward(other, rows[0], rows[2].flatten(0, 2), "split")
    for (name, value), (_, expected) in zip(
        model.state_dict().items(), other.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(value, expected, msg=name)
    assert model.bn.num_batches_tracked == 1


def test_vat_uses_the_gradient_of_the_divergence_and_forgets_its_passes():
    model, rows = network(2, 1), batch()
    before = model.bn.aux_bn[0].running_mean.clone()
    options = options_of("--method", "vat")
    options.norm = "split"
    loss = loss_of_batch(options, ALONE, model, rows)
    assert model.bn.num_batches_tracked == 1
    assert not torch.equal(model.bn.aux_bn[0].running_mean, before)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(each).all() for each in gradients(loss, model))


def test_virtual_adversary_steps_along_the_normalized_gradient():
    torch.manual_seed(0)
    weight = torch.randn(3, 8, dtype=torch.float64)
    images = torch.randn(5, 1, 2, 4, dtype=torch.float64)

    def forward(x):
        return x.flatten(1) @ weight.T

    torch.manual_seed(3)
    found = virtual_adversary(forward, images, forward(images), epsilon=0.7, xi=1e-2)
    torch.manual_seed(3)
    step = torch.randn_like(images)
    step = 1e-2 * step / step.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    p = forward(images).softmax(dim=1)
    q = forward(images + step).softmax(dim=1)
    # Of a linear map, the divergence's gradient is (q - p) W, over the number of rows.
    gradient = ((q - p) @ weight).view_as(images)
    unit = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(found, images + 0.7 * unit, rtol=1e-4, atol=1e-4)


def test_unsure_rows_count_zero_in_the_mean():
    sure, unsure = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.1, 0.0]])
    logits = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    loss = pseudo_label_loss(logits, torch.cat([sure, unsure]), 0.95)
    assert loss.item() == pytest.approx(-logits[0].log_softmax(0)[0].item() / 2)


def picture():
    return Image.fromarray(np.random.RandomState(0).randint(60, 200, (28, 28), dtype=np.uint8))


def test_shift_does_what_it_says():
    pixels = np.array(picture()).astype(int)
    assert np.array_equal(np.array(Shift(invert=True)(picture())), 255 - pixels)
    assert np.array_equal(np.array(Shift()(picture())), pixels)
    grey = np.array(Shift(contrast=0.0)(picture()))
    assert (grey == grey[0, 0]).all()
    assert abs(int(grey[0, 0]) - pixels.mean()) <= 1
    assert np.array(Shift(blur=2.0)(picture())).std() < 0.5 * pixels.std()
    torch.manual_seed(0)
    noisy = np.array(Shift(salt_and_pepper=0.4)(picture()))
    black, white = (noisy == 0).mean(), (noisy == 255).mean()
    assert 0.15 < black < 0.25
    assert 0.15 < white < 0.25
    kept = (noisy != 0) & (noisy != 255)
    assert np.array_equal(noisy[kept], pixels[kept])


def test_shift_is_drawn_by_torchs_generator_and_can_be_pickled():
    shifted = pickle.loads(pickle.dumps(Shifted(Shift(salt_and_pepper=0.3), np.array)))
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        random.seed(len(results))
        results.append(shifted(picture()))
    assert np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_labelled_images_are_alike_in_every_class_and_the_rest_is_unlabelled():
    targets = [number % 5 for number in range(100)]
    labelled, unlabelled = divide(targets, 12, missing_classes=1, seed=0)
    assert sorted(targets[index] for index in labelled) == sorted([0, 1, 2, 3] * 3)
    assert sorted(labelled + unlabelled) == list(range(100))
    assert divide(targets, 12, missing_classes=1, seed=1)[0] != labelled
    for number, message in ((13, "must be a multiple of the 4"), (84, "must leave enough images")):
        with pytest.raises(RunError, match=f"--labelled {message}.*, got {number}"):
            divide(targets, number, missing_classes=1, seed=0)


def test_epoch_has_every_unlabelled_image_once_and_labelled_ones_in_turn():
    images = [(torch.tensor([float(number)]), number) for number in range(20)]
    items = LabelledAndUnlabelled(
        images,
        [3, 7],
        [number for number in range(20) if number not in (3, 7)],
        mu=4,
        labelled_view=lambda image: image,
        unlabelled_views=[lambda image: image, lambda image: -image],
        seed=0,
    )
    assert len(items) == 4
    seen = [items[index] for index in range(4)]
    assert [label for _, label, _ in seen] == [3, 7, 3, 7]
    assert all(views.shape == (4, 2, 1) for _, _, views in seen)
    unlabelled = torch.cat([views[:, 0] for _, _, views in seen]).flatten().tolist()
    assert len(set(unlabelled)) == 16
    assert not {3.0, 7.0} & set(unlabelled)


def test_standard_error_is_that_of_the_mean():
    values = [0.5, 0.7, 0.9, 0.6]
    expected = float(np.std(values, ddof=1) / 2)
    assert mean_and_error(values) == pytest.approx((0.675, expected))
    assert mean_and_error([0.5]) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--mu 0", r"--mu must be in \[1, 10000\], got 0"),
        ("--salt-and-pepper 2", r"--salt-and-pepper must be in \[0, 1\], got 2.0"),
        ("--threshold nan", r"--threshold must be in \[0, 1\], got nan"),
        ("--method fixmatch", "--method must come with --aa for the strong view, got fixmatch w.*"),
        ("--aa rand-m9", "--aa must come with --method fixmatch, got rand-m9"),
        ("--method vat --reprob 0.5", "--reprob must come with --method fixmatch, got 0.5"),
        ("--norm group", r"argument --norm: invalid choice: 'group' .*"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(arguments.split())
    said = capsys.readouterr().err
    assert re.fullmatch(rf"error: {message}; see launch.semi_supervised --help\n", said), said


SMALL = ["-b", "4", "--labelled", "20", "--mu", "2", "--epochs", "2", "--lr", "0.01"]
SMALL += ["--log-interval", "3"]
NORMS = ["joint", "split", "split-shared-affine", "labelled-only-test", "separate-calls"]


def test_every_normalization_is_trained_and_compared_and_resumed_to_the_same_bits(tmp_path):
    arguments = [*SMALL, "--norm", *NORMS]
    whole = [*arguments, "--output", str(tmp_path / "whole")]
    (code, said), _ = run_ranks(few_digits, 2, tmp_path, "launch.semi_supervised", whole)
    assert code == 0, said
    assert re.search(r"^split-shared-affine +\d+\.\d+%$", said, re.MULTILINE)
    assert (tmp_path / "whole" / "summary.png").is_file()
    comparison = json.loads((tmp_path / "whole" / "comparison.json").read_text())["variants"]
    assert [*comparison] == NORMS

    # The first run ends early, the comparison is then resumed and goes on with the others.
    output = ["--output", str(tmp_path / "parts")]
    early = [*SMALL, "--norm", "split", "--max-steps", "5", *output]
    (code, said), _ = run_ranks(few_digits, 2, tmp_path, "launch.semi_supervised", early)
    assert code == 0, said
    resumed = [*SMALL, "--norm", "split", "joint", "--resume", "auto", *output]
    (code, said), _ = run_ranks(few_digits, 2, tmp_path, "launch.semi_supervised", resumed)
    assert code == 0, said
    for norm in ("split", "joint"):
        states = [
            load_file(tmp_path / name / f"{norm}-seed0" / "plain.safetensors")
            for name in ("whole", "parts")
        ]
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def semi(world_size, tmp_path, *arguments):
    """The exit code of a run in `tmp_path/run`, and what it says."""
    command = [*SMALL, "--epochs", "1", *arguments, "--output", str(tmp_path / "run")]
    return run_ranks(few_digits, world_size, tmp_path, "launch.semi_supervised", command)[0]


def test_comparison_refuses_runs_of_other_ranks_and_of_more_steps(tmp_path):
    assert semi(1, tmp_path, "--norm", "joint", "--max-steps", "4")[0] == 0
    for world_size, steps, message in (
        (2, "4", "error: ranks must be 1 as in .*results.json, got 2; start as saved"),
        (1, "3", r"error: --max-steps must be at least the 4 steps of .*results.json, got 3; rep"),
    ):
        code, said = semi(
            world_size,
            tmp_path,
            *("--norm", "joint", "split", "--resume", "auto", "--max-steps", steps),
        )
        assert code == 2
        assert re.search(message, said), said


def test_every_run_of_a_comparison_has_its_own_curves(tmp_path):
    assert semi(1, tmp_path, "--norm", "joint", "split", "--max-steps", "3")[0] == 0
    for norm in ("joint", "split"):
        folder = tmp_path / "run" / f"{norm}-seed0"
        events = EventAccumulator(str(next(folder.rglob("events.out.*")).parent)).Reload()
        assert len(events.Scalars("train/loss")) == 3
        assert not list((tmp_path / "run").glob("events.out.*"))


@pytest.mark.parametrize("norm", ["split-shared-affine", "split"])
def test_evaluation_gives_the_runs_own_accuracy(norm, tmp_path):
    """Of the known classes alone, and whether parameters are shared or not."""
    arguments = ["--norm", norm, "--missing-classes", "5", "--labelled", "5", "--max-steps", "8"]
    assert semi(1, tmp_path, *arguments)[0] == 0
    folder = tmp_path / "run" / f"{norm}-seed0"
    last = json.loads((folder / "results.json").read_text())["epochs"][-1]
    ((code, said),) = run_ranks(few_digits, 1, tmp_path, "launch.evaluate", [str(folder)])
    assert code == 0, said
    assert "20 test images" in said
    assert re.search(rf"^ +0 +{last['test_loss']:.4f} +{last['test_accuracy']:.2%}$", said, re.M)


def test_cause_of_an_earlier_failure_is_forgotten(tmp_path):
    stale = tmp_path / "run" / ".failure-of-rank-1"
    stale.parent.mkdir()
    stale.write_text("ValueError: long ago")
    assert semi(1, tmp_path, "--norm", "joint", "--max-steps", "1")[0] == 0
    assert not stale.exists()


def test_virtual_adversary_moves_sure_rows_in_half_precision_too():
    torch.manual_seed(0)
    net, images = torch.nn.Linear(20, 3), torch.randn(64, 20)
    with torch.autocast("cpu", torch.float16):
        # Probabilities near 1: without a factor, half of the gradients would be zero.
        sure = lambda x: 12 * net(x)  # noqa: E731
        adversary = virtual_adversary(sure, images, sure(images).detach(), epsilon=2.5, xi=1e-2)
    moved = (adversary - images).norm(dim=1)
    assert (moved > 2.4).float().mean() > 0.95
    assert moved.isfinite().all()


@pytest.mark.parametrize("method", ["fixmatch", "vat"])
def test_other_methods_train_on_two_ranks(method, tmp_path):
    arguments = [*SMALL, "--norm", "split", "--method", method, "--seeds", "2"]
    arguments += ["--aa", "rand-m5"] if method == "fixmatch" else []
    arguments += ["--missing-classes", "2", "--labelled", "16", "--max-steps", "3", "--invert"]
    (code, said), _ = run_ranks(
        few_digits,
        2,
        tmp_path,
        "launch.semi_supervised",
        [*arguments, "--output", str(tmp_path / "r")],
    )
    assert code == 0, said
    runs = [
        json.loads((tmp_path / "r" / f"split-seed{n}" / "results.json").read_text()) for n in (0, 1)
    ]
    assert runs[0]["losses"] != runs[1]["losses"]
    assert all(np.isfinite(run["losses"]).all() for run in runs)
    assert len(runs[0]["epochs"][-1]["divergences"]) == 9


def test_too_many_labelled_images_are_one_line(tmp_path):
    arguments = [*SMALL, "--labelled", "23", "--output", str(tmp_path / "run")]
    (code, said), _ = run_ranks(few_digits, 2, tmp_path, "launch.semi_supervised", arguments)
    assert code == 2
    assert said.splitlines()[-1] == (
        "error: --labelled must be a multiple of the 10 labelled classes, got 23"
    )

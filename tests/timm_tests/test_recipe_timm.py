"""`launch.train` on a folder of images, beside timm's own datasets, losses and layers."""

import contextlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from timm_environment import timm

for package in ("accelerate", "matplotlib", "mlxtend", "PIL", "tensorboard", "tqdm"):
    pytest.importorskip(package, reason=f"the launch extra is not installed: no {package}")

import numpy as np  # noqa: E402
from accelerate.utils import set_seed  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from timm.data import AugMixDataset, ImageDataset, create_transform  # noqa: E402
from timm.loss import JsdCrossEntropy, LabelSmoothingCrossEntropy  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.scheduler import create_scheduler_v2  # noqa: E402

from launch import evaluate, train  # noqa: E402
from launch.images.digits import Digits, mnist, write_png  # noqa: E402
from launch.images.sets import load_images  # noqa: E402
from launch.recipe.errors import RunError  # noqa: E402
from launch.recipe.losses import create_criterion  # noqa: E402
from launch.recipe.models import build_model  # noqa: E402
from launch.recipe.start import start  # noqa: E402
from sync_splitbn.data import SplitViews, merge_views  # noqa: E402

ROOT = Path(__file__).parents[2]
RECIPE = ["--aug-splits", "3", "--split-bn", "--aa", "rand-m9-mstd0.5-inc1", "--resplit"]
SMALL = ["--model", "resnet18", "--img-size", "32", "-b", "6", "--workers", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 training and 20 test images of digits in ImageNet's layout."""
    path = tmp_path_factory.mktemp("digits")
    sets = {
        name: Digits(digits.pixels[::step], digits.labels[::step])
        for name, digits, step in zip(("train", "validation"), mnist(), (67, 50), strict=True)
    }
    write_png(path, sets)
    return path


def options_of(folder, *arguments):
    return train.parse_arguments([str(folder), *SMALL, *arguments])


def seed_all(number):
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


# timm's dataset leaves the files open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("reprob", [0.0, 0.7])
def test_views_of_an_item_are_those_of_timms_dataset(reprob, folder):
    options = options_of(
        folder, "--aug-splits", "3", "--aa", "rand-m9-mstd0.5-inc1", "--reprob", str(reprob)
    )
    images = load_images(options, timm.create_model("resnet18"))
    views = SplitViews(images.train, images.views(3, resplit=False))
    theirs = AugMixDataset(ImageDataset(str(folder / "train")), num_splits=3)
    theirs.transform = create_transform(
        32,
        is_training=True,
        separate=True,
        auto_augment=options.aa,
        interpolation="random",
        re_prob=reprob,
        re_mode="pixel",
    )
    for index in (0, 17, 59):
        seed_all(index)
        found, label = views[index]
        seed_all(index)
        expected, expected_label = theirs[index]
        assert label == expected_label
        assert torch.equal(found, torch.stack(expected))


def test_resplit_spares_the_first_view_from_erasing_and_only_that(folder):
    options = options_of(folder, *RECIPE, "--aa", "rand-m0-p0", "--reprob", "1")
    images = load_images(options, timm.create_model("resnet18"))
    first, *others = SplitViews(images.train, images.views(3, resplit=True), seed=0)[5][0]
    for view in others:
        # Erased pixels are normal noise, drawn anew for each view.
        assert 0.01 < (view != first).float().mean() < 0.5
    not_spared = SplitViews(images.train, images.views(3, resplit=False), seed=0)[5][0][0]
    assert (not_spared != first).any()


@pytest.mark.parametrize("smoothing", ["0", "0.1"])
@pytest.mark.parametrize("jsd", [True, False])
def test_loss_is_timms(jsd, smoothing, folder):
    torch.manual_seed(0)
    logits = torch.randn(12, 10, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(10, (4,)).repeat(3)
    arguments = [*RECIPE, "--smoothing", smoothing] + ["--jsd-loss"] * jsd
    loss = create_criterion(options_of(folder, *arguments))(logits.float(), labels)
    if jsd:
        expected = JsdCrossEntropy(num_splits=3, smoothing=float(smoothing))(logits, labels)
    else:
        expected = LabelSmoothingCrossEntropy(float(smoothing))(logits, labels)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        *(torch.autograd.grad(each, logits)[0] for each in (loss, expected)), rtol=1e-4, atol=1e-6
    )


def first_steps(rank, world_size, arguments):
    """Three steps of the recipe, and the same with timm's own split layers, loss and optimizer."""
    options = train.parse_arguments(arguments)
    accelerator = start(options)
    set_seed(options.seed)
    task = train.prepare(options, accelerator)
    set_seed(options.seed)
    model = timm.create_model("resnet18", num_classes=10)
    model = timm.layers.convert_splitbn_model(model, 3)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1 * 6 / 256, weight_decay=2e-5)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=300,
        warmup_epochs=5,
        updates_per_epoch=len(task.loader),
    )
    criterion = JsdCrossEntropy(3, smoothing=0.1)
    task.model.train()
    task.set_epoch(0)
    found, expected = [], []
    for step, batch in zip(range(3), task.loader, strict=False):
        rows, labels = merge_views(*batch)
        for results, each, ours in ((found, task.model, True), (expected, model.train(), False)):
            loss = task.loss(each, batch) if ours else criterion(each(rows), labels)
            loss.backward()
            grads = {name: p.grad.clone() for name, p in each.named_parameters()}
            grads = {name.removeprefix("module."): grad for name, grad in grads.items()}
            which = task.optimizer if ours else optimizer
            results.append((loss.item(), which.param_groups[0]["lr"], grads))
            which.step()
            which.zero_grad()
        task.schedule.step_update(step + 1)
        scheduler.step_update(step + 1)
    return found, expected


def test_first_steps_have_timms_losses_and_gradients(folder, tmp_path):
    arguments = [str(folder), *SMALL, *RECIPE, "--jsd-loss", "--output", str(tmp_path / "run")]
    # Large enough that no channel's variance is close to 0.
    arguments += ["--img-size", "64"]
    ((found, expected),) = run_ranks(first_steps, 1, tmp_path, arguments)
    for (loss, rate, grads), (their_loss, their_rate, their_grads) in zip(
        found, expected, strict=True
    ):
        assert rate == their_rate
        assert loss == pytest.approx(their_loss, rel=1e-4)
        assert grads.keys() == their_grads.keys()
        for name, grad in grads.items():
            error = (grad - their_grads[name]).norm() / their_grads[name].norm().clamp(min=1e-6)
            assert error < 5e-3, name


def run(rank, world_size, arguments):
    """`launch.train` as a rank: its exit code and what it says of errors."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = train.main(arguments)
    # matplotlib may name fonts that another environment has left in its cache.
    lines = said.getvalue().splitlines(keepends=True)
    return code, "".join(line for line in lines if not line.startswith("findfont"))


def score(rank, world_size, arguments):
    """`launch.evaluate` as a rank: its exit code, and all that it prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = evaluate.main(arguments)
    return code, said.getvalue()


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A run of two ranks over a folder, with an average of the weights."""
    path = tmp_path_factory.mktemp("finished")
    arguments = [str(folder), *SMALL, *RECIPE, "--max-steps", "7", "--output", str(path / "run")]
    arguments += ["--model-ema", "--model-ema-decay", "0.5", "--lr", "0.01"]
    assert run_ranks(run, 2, path, arguments) == [(0, ""), (0, "")]
    return path / "run", arguments


def test_checkpoint_loads_in_timm_and_its_plain_weights_in_the_plain_model(finished):
    split = timm.layers.convert_splitbn_model(timm.create_model("resnet18", num_classes=10), 3)
    newest = finished[0] / "checkpoints" / "step-00000007"
    states = [load_file(newest / name) for name in ("model.safetensors", "ema.safetensors")]
    for state in states:
        split.load_state_dict(state, strict=True)
    # What is exported is the average.
    exported = load_file(finished[0] / "split.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in states[1].items())
    plain = timm.create_model("resnet18", num_classes=10)
    plain.load_state_dict(load_file(finished[0] / "plain.safetensors"), strict=True)
    assert torch.equal(plain.bn1.running_mean, exported["bn1.running_mean"])


def test_run_resumed_inside_an_epoch_equals_the_whole_one_bit_for_bit(finished, tmp_path):
    arguments = [*finished[1]]
    arguments[arguments.index("--output") + 1] = str(tmp_path / "run")
    steps = arguments.index("--max-steps") + 1
    for arguments[steps], resume in (("3", []), ("7", ["--resume", "auto"])):
        assert run_ranks(run, 2, tmp_path, [*arguments, *resume]) == [(0, ""), (0, "")]
    results, expected = (
        json.loads((path / "results.json").read_text()) for path in (tmp_path / "run", finished[0])
    )
    assert results["losses"] == expected["losses"]
    for name in ("split.safetensors", "plain.safetensors"):
        state, other = load_file(tmp_path / "run" / name), load_file(finished[0] / name)
        assert all(torch.equal(value, other[key]) for key, value in state.items())


def test_evaluation_of_a_run_gives_its_accuracy_and_every_split(finished, tmp_path):
    (code, said), _ = run_ranks(score, 2, tmp_path, [str(finished[0]), "-j", "0"])
    last = json.loads((finished[0] / "results.json").read_text())["epochs"][-1]
    lines = re.findall(r"^ +(\d) +([\d.]+) +([\d.]+)%$", said, re.MULTILINE)
    assert code == 0, said
    assert [split for split, _, _ in lines] == ["0", "1", "2"]
    assert float(lines[0][1]) == pytest.approx(last["ema_loss"], abs=1e-4)
    assert float(lines[0][2]) / 100 == pytest.approx(last["ema_accuracy"], abs=1e-4)
    assert len({loss for _, loss, _ in lines}) == 3
    checkpoint = str(finished[0] / "checkpoints" / "step-00000007")
    ((code, said),) = run_ranks(score, 1, tmp_path, [checkpoint, "-j", "0", "--eval-split", "0"])
    assert code == 0, said
    assert f"{last['test_loss']:.4f}" in said


def test_evaluation_of_a_file_of_weights_needs_the_model_and_the_folder(finished, folder, tmp_path):
    shutil.copy(finished[0] / "plain.safetensors", tmp_path / "plain.safetensors")
    weights = str(tmp_path / "plain.safetensors")
    arguments = [weights, str(folder), "--model", "resnet18", "--img-size", "32", "-j", "0"]
    ((code, said),) = run_ranks(score, 1, tmp_path, arguments)
    last = json.loads((finished[0] / "results.json").read_text())["epochs"][-1]
    assert code == 0, said
    assert f"{last['ema_loss']:.4f}" in said
    ((code, said),) = run_ranks(score, 1, tmp_path, [*arguments, "--model", "resnet34"])
    assert code == 2
    assert re.fullmatch(
        r"error: .*plain.safetensors must hold weights of this model, got .*; check --model and "
        r"--num-classes\n",
        said,
    )
    ((code, said),) = run_ranks(score, 1, tmp_path, [*arguments, "--eval-split", "1"])
    assert (code, said) == (2, "error: --eval-split must be in [0, 0], got 1\n")


def test_mixed_precision_channels_last_clipping_and_compilation_train(folder, tmp_path):
    arguments = [
        str(folder),
        *SMALL,
        *RECIPE,
        "--max-steps",
        "2",
        "--output",
        str(tmp_path / "run"),
    ]
    arguments += ["--mixed-precision", "bf16", "--channels-last", "--clip-grad", "1"]
    arguments += ["--torchcompile", "aot_eager", "--opt", "adamw", "--sched", "step"]
    assert run_ranks(run, 2, tmp_path, arguments) == [(0, ""), (0, "")]
    state = load_file(tmp_path / "run" / "split.safetensors")
    assert "bn1.aux_bn.1.running_mean" in state
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["mixed_precision"] == "bf16"
    assert all(np.isfinite(results["losses"]))


def test_average_of_plain_batch_norms_is_resumed_to_the_same_bits(folder, tmp_path):
    """Each rank averaged running statistics of its own, of which one rank's were saved."""
    arguments = [str(folder), *SMALL, "--model-ema", "--model-ema-decay", "0.5", "--lr", "0.01"]
    rows = []
    for name, lengths in (("whole", ["6"]), ("parts", ["2", "6"])):
        for steps in lengths:
            command = [*arguments, "--max-steps", steps, "--output", str(tmp_path / name)]
            command += ["--resume", "auto"]
            assert run_ranks(run, 2, tmp_path, command) == [(0, ""), (0, "")]
        rows.append(json.loads((tmp_path / name / "results.json").read_text())["epochs"][-1])
    assert rows[0]["ema_loss"] == rows[1]["ema_loss"]
    assert rows[0]["test_loss"] == rows[1]["test_loss"]


def test_evaluation_refuses_images_of_other_classes(finished, folder, tmp_path):
    """Without class 4, every later one had the number of the one before."""
    data = damaged(folder, tmp_path, "other-classes")
    ((code, said),) = run_ranks(score, 1, tmp_path, [str(finished[0]), str(data), "-j", "0"])
    assert code == 2
    assert "validation must have the classes of the training images, got a difference in 4" in said
    # With the names of the classes in results.json, the training images need not be there.
    shutil.rmtree(data / "train")
    shutil.copytree(folder / "validation" / "4", data / "validation" / "4")
    ((code, said),) = run_ranks(score, 1, tmp_path, [str(finished[0]), str(data), "-j", "0"])
    assert code == 0, said


def test_initial_checkpoint_is_where_the_run_starts(finished, folder, tmp_path):
    weights = finished[0] / "plain.safetensors"
    options = options_of(folder, "--initial-checkpoint", str(weights))
    model = build_model(options, num_classes=10, in_channels=3)
    assert torch.equal(model.conv1.weight, load_file(weights)["conv1.weight"])


def damaged(folder, tmp_path, kind):
    """A copy of the folder of images that lacks something."""
    copy = tmp_path / kind
    shutil.copytree(folder, copy)
    if kind == "no-validation":
        shutil.rmtree(copy / "validation")
    elif kind == "empty":
        shutil.rmtree(copy / "train")
        (copy / "train").mkdir()
    elif kind == "empty-class":
        for image in (copy / "train" / "3").iterdir():
            image.unlink()
    elif kind == "other-classes":
        shutil.rmtree(copy / "validation" / "4")
    elif kind == "no-image":
        for image in (copy / "train" / "7").iterdir():
            image.write_bytes(image.read_bytes()[:90])
    return copy


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("no-validation", [], r".* must hold a folder val or validation, got none; see DATA.*"),
        ("empty", [], r".*train must hold a folder of images a class, got none"),
        ("empty-class", [], r".*train must hold an image of every class, got none of 3; remove.*"),
        (
            "other-classes",
            [],
            r".*validation must have the classes of .*, got a difference in 4;.*",
        ),
        ("no-image", [], r".*train/7/.*png must be an image, got .*; remove or replace the file"),
        ("whole", ["--model", "resnet1"], r"--model must be small_resnet or one of timm, got .*"),
        ("whole", ["--aa", "rand-q9"], r"--aa must be a policy that timm knows, got 'rand-q9'.*"),
        (
            "whole",
            ["-b", "64"],
            r"-b must leave a whole batch for each rank, got 64 on.*",
        ),
        ("whole", ["--opt", "sgdx"], r"--opt must be sgd or one of timm, got sgdx: .*"),
        ("whole", ["--sched", "never"], r"--sched must be one of timm, got never.*"),
        (
            "whole",
            ["--opt", "adahessian"],
            r"--opt must need first derivatives alone, got adahes.*",
        ),
        ("whole", ["--sched", "plateau"], r"--sched must follow from the step alone, got plateau"),
        ("whole", ["--mean", "0.5"], r"--mean must hold one number for each of 3 bands, got .*"),
    ],
)
def test_error_of_the_user_is_one_line(kind, arguments, message, folder, tmp_path):
    data = damaged(folder, tmp_path, kind)
    arguments = [str(data), *SMALL, *RECIPE, "--output", str(tmp_path / "run"), *arguments]
    ((code, said),) = run_ranks(run, 1, tmp_path, arguments)
    assert code == 2
    assert re.fullmatch(f"error: {message}\n", said), said


def test_damaged_image_in_a_worker_is_one_line(folder, tmp_path):
    data = damaged(folder, tmp_path, "no-image")
    command = [sys.executable, "tests/run_with_timm.py", "launch.train", str(data), *SMALL]
    command += [*RECIPE, "--workers", "1", "--output", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(
        r"error: .*train/7/.*png must be an image, got .*; remove or replace the file\n",
        done.stderr,
    )


def test_folder_of_images_needs_timm(folder, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RunError, match=r"a folder of images must have timm, got .*; run pip inst"):
        load_images(options_of(folder), torch.nn.Identity())


def test_accelerate_launches_the_recipe_on_a_folder(folder, tmp_path):
    environment = os.environ | {"HF_HOME": str(tmp_path), "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", "launch/configs/two_processes.yaml", "tests/run_with_timm.py"]
    command += ["launch.train", str(folder), *SMALL, *RECIPE, "--workers", "1", "--max-steps", "3"]
    command += ["--output", str(tmp_path / "run")]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=55
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 steps an epoch of 12 images, on 2 x cpu" in done.stdout
    assert (tmp_path / "run" / "summary.png").read_bytes()[:4] == b"\x89PNG"

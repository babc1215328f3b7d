"""The training run: ranks of the gloo harness for what it computes, real launches for the rest.

The launches are those of `accelerate launch`, without the command, which timm can break.
"""

import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from launches import CONFIG, launched
from ranks import RankError, run_ranks

for package in ("matplotlib", "mlxtend", "PIL", "tensorboard", "tqdm"):
    pytest.importorskip(package, reason=f"the launch extra is not installed: no {package}")

import numpy as np  # noqa: E402
from accelerate.utils.other import load as accelerate_load  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from launch.images.digits import Digits, mnist, stratified_split  # noqa: E402
from launch.recipe.errors import RunError  # noqa: E402
from launch.recipe.failure import EXIT_ERROR  # noqa: E402
from launch.recipe.interruption import (  # noqa: E402
    EXIT_INTERRUPTED,
    Interruption,
    leave_signals_to_rank,
)
from launch.recipe.losses import jsd_cross_entropy, split_cross_entropy  # noqa: E402
from launch.recipe.models import SmallResNet  # noqa: E402
from launch.recipe.optimization import WarmupCosine, sgd  # noqa: E402
from launch.train import parse_arguments  # noqa: E402

RECIPE = ["--aug-splits", "3", "--split-bn", "--resplit", "--aa", "rand-m9-mstd0.5-inc1"]
# 90 training images in batches of 16 make 5 steps an epoch; the 37 test images divide by nothing.
TRAIN, TEST = 90, 37


def small_mnist():
    return tuple(
        Digits(
            images.pixels[:: len(images) // size][:size],
            images.labels[:: len(images) // size][:size],
        )
        for images, size in zip(mnist(), (TRAIN, TEST), strict=True)
    )


def full_mnist():
    return mnist()[0], small_mnist()[1]


def train(rank, world_size, arguments, signal_at=None, all_images=False):
    """`launch.train` as a rank; the last rank may be sent SIGTERM in a step of its own."""
    from launch import train as recipe
    from launch.images import sets
    from launch.recipe.trainer import Trainer

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size)}
    sets.mnist = full_mnist if all_images else small_mnist
    if signal_at is not None and rank == world_size - 1:
        step = Trainer._step

        def signalled(trainer, *batch):
            if trainer._steps() == signal_at - 1:
                signal.raise_signal(signal.SIGTERM)
            return step(trainer, *batch)

        Trainer._step = signalled
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = recipe.main(arguments)
    # One line for all ranks, from the first.
    if code == EXIT_ERROR and rank == 0:
        assert re.fullmatch(r"error: .+\n", said.getvalue())
        raise RunError(said.getvalue())
    return code


def run(tmp_path, world_size, output, *options, signal_at=None):
    """The exit codes of all ranks and what results.json says."""
    arguments = [*RECIPE, "-b", str(16 // world_size), "--epochs", "3", "--log-interval", "2"]
    arguments += ["--lr", "0.005"]
    arguments += ["--output", str(tmp_path / output), *options]
    codes = run_ranks(train, world_size, tmp_path, arguments, signal_at)
    return codes, json.loads((tmp_path / output / "results.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two ranks, uninterrupted, for two epochs and a bit: the folder, and the results."""
    folder = tmp_path_factory.mktemp("whole")
    codes, results = run(folder, 2, "run", "--max-steps", "12")
    assert codes == [0, 0]
    return folder / "run", results


def test_one_process_with_twice_the_batch_has_the_same_losses(tmp_path):
    losses = []
    for world_size in (1, 2):
        arguments = ["--aug-splits", "3", "--split-bn", "--resplit", "--max-steps", "10"]
        arguments += ["-b", str(128 // world_size), "--output", str(tmp_path / str(world_size))]
        assert run_ranks(train, world_size, tmp_path, arguments, None, True) == [0] * world_size
        results = json.loads((tmp_path / str(world_size) / "results.json").read_text())
        assert (results["ranks"], len(results["losses"])) == (world_size, 10)
        losses.append(results["losses"])
    torch.testing.assert_close(*losses, rtol=0, atol=1e-4)


def test_one_process_resumed_inside_the_next_epoch_agrees_with_two(whole, tmp_path):
    run(tmp_path, 1, "run", "--max-steps", "6")
    _, single = run(tmp_path, 1, "run", "--max-steps", "7", "--resume", "auto")
    # Later, single activations change sign in the last bit, and so small batches part.
    torch.testing.assert_close(single["losses"], whole[1]["losses"][:7], rtol=0, atol=1e-4)


@pytest.mark.parametrize("stop", ["signal", "epoch-end"])
def test_interrupted_and_resumed_run_equals_the_whole_one_bit_for_bit(stop, whole, tmp_path):
    if stop == "signal":
        # One rank alone is told to stop, in step 7, the second epoch's 2nd; then both look.
        codes, results = run(tmp_path, 2, "run", "--max-steps", "12", signal_at=7)
        assert codes == [EXIT_INTERRUPTED] * 2
        assert results["status"] == "interrupted"
        assert newest(tmp_path / "run") == "step-00000007"
    else:
        codes, _ = run(tmp_path, 2, "run", "--max-steps", "5")
        assert newest(tmp_path / "run") == "step-00000005"
    codes, results = run(tmp_path, 2, "run", "--max-steps", "12", "--resume", "auto")
    assert codes == [0, 0]
    assert results["losses"] == whole[1]["losses"]
    assert [exact(row) for row in results["epochs"]] == [exact(row) for row in whole[1]["epochs"]]
    for file in ("plain.safetensors", "checkpoints/step-00000012/model.safetensors"):
        assert_equal(load_file(tmp_path / "run" / file), load_file(whole[0] / file))
    for rank in range(2):
        name = f"random_states_{rank}.pkl"
        states = [last(folder, name) for folder in (tmp_path / "run", whole[0])]
        assert torch.equal(*(state["torch_manual_seed"] for state in states))
    resumed, expected = (
        last(folder, "optimizer.bin")["state"] for folder in (tmp_path / "run", whole[0])
    )
    for number, state in resumed.items():
        assert_equal(state, expected[number])


def buffers_at_evaluation(rank, world_size, arguments):
    """The sum of all running statistics that each evaluation of a run was made with."""
    from launch import train as recipe

    evaluate, sums = recipe.evaluate, []

    def spy(accelerator, model, *rest, **options):
        sums.append(sum(buffer.double().sum().item() for buffer in model.buffers()))
        return evaluate(accelerator, model, *rest, **options)

    recipe.evaluate = spy
    assert train(rank, world_size, arguments) == 0
    return sums


def test_ranks_test_one_model_where_each_has_plain_batch_norms(tmp_path):
    """Each rank was tested with running statistics of its own, and one of them was saved."""
    arguments = ["--epochs", "2", "-b", "16", "--max-steps", "4", "--output", str(tmp_path / "run")]
    first, second = run_ranks(buffers_at_evaluation, 2, tmp_path, arguments)
    assert first == second
    assert len(set(first)) == 2


def test_finished_run_is_extended_to_more_epochs(tmp_path):
    """Ended at rate 0, it goes on at the rate that the longer schedule has there."""
    options = "--warmup-epochs", "0", "--epochs"
    _, first = run(tmp_path, 1, "run", *options, "1")
    before = load_file(tmp_path / "run" / "plain.safetensors")
    longer = *options, "2", "--resume", "auto"
    _, results = run(tmp_path, 1, "run", *longer, "--max-steps", "6")
    after = load_file(tmp_path / "run" / "plain.safetensors")
    assert not torch.equal(before["head.2.weight"], after["head.2.weight"])
    _, results = run(tmp_path, 1, "run", *longer)
    assert results["losses"][:5] == first["losses"]
    assert (len(results["losses"]), len(results["epochs"])) == (10, 2)
    assert [row["lr"] for row in results["epochs"]] == pytest.approx([0, 0], abs=1e-9)
    with pytest.raises(RankError, match=r"--epochs must be 2 as in .*, got 1; start as saved"):
        run(tmp_path, 1, "run", *options, "1", "--resume", "auto")


def last(folder, name):
    return torch.load(folder / "checkpoints" / "step-00000012" / name, weights_only=False)


def newest(folder):
    return max(path.name for path in (folder / "checkpoints").iterdir())


def exact(row):
    """A row without the clock's share of it."""
    return {key: row[key] for key in row.keys() - {"seconds", "images_per_second", "loading"}}


def assert_equal(state, other):
    assert state.keys() == other.keys()
    for name, value in state.items():
        assert torch.equal(value, other[name]), name


def test_plain_weights_infer_with_split_0_and_count_each_test_image_once(whole):
    model = SmallResNet()
    model.load_state_dict(load_file(whole[0] / "plain.safetensors"), strict=True)
    test = small_mnist()[1]
    pixels = torch.from_numpy(test.pixels[:, None].astype(np.float32)) / 255
    labels = torch.from_numpy(test.labels.astype(np.int64))
    with torch.no_grad():
        logits = model.eval()((pixels - 0.1307) / 0.3081)
    row = whole[1]["epochs"][-1]
    accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
    assert row["test_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert row["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-5)


def test_exported_weights_say_what_they_are_and_need(whole):
    for name, which in (("plain", "with plain batch norms"), ("split", "with all splits")):
        file = whole[0] / f"{name}.safetensors"
        with safe_open(file, "pt") as weights:
            metadata = weights.metadata()
        assert metadata["model"] == '"small_resnet"'
        assert json.loads(metadata["mean"]) == [0.1307]
        assert json.loads(metadata["std"]) == [0.3081]
        assert which in metadata["weights"]
        assert file.stat().st_mode == (whole[0] / "results.json").stat().st_mode


def test_checkpoint_loads_without_unpickling_foreign_code(whole):
    for path in (whole[0] / "checkpoints" / "step-00000012").iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            load_file(path)
        else:
            # weights_only, with the types of NumPy's random state allowed.
            assert accelerate_load(path, map_location="cpu")


def test_run_leaves_two_checkpoints_a_picture_and_events(whole):
    folder, results = whole
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert checkpoints == ["step-00000010", "step-00000012"]
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "checkpoints",
        "plain.safetensors",
        "results.json",
        "split.safetensors",
        "summary.png",
        "tensorboard",
    ]
    assert (folder / "summary.png").read_bytes()[:4] == b"\x89PNG"
    assert list((folder / "tensorboard").glob("events*"))
    assert results["status"] == "complete"
    assert results["arguments"]["aug_splits"] == 3
    assert results["versions"]["torch"] == torch.__version__
    divergences = results["epochs"][-1]["divergences"]
    assert len(divergences) == 9
    assert all([*pairs] == ["0-1", "0-2", "1-2"] for pairs in divergences.values())


def test_run_without_splits_trains_plain_batch_norms(tmp_path):
    arguments = ["--max-steps", "2", "--output", str(tmp_path / "run"), "-b", "8"]
    assert run_ranks(train, 2, tmp_path, arguments) == [0, 0]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "divergence" not in results["epochs"][-1]
    assert math.isfinite(results["losses"][-1])


def test_consistency_loss_trains(tmp_path):
    codes, results = run(tmp_path, 2, "run", "--max-steps", "2", "--jsd-loss")
    assert codes == [0, 0]
    assert all(math.isfinite(loss) for loss in results["losses"])


def test_broken_loss_ends_the_run_on_every_rank(tmp_path):
    with pytest.raises(RankError, match=r"loss must stay finite, got .* at step .*; lower --lr"):
        run(tmp_path, 2, "run", "--lr", "1e30", "--momentum", "0")


def test_other_world_size_is_refused_on_every_rank(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    with pytest.raises(RankError, match=r"ranks must be 2 as in .*, got 3; .* start as saved"):
        run(tmp_path, 3, "run", "--resume", "auto")


def test_run_killed_after_its_last_checkpoint_finishes_what_is_missing(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    for name in ("plain.safetensors", "split.safetensors", "results.json", "summary.png"):
        (tmp_path / "run" / name).unlink()
    codes, results = run(tmp_path, 2, "run", "--max-steps", "12", "--resume", "auto")
    assert codes == [0, 0]
    assert results["losses"] == whole[1]["losses"]
    assert [exact(row) for row in results["epochs"]] == [exact(row) for row in whole[1]["epochs"]]
    for name in ("plain.safetensors", "split.safetensors"):
        assert_equal(load_file(tmp_path / "run" / name), load_file(whole[0] / name))
    assert (tmp_path / "run" / "summary.png").is_file()


def test_batch_larger_than_the_data_is_refused(tmp_path):
    arguments = ["--output", str(tmp_path / "run"), "-b", "64"]
    with pytest.raises(RankError, match=r"-b must leave a whole batch for each rank"):
        run_ranks(train, 2, tmp_path, arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--aug-splits 1", "--aug-splits must be 0 or at least 2, got 1"),
        ("--split-bn", "--split-bn must come with --aug-splits of at least 2, got 0"),
        ("--resplit", "--resplit must come with --aug-splits of at least 2, got 0"),
        ("--jsd-loss", "--jsd-loss must come with --aug-splits of at least 2, got 0"),
        ("--reprob 1.5", r"--reprob must be in \[0, 1\], got 1.5"),
        ("--seed -1", r"--seed must be in \[0, 4294967295\], got -1"),
        ("--epochs 0", r"--epochs must be at least 1, got 0"),
        ("--lr nan", r"--lr must be at least 0, got nan"),
        ("--momentum 2", r"--momentum must be in \[0, 1\], got 2.0"),
        ("--weight-decay -1", r"--weight-decay must be at least 0, got -1.0"),
        ("--warmup-epochs inf", r"--warmup-epochs must be at least 0, got inf"),
        ("--clip-grad 0", r"--clip-grad must be positive, got 0.0"),
        ("--eval-split 1 --aug-splits 2", r"--eval-split must be in \[0, 0\], got 1"),
        ("--tracker none", r"argument --tracker: invalid choice: 'none' \(choose from .*\)"),
        ("nowhere", "DATA must be a folder of images, got nowhere, which is none"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(arguments.split())
    assert re.fullmatch(rf"error: {message}; see launch.train --help\n", capsys.readouterr().err)


def test_help_explains_every_option_with_its_default(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for option, value in vars(parse_arguments([])).items():
        assert option == "data" or f"--{option.replace('_', '-')}" in shown
        if value is not None and value is not False:
            assert re.search(rf"\(default: {value}[;,) ]", shown), option


def test_mnist_is_divided_alike_in_every_run_with_equal_shares():
    train_images, test_images = mnist()
    assert np.bincount(train_images.labels).tolist() == [400] * 10
    assert np.bincount(test_images.labels).tolist() == [100] * 10
    # Fixed for good: results of different versions are comparable.
    assert stratified_split(np.arange(40) % 4, 0.2)[1].tolist() == [7, 8, 10, 13, 14, 21, 27, 32]
    image, label = train_images[0]
    assert (image.mode, image.size, label) == ("L", (28, 28), 0)


def test_consistency_loss_is_the_divergence_of_each_split_from_the_mixture():
    torch.manual_seed(0)
    logits, labels = torch.randn(12, 10, dtype=torch.float64), torch.randint(10, (12,))
    parts = logits.softmax(dim=1).chunk(3)
    mixture = sum(parts) / 3
    divergence = sum((p * (p / mixture).log()).sum(dim=1).mean() for p in parts) / 3
    expected = F.cross_entropy(logits[:4], labels[:4], label_smoothing=0.1) + 12 * divergence
    loss = jsd_cross_entropy(logits.float(), labels, num_splits=3, smoothing=0.1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    same = jsd_cross_entropy(logits[:4].repeat(3, 1), labels, num_splits=3)
    torch.testing.assert_close(same, split_cross_entropy(logits[:4], labels[:4]))


def test_schedule_rises_for_the_warm_up_and_falls_to_zero():
    optimizer = sgd(torch.nn.Linear(2, 2), lr=0.5, momentum=0.9, weight_decay=0.1)
    schedule = WarmupCosine(optimizer, warmup=4, total=10)
    rates = []
    for step in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step_update(step + 1)
    assert rates == pytest.approx(
        [
            0.1,
            0.2,
            0.3,
            0.4,
            0.5,
            *[0.25 * (1 + math.cos(math.pi * step / 6)) for step in range(1, 6)],
        ]
    )
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0)


def test_weight_decay_spares_biases_and_batch_norms():
    decayed, spared = sgd(SmallResNet(), lr=0.1, momentum=0, weight_decay=1.0).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (1.0, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2, 4}
    assert {p.dim() for p in spared["params"]} == {1}
    assert len(spared["params"]) == 2 * 9 + 1


def test_data_workers_outlive_ctrl_c_and_die_with_their_rank():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with Interruption(lambda: ""):
            leave_signals_to_rank(0)
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        assert {number: signal.getsignal(number) for number in before} == before


def begin(rank, world_size, accelerators, environment, *arguments):
    """`recipe.start` on a machine with so many accelerators: the device and what it says."""
    from launch.recipe import start

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), **environment}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size)}
    start._accelerators = lambda: accelerators
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        accelerator = start.start(parse_arguments(["--output", "unused", *arguments]))
    return accelerator.device.type, said.getvalue()


def test_more_ranks_than_accelerators_train_on_the_cpu_and_say_so(tmp_path):
    (device, said), other = run_ranks(begin, 2, tmp_path, 1, {})
    assert (device, other) == ("cpu", ("cpu", ""))
    assert said == (
        "1 accelerator(s) for 2 local ranks: training on the CPU; "
        "pass --num_processes 1 to use them\n"
    )
    assert run_ranks(begin, 2, tmp_path, 0, {}) == [("cpu", "")] * 2


def test_tracker_that_is_not_installed_is_refused(tmp_path):
    with pytest.raises(RankError, match=r"--tracker must be installed, got clearml, which is not"):
        run_ranks(begin, 2, tmp_path, 0, {}, "--tracker", "clearml")


def test_gradient_accumulation_is_refused(tmp_path):
    environment = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}
    with pytest.raises(RankError, match=r"gradient_accumulation_steps must be 1, .* got 2; use"):
        run_ranks(begin, 1, tmp_path, 0, environment)


def launch(tmp_path, *arguments):
    """The exit code and the output of `accelerate launch`."""
    with launched(tmp_path, *arguments) as (process, log):
        return process.wait(90), log.read_text()


def test_ctrl_c_leaves_a_checkpoint_that_the_same_command_resumes(tmp_path):
    command = ["--config_file", CONFIG, "-m", "launch.train", *RECIPE, "--log-interval", "1"]
    command += ["-b", "16", "--workers", "1", "--output", str(tmp_path / "run")]
    with launched(tmp_path, *command) as (process, log):
        while "steps an epoch" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        # As a terminal does it: to the launcher, the ranks and their workers alike.
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(25) != 0
        assert "interrupted after step" in log.read_text()
    step = int(newest(tmp_path / "run").removeprefix("step-"))
    code, output = launch(tmp_path, *command, "--resume", "auto", "--max-steps", str(step + 2))
    assert code == 0, output
    assert re.search(rf", from .*step-{step:08d}\n", output)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["ranks"], len(results["losses"])) == (2, step + 2)


def test_launcher_that_starts_one_process_for_two_is_refused(tmp_path):
    code, output = launch(tmp_path, "--cpu", "--num_processes", "2", "-m", "launch.train", *RECIPE)
    assert code != 0
    assert "the launcher must start num_processes ranks, got 1" in output
    assert f"run accelerate launch --config_file {CONFIG} -m launch.train {' '.join(RECIPE)}" in (
        output
    )


def test_ranks_that_believe_they_are_alone_are_refused(tmp_path):
    script = tmp_path / "alone.py"
    script.write_text(
        "from accelerate import Accelerator\n"
        "from launch.recipe.start import check_world\n"
        "check_world(Accelerator())\n"
    )
    code, output = launch(
        tmp_path,
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--main_process_port",
        "0",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        script,
    )
    assert code != 0
    assert "accelerate must see all 2 ranks, got 1" in output
    assert f"ACCELERATE_USE_CPU=true accelerate launch --config_file {CONFIG}" in output


def test_run_without_an_output_finds_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_arguments([]).output == Path("runs/train")
    assert parse_arguments(["--resume", "auto"]).output == Path("runs/train")
    for name in ("train", "train-2"):
        (tmp_path / "runs" / name / "checkpoints" / "step-00000010").mkdir(parents=True)
    assert parse_arguments([]).output == Path("runs/train-3")
    assert parse_arguments(["--resume", "auto"]).output == Path("runs/train-2")
    one = "runs/train/checkpoints/step-00000010"
    assert parse_arguments(["--resume", one]).output == Path("runs/train")
    run = parse_arguments(["--resume", "runs/train"])
    assert (run.output, run.resume) == (Path("runs/train"), "auto")
    assert parse_arguments(["--output", "elsewhere"]).output == Path("elsewhere")


def test_restarted_ranks_find_the_folder_in_which_their_launcher_began(tmp_path, monkeypatch):
    """They went on with an older run, where theirs had no checkpoint yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    (tmp_path / "runs" / "train" / "checkpoints" / "step-00000010").mkdir(parents=True)
    (tmp_path / "runs" / "train" / ".lock").write_text("process 7 on host\n1\n")
    options = parse_arguments([])
    assert (options.output, options.resume) == (Path("runs/train-2"), "auto")
    # Where the run before had no checkpoint either, its folder is the first free one.
    for name in ("train-2", "train-3"):
        (tmp_path / "runs" / name).mkdir()
    (tmp_path / "runs" / "train-3" / ".lock").write_text(f"process 8 on host\n{os.getppid()}\n")
    assert parse_arguments([]).output == Path("runs/train-3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--resume", "runs/none"],
            "--resume must be 'auto', or the folder of a run or of a check",
        ),
        (["--aug-split", "3"], "unrecognized arguments: --aug-split"),
    ],
)
def test_mistyped_argument_is_refused_and_leaves_nothing(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(arguments)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_error_of_the_user_is_said_by_another_rank_if_the_first_is_silent(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    # Without a launcher, nothing ends the first rank before it has spoken.
    for launcher in (False, True):
        if launcher:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        with pytest.raises(SystemExit, match=str(EXIT_ERROR)):
            parse_arguments(["--lr", "-1"])
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == len(waited) == launcher
        assert all(line.startswith("error: --lr must be at least 0, ") for line in lines)


def test_fewer_outputs_than_classes_are_refused(tmp_path):
    arguments = ["--num-classes", "5", "--output", str(tmp_path / "run")]
    with pytest.raises(RankError, match="--num-classes must be at least the 10 classes of the im"):
        run_ranks(train, 1, tmp_path, arguments)

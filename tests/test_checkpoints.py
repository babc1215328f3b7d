"""Checkpoints: which one is chosen, what damage is found, and what a fault while saving leaves."""

import json
import os
import random

import pytest
import torch

for package in ("accelerate", "safetensors"):
    pytest.importorskip(package, reason=f"the launch extra is not installed: no {package}")

from launch.recipe import checkpoints as module  # noqa: E402
from launch.recipe.checkpoints import Checkpoints, Progress, damage  # noqa: E402
from launch.recipe.errors import RunError  # noqa: E402

OPTIONS = {"--lr": 0.1}


class OneRank:
    """As much of an accelerator as a checkpoint needs."""

    is_main_process = True
    process_index = 0

    def __init__(self, error=None):
        self.error = error

    def save_state(self, folder):
        for name in ("model.safetensors", "optimizer.bin", "random_states_0.pkl"):
            with open(os.path.join(folder, name), "wb") as file:
                file.write(random.Random(name).randbytes(1000))
                if self.error is not None and name.startswith("optimizer"):
                    raise self.error


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(module, "gather_object", lambda values: values)


def checkpoints_of(folder, error=None, **options):
    return Checkpoints(OneRank(error), folder / "checkpoints", options or OPTIONS)


@pytest.fixture
def saved(tmp_path):
    """A folder with the checkpoints of steps 3 and 7, and what a run that died left."""
    checkpoints = checkpoints_of(tmp_path)
    for steps in (3, 7):
        checkpoints.save(Progress(losses=[1.0] * steps))
    (tmp_path / "checkpoints" / "step-00000009.partial").mkdir()
    return tmp_path


def test_auto_resumes_the_newest_whole_checkpoint_or_starts_anew(saved, tmp_path):
    assert checkpoints_of(saved)._choose("auto").name == "step-00000007"
    empty = Checkpoints(OneRank(), tmp_path / "none", {})
    assert empty._choose("auto") is None
    assert empty._choose(None) is None


@pytest.mark.parametrize(
    ("resume", "message"),
    [
        (None, "--output must be a folder without checkpoints, got .*; pass --resume auto"),
        ("nowhere", "--resume must be 'auto' or the path of a checkpoint, got .*nowhere"),
        ("step-00000003", "--resume must name the newest checkpoint of --output, .*; pass another"),
        ("step-00000009.partial", "--resume must name a whole checkpoint, got .*json is missing"),
    ],
    ids=["overwrite", "missing", "older", "partial"],
)
def test_choice_that_would_harm_a_run_is_refused(resume, message, saved):
    path = None if resume is None else str(saved / "checkpoints" / resume)
    with pytest.raises(RunError, match=message):
        checkpoints_of(saved)._choose(path)


def test_checkpoint_of_a_run_with_other_options_is_refused(saved):
    with pytest.raises(RunError, match=r"--lr must be 0.1 as in .*, got 0.2; start as saved"):
        checkpoints_of(saved, **{"--lr": 0.2})._choose("auto")


def test_run_may_become_longer_and_not_shorter(tmp_path, capsys):
    checkpoints_of(tmp_path, **{"--epochs": 2}).save(Progress(losses=[1.0]))
    assert checkpoints_of(tmp_path, **{"--epochs": 3})._choose("auto") is not None
    assert capsys.readouterr().out.startswith("extended from 2 to 3 epochs: from here on the")
    with pytest.raises(RunError, match=r"--epochs must be 2 as in .*, got 1; start as saved"):
        checkpoints_of(tmp_path, **{"--epochs": 1})._choose("auto")


def test_checkpoint_without_this_ranks_random_states_is_refused(saved):
    checkpoints = checkpoints_of(saved)
    checkpoints.accelerator.process_index = 1
    with pytest.raises(RunError, match=r"must hold random_states_1.pkl, got none; start with as"):
        checkpoints.load(checkpoints._choose("auto"))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def garbage(path):
    path.write_bytes(b"\xff\x00garbage")


@pytest.mark.parametrize("harm", [cut, empty, flip_a_bit, garbage, os.unlink])
@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "optimizer.bin",
        "random_states_0.pkl",
        "progress.json",
        "manifest.json",
    ],
)
def test_damaged_checkpoint_is_passed_over_or_refused(name, harm, saved, capsys):
    newest = saved / "checkpoints" / "step-00000007"
    harm(newest / name)
    with pytest.raises(RunError, match=r"--resume must name a whole checkpoint, got .*0007: "):
        checkpoints_of(saved)._choose(str(newest))
    checkpoints = checkpoints_of(saved)
    assert checkpoints._choose("auto").name == "step-00000003"
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"passed over {newest}: ")
    assert line.endswith("; kept as step-00000007.damaged")
    # The run that goes on reaches the same step again.
    checkpoints.save(Progress(losses=[1.0] * 7))
    assert checkpoints_of(saved)._choose("auto").name == "step-00000007"


def test_full_disk_is_one_line_and_leaves_the_checkpoint_before(saved):
    checkpoints = checkpoints_of(saved, OSError(28, "No space left on device"))
    checkpoints.last = saved / "checkpoints" / "step-00000007"
    with pytest.raises(RunError) as caught:
        checkpoints.save(Progress(losses=[1.0] * 8))
    assert str(caught.value) == (
        f"{saved}/checkpoints/step-00000008 must be written, got OSError: [Errno 28] No space left "
        f"on device; {checkpoints.last} is whole"
    )
    assert checkpoints_of(saved)._choose("auto").name == "step-00000007"


class Killed(BaseException):
    """The process is gone: no handler of the code runs after it."""


def kill_at(number, monkeypatch):
    """End the save at its `number`-th change of the disk; return whether it came so far."""
    calls = []
    for owner, name in (
        (os, "fsync"),
        (os, "rename"),
        (os, "mkdir"),
        (os, "unlink"),
        (os, "rmdir"),
    ):
        original = getattr(owner, name)

        def counted(*args, _original=original, **kwargs):
            calls.append(1)
            if len(calls) >= number:
                raise Killed
            return _original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
    return calls


def test_killed_at_any_change_of_the_disk_a_whole_checkpoint_is_left(tmp_path):
    for number in range(1, 60):
        folder = tmp_path / str(number)
        checkpoints = checkpoints_of(folder)
        for steps in (3, 7):
            checkpoints.save(Progress(losses=[1.0] * steps))
        with pytest.MonkeyPatch.context() as patch:
            kill_at(number, patch)
            try:
                checkpoints.save(Progress(losses=[1.0] * 9))
                ended = False
            except Killed:
                ended = True
        found = checkpoints_of(folder)._choose("auto")
        assert found is not None
        assert found.name in ("step-00000007", "step-00000009")
        assert damage(found) is None
        # The next run cleans up after the dead one.
        checkpoints_of(folder).save(Progress(losses=[1.0] * 11))
        names = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert len(names) == 2, names
        if not ended:
            break
    assert number > 10
    assert not ended


def test_files_of_a_checkpoint_are_described_by_size_and_checksum(saved):
    folder = saved / "checkpoints" / "step-00000007"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest.keys() == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert manifest["model.safetensors"]["bytes"] == 1000


def test_average_of_the_weights_is_saved_and_restored(tmp_path):
    checkpoints = checkpoints_of(tmp_path)
    checkpoints.ema = torch.nn.Linear(3, 2)
    expected = {name: value.clone() for name, value in checkpoints.ema.state_dict().items()}
    checkpoints.save(Progress(losses=[1.0]))
    checkpoints.ema.weight.data.zero_()
    checkpoints.accelerator.load_state = lambda path: None
    checkpoints.load(checkpoints._choose("auto"))
    assert all(
        torch.equal(value, expected[name]) for name, value in checkpoints.ema.state_dict().items()
    )

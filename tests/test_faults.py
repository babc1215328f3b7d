"""Launches that are hurt: a launcher or a rank killed, two runs in one folder, a rank that hangs.

Each is a real `accelerate launch` of two ranks in a process group of its own.
"""

import contextlib
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from launches import CONFIG, ROOT, launched

for package in ("matplotlib", "mlxtend", "PIL", "tensorboard", "tqdm"):
    pytest.importorskip(package, reason=f"the launch extra is not installed: no {package}")

TRAIN = ["-b", "16", "--aug-splits", "2", "--split-bn", "--log-interval", "1"]
# Python of a rank that runs the recipe, after some lines of its own.
RANK = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from launch import train
from launch.recipe import failure
from launch.recipe.report import Report
from launch.recipe.run import leave
from launch.recipe.trainer import Trainer
rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
{lines}
leave(train.main())
"""
BEFORE_STEP = """
step = Trainer._step
def hurt(trainer, batch):
    {body}
    return step(trainer, batch)
Trainer._step = hurt
"""
SLOW_TO_SAY_WHY_IT_ENDS = """
say, write = failure._print, Report.write
def slow_say(text):
    time.sleep(3)
    say(text)
def slow_write(report, status=None, **entries):
    if status == "interrupted":
        time.sleep(3)
    write(report, status, **entries)
if rank == 0:
    failure._print, Report.write = slow_say, slow_write
"""


def script_of_rank(tmp_path, lines):
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(root=str(ROOT), lines=lines))
    return str(script)


def hurt(tmp_path, body):
    """The script of a rank to which `body` happens before a step."""
    return script_of_rank(tmp_path, BEFORE_STEP.format(body=body))


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def ranks_of(output):
    """The living processes that were started with this output."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if str(output).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def own_lines(text):
    """What the ranks said, without the launcher's banner and traceback."""
    return [line for line in text.splitlines() if line.startswith(("error: ", "still in"))]


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_ranks_of_a_killed_launcher_save_and_end_and_the_folder_is_free_again(tmp_path):
    command = ["-m", "launch.train", *TRAIN, "--output", str(tmp_path / "run")]
    with launched(tmp_path, "--config_file", CONFIG, *command) as (process, log):
        wait_for(lambda: "steps an epoch" in log.read_text())
        # A second run in the same folder is refused while the first one lives.
        with launched(tmp_path, "--config_file", CONFIG, *command) as (second, second_log):
            assert second.wait(40) != 0
        (line,) = own_lines(second_log.read_text())
        assert re.fullmatch(
            r"error: --output must be of one run at a time, got .*/run, in use by process \d+ on "
            r".*; end that run, or pass another --output",
            line,
        )
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
        wait_for(lambda: not ranks_of(tmp_path / "run"), 15)
        assert "interrupted after step" in log.read_text()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["status"] == "interrupted"
    steps = max(int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").iterdir())
    command += ["--resume", "auto", "--max-steps", str(steps + 1)]
    with launched(tmp_path, "--config_file", CONFIG, *command) as (process, log):
        assert process.wait(90) == 0, log.read_text()


def test_restarted_ranks_go_on_to_the_same_bits(tmp_path):
    """One rank is killed in its first life, once in a step and once before any checkpoint."""
    losses = []
    for number, body in enumerate(
        (
            "pass",
            "if attempt == 0 and rank == 1 and trainer._steps() == 5:\n"
            "        os.kill(os.getpid(), signal.SIGKILL)",
            "if attempt == 0 and rank == 0 and trainer._steps() == 1:\n"
            "        os.kill(os.getpid(), signal.SIGKILL)",
        )
    ):
        output = tmp_path / str(number)
        command = ["--max_restarts", "2", hurt(tmp_path, body), *TRAIN, "--max-steps", "8"]
        command += ["--save-interval", "3", "--output", str(output)]
        with launched(tmp_path, "--config_file", CONFIG, *command) as (process, log):
            assert process.wait(90) == 0, log.read_text()
        assert ("step-00000003" in log.read_text()) == (number == 1)
        results = json.loads((output / "results.json").read_text())
        assert results["status"] == "complete"
        losses.append(results["losses"])
    assert losses[1] == losses[0]
    assert losses[2] == losses[0]


def test_error_on_one_rank_is_said_first_by_it_and_named_by_the_others(tmp_path):
    body = "if rank == 1 and trainer._steps() == 2: raise KeyError('no such thing')"
    command = [hurt(tmp_path, body), *TRAIN, "--output", str(tmp_path / "run")]
    with launched(tmp_path, "--config_file", CONFIG, *command) as (process, log):
        assert process.wait(90) != 0
    text = log.read_text()
    assert text.count("KeyError: 'no such thing'") >= 1
    for line in own_lines(text):
        assert line == "error: rank 0 ended, because rank 1 failed: KeyError: 'no such thing'"
        assert text.index("KeyError") < text.index(line)
    assert "closed by peer" not in text
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["status"] in ("failed", "interrupted")


def test_error_of_the_user_is_one_line_from_one_rank(tmp_path):
    output = tmp_path / "file"
    output.write_text("")
    for arguments, message in (
        (["-b", "5000"], r"-b must leave a whole batch for each rank, got 5000 .*"),
        (["--output", str(output)], r"--output must be a folder, got .*, which is a file; .*"),
        (["--lr", "-1"], r"--lr must be at least 0, got -1.0; see launch.train --help"),
    ):
        command = ["-m", "launch.train", "--output", str(tmp_path / "run"), *arguments]
        with launched(tmp_path, "--config_file", CONFIG, *command) as (process, log):
            assert process.wait(90) != 0
        (line,) = own_lines(log.read_text())
        assert re.fullmatch(f"error: {message}", line)
        assert re.findall(r"exitcode +: (\d+)", log.read_text()) in (["2"], ["2", "2"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--lr", "-1"], "--lr must be at least 0, "), (["-b", "5000"], "-b must leave ")],
)
def test_error_of_the_user_is_said_by_a_slow_first_rank(tmp_path, arguments, message):
    """The launcher kills it as soon as the other one has ended."""
    command = [
        script_of_rank(tmp_path, SLOW_TO_SAY_WHY_IT_ENDS),
        *arguments,
        "--output",
        str(tmp_path / "run"),
    ]
    with launched(tmp_path, "--config_file", CONFIG, *command) as (process, log):
        assert process.wait(90) != 0
    (line,) = own_lines(log.read_text())
    assert line.startswith(f"error: {message}")


def test_interrupted_rank_leaves_the_first_one_time_to_write_its_results(tmp_path):
    """The signal comes to one rank alone, not by the launcher, which would wait for all."""
    command = [
        script_of_rank(tmp_path, SLOW_TO_SAY_WHY_IT_ENDS),
        *TRAIN,
        "--output",
        str(tmp_path / "run"),
    ]
    with launched(tmp_path, "--config_file", CONFIG, *command) as (process, log):
        wait_for(lambda: "steps an epoch" in log.read_text())
        (rank,) = (
            each
            for each in ranks_of(tmp_path / "run")
            if b"\0RANK=1\0" in Path(f"/proc/{each}/environ").read_bytes()
        )
        os.kill(rank, signal.SIGTERM)
        assert process.wait(90) != 0
    assert "interrupted after step" in log.read_text()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["status"] == "interrupted"


def test_run_that_diverges_says_so_in_its_results(tmp_path):
    command = ["-m", "launch.train", *TRAIN, "--output", str(tmp_path / "run")]
    command += ["--lr", "1e30", "--momentum", "0"]
    with launched(tmp_path, "--config_file", CONFIG, *command) as (process, log):
        assert process.wait(90) != 0
    (line,) = own_lines(log.read_text())
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["status"] == "failed"
    assert results["reason"] == line.removeprefix("error: ")
    assert re.fullmatch(
        r"loss must stay finite, got \S+ at step \d+; lower --lr", results["reason"]
    )


def test_slow_steps_are_interrupted_within_seconds_whatever_the_log_interval(tmp_path):
    command = [hurt(tmp_path, "time.sleep(1)"), *TRAIN, "--output", str(tmp_path / "run")]
    command += ["--log-interval", "10000"]
    with launched(tmp_path, "--config_file", CONFIG, *command) as (process, log):
        wait_for(lambda: "steps an epoch" in log.read_text())
        time.sleep(5)
        os.kill(process.pid, signal.SIGTERM)
        process.wait(20)
        assert "interrupted after step" in log.read_text()


def test_rank_that_hangs_says_so_before_the_launcher_kills_it(tmp_path):
    body = "if rank == 1 and trainer._steps() == 2: time.sleep(1000)"
    command = [hurt(tmp_path, body), *TRAIN, "--output", str(tmp_path / "run")]
    with launched(tmp_path, "--config_file", CONFIG, *command) as (process, log):
        wait_for(lambda: (tmp_path / "run" / "results.json").is_file())
        time.sleep(5)
        os.kill(process.pid, signal.SIGTERM)
        process.wait(90)
    lines = own_lines(log.read_text())
    assert lines
    assert all(
        re.fullmatch(r"still in a step 20 s after the signal to end: \d steps done, .*", line)
        for line in lines
    )

"""Several machines: two network namespaces as nodes, and the SLURM script with stand-ins."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

for package in ("matplotlib", "mlxtend", "PIL", "tensorboard", "tqdm"):
    pytest.importorskip(package, reason=f"the launch extra is not installed: no {package}")

ROOT = Path(__file__).parents[1]


@pytest.mark.timeout(150)
def test_two_nodes_have_the_losses_of_one(tmp_path):
    process = subprocess.Popen(
        ["bash", "tests/several_nodes.sh", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = process.communicate(timeout=140)
    except subprocess.TimeoutExpired:
        # SIGTERM, so that the script removes the namespaces.
        process.terminate()
        raise
    if process.returncode == 77:
        pytest.skip(said.strip())
    assert process.returncode == 0, said
    assert "two nodes and one have the same losses" in said


COMMANDS = {
    # Two nodes, as srun starts the command on each.
    "srun": 'shift 2; for node in 0 1; do SLURM_NODEID=$node "$@" & done; wait',
    "scontrol": 'echo "scontrol $*" >>"$LOG"; if [ "$1" = show ]; then echo first; echo second; fi',
    "scancel": 'echo "scancel $*" >>"$LOG"; touch "$LOG.end"',
    "accelerate": 'echo "accelerate $*" >>"$LOG"; for i in $(seq 100); do '
    '[ -z "${WAIT:-}" ] || [ -e "$LOG.end" ] && break; sleep 0.1; done; exit "${CODE:-0}"',
}


def submit(tmp_path, **environment):
    """The SLURM script, started with commands that write down how they are called."""
    for name, body in COMMANDS.items():
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f"#!/usr/bin/env bash\n{body}\n")
        command.chmod(0o755)
    environment |= {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "LOG": str(tmp_path / "log"),
    }
    environment |= {"SLURM_JOB_NODELIST": "first,second", "SLURM_NNODES": "2"}
    environment |= {"SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "17"}
    environment |= {"SLURM_CPUS_PER_TASK": "8"}
    return subprocess.Popen(
        ["bash", "launch/configs/slurm.sh", "-m", "launch.train", "--output", "a folder"],
        cwd=ROOT,
        env=environment,
    )


def test_slurm_script_starts_a_launcher_on_each_node(tmp_path):
    assert submit(tmp_path).wait(20) == 0
    calls = (tmp_path / "log").read_text().splitlines()
    for node in (0, 1):
        assert (
            "accelerate launch --config_file launch/configs/several_nodes.yaml --num_machines 2 "
            f"--machine_rank {node} --num_processes 8 --main_process_ip first "
            "--main_process_port 20017 -m launch.train --output a folder --resume auto"
        ) in calls
    assert not any("requeue" in call for call in calls)


def test_slurm_script_has_the_run_saved_before_it_is_queued_again(tmp_path):
    process = submit(tmp_path, WAIT="1")
    for _ in range(100):
        if (tmp_path / "log").exists() and (tmp_path / "log").read_text().count("accelerate") == 2:
            break
        time.sleep(0.1)
    process.send_signal(10)  # SIGUSR1, as SLURM sends it before the time is over
    assert process.wait(20) == 0
    calls = (tmp_path / "log").read_text().splitlines()
    assert calls[-2:] == ["scancel --signal=TERM 17.0", "scontrol requeue 17"]

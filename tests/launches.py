"""Starts the commands of `launch` as a user does, and cleans up behind them."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIG = "launch/configs/two_processes.yaml"


@contextlib.contextmanager
def launched(tmp_path, *arguments):
    """`accelerate launch` in a session of its own, its output in a file.

    Not by the command, which timm can break.
    """
    environment = {key: value for key, value in os.environ.items() if key != "ACCELERATE_USE_CPU"}
    environment |= {"HF_HOME": str(tmp_path), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    log = tmp_path / f"log-{time.monotonic_ns()}"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        yield process, log
    finally:
        # The ranks have sessions of their own, and end with their launcher.
        process.kill()
        process.wait(10)


def few_digits(rank, world_size, recipe, arguments):
    """A recipe as a rank, on 200 digits and 40 test images: its exit code, and what it prints."""
    from launch.images import sets
    from launch.images.digits import Digits, mnist

    sets.mnist = lambda: tuple(
        Digits(images.pixels[::step], images.labels[::step])
        for images, step in zip(mnist(), (20, 25), strict=True)
    )
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = importlib.import_module(recipe).main(arguments)
    return code, said.getvalue()

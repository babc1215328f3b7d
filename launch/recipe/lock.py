"""One run for each output folder, at any time."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from .errors import RunError

_NAME = ".lock"


def launcher_of(folder: Path) -> int | None:
    """Return the process that started the ranks of the last run in a folder, as far as known."""
    try:
        _, launcher = (folder / _NAME).read_text().splitlines()
        return int(launcher)
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def locked(accelerator: Accelerator, folder: Path) -> Iterator[None]:
    """Hold a folder for this run, by a file that the main process locks while it lives.

    Raises:
        RunError: another run holds it, or it cannot be written; on all ranks.
    """
    with contextlib.ExitStack() as stack:
        problem = None
        if accelerator.is_main_process:
            problem = _acquire(folder, stack)
        (problem,) = broadcast_object_list([problem])
        if problem is not None:
            raise RunError(problem)
        yield


def _acquire(folder: Path, stack: contextlib.ExitStack) -> str | None:
    """Lock the folder until `stack` ends, or return why it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context((folder / _NAME).open("a+"))
    except OSError as error:
        return f"--output must be a folder that can be written, got {folder}: {error.strerror}"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.readline().strip()
        return (
            f"--output must be of one run at a time, got {folder}, in use by {holder}; "
            "end that run, or pass another --output"
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n{os.getppid()}\n")
    file.flush()
    return None

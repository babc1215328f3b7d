"""How a run fails: the rank with the cause says it in one line, the others name that rank."""

import contextlib
import errno
import os
import re
import sys
import time
import traceback
from pathlib import Path

from .errors import RunError

EXIT_ERROR = 2
# What gloo and NCCL say where another process is gone, and what accelerate makes of it.
_LOST = re.compile(
    r"connection (was )?(closed|reset)|broken pipe|socket|remote process|peer|timed? ?out|nccl",
    re.IGNORECASE,
)
_WAIT = 5.0
_WAIT_FOR_FIRST = 10.0
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def clear_causes(folder: Path) -> None:
    """Remove what an earlier run left; called before any rank can fail."""
    for path in folder.glob(_name("*")):
        path.unlink(missing_ok=True)


def report_failure(error: Exception, folder: Path | None) -> int:
    """Print why this rank ends, and return its exit code.

    Args:
        error: what ended it. A `RunError` is one line, from the first rank if all of them met it.
            The loss of the connection to another rank is one line that names the cause. Anything
            else has its traceback.
        folder: output of the run, where ranks find each other's causes; None if it has none yet.
    """
    rank = int(os.environ.get("RANK", "0"))
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        error = RunError(f"{folder} must have room, got {error}", is_of_one_rank=True)
    if isinstance(error, RunError):
        message = reason(error)
        if error.is_of_one_rank or _is_from_worker(error):
            _tell(folder, rank, message)
            _print(f"error: {message}")
        else:
            say_once(message)
        return EXIT_ERROR
    if _is_lost_connection(error):
        _print(f"error: rank {rank} ended, because {_cause(folder, rank, error)}")
        return EXIT_ERROR
    _tell(folder, rank, reason(error))
    _print("".join(traceback.format_exception(error)).rstrip())
    return 1


def say_once(message: str) -> None:
    """Print an error that all ranks meet, on the first one.

    The launcher kills all ranks as soon as one has ended. So the others wait before they end, and
    say it themselves if they still live: the first rank may be stuck, or on another node.
    """
    if os.environ.get("RANK", "0") != "0":
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return
        # One after the other, so that one of them has ended before the next one speaks.
        time.sleep(_WAIT_FOR_FIRST + int(os.environ["LOCAL_RANK"]))
    _print(f"error: {message}")


def reason(error: BaseException) -> str:
    """Return an error as one line."""
    text = str(error).strip()
    if isinstance(error, RunError):
        # A loader's worker passes its traceback on as the message of the error.
        return text.splitlines()[-1].partition(": ")[2] if _is_from_worker(error) else text
    first = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {first}"


def _is_from_worker(error: RunError) -> bool:
    return str(error).startswith("Caught ")


def _is_lost_connection(error: Exception) -> bool:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return world > 1 and isinstance(error, RuntimeError) and bool(_LOST.search(str(error)))


def _cause(folder: Path | None, rank: int, error: Exception) -> str:
    """Return what another rank told, after a short wait for it."""
    deadline = time.monotonic() + _WAIT
    while folder is not None and time.monotonic() < deadline:
        for path in sorted(folder.glob(_name("*"))):
            if path.name != _name(rank):
                return f"rank {path.name.split('-')[-1]} failed: {path.read_text()}"
        time.sleep(0.1)
    return f"another rank is gone ({reason(error)})"


def _tell(folder: Path | None, rank: int, text: str) -> None:
    """Leave the cause where other ranks look for it; a full disk must not hide the cause itself."""
    if folder is not None:
        with contextlib.suppress(OSError):
            (folder / _name(rank)).write_text(text)


def _name(rank: int | str) -> str:
    return f".failure-of-rank-{rank}"


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

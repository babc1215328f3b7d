"""Ctrl-C and SIGTERM as a request: the step is finished, a checkpoint written, the run ended."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

# "Try again later": the run is not broken, it waits to be resumed.
EXIT_INTERRUPTED = 75
# The launcher kills ranks that have not ended 30 s after it was told to end.
_PATIENCE = 20.0
_PR_SET_PDEATHSIG = 1


class Interruption:
    """A scope that remembers whether SIGINT or SIGTERM has come.

    A second signal changes nothing: one Ctrl-C reaches a rank twice, from the terminal and from
    the launcher. If the scope is not left in time, because a step hangs, a line says so.

    Args:
        describe: says where the run stands, for that line.
    """

    def __init__(self, describe: Callable[[], str]) -> None:
        self.requested = False
        self._describe = describe
        self._left = threading.Event()

    def __enter__(self) -> "Interruption":
        self._previous = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        # Python calls `_note` between two of its own instructions: never while a collective waits.
        # The pipe is written to by the signal itself.
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._previous_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._left.set()
        # Not by closing the pipe: data workers, forked meanwhile, hold it open too.
        os.write(self._write, b"\0")
        self._watcher.join()
        os.close(self._write)
        os.close(self._read)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def _watch(self) -> None:
        """Wait for a signal, and report if the scope is not left soon after it."""
        if os.read(self._read, 1) and not self._left.wait(_PATIENCE):
            print(
                f"still in a step {_PATIENCE:.0f} s after the signal to end: {self._describe()}",
                file=sys.stderr,
                flush=True,
            )


def end_with_launcher() -> None:
    """Have a rank told to end, by SIGTERM, when the launcher that started it is gone.

    Without a launcher it does nothing: `nohup` lets a run outlive its shell.
    """
    has_launcher = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys()
    if has_launcher and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def leave_signals_to_rank(worker: int) -> None:
    """Make a data worker outlive Ctrl-C, so that its rank can finish the step, but not its rank.

    Args:
        worker: number of the worker, as `DataLoader(worker_init_fn=...)` passes it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # It inherits the pipe of `Interruption`.
    signal.set_wakeup_fd(-1)

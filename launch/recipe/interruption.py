"""Ctrl-C and SIGTERM as a request: the step is finished, a checkpoint written, the run ended."""

import signal
from types import FrameType, TracebackType

# "Try again later": the run is not broken, it waits to be resumed.
EXIT_INTERRUPTED = 75


class Interruption:
    """A scope that remembers whether SIGINT or SIGTERM has come.

    A second signal changes nothing: one Ctrl-C reaches a rank twice, from the terminal and from
    the launcher, and the launcher kills ranks that take longer than 30 seconds.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "Interruption":
        self._previous = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


def leave_signals_to_rank(worker: int) -> None:
    """Make a data worker outlive Ctrl-C, so that its rank can finish the step, but not its rank.

    Args:
        worker: number of the worker, as `DataLoader(worker_init_fn=...)` passes it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

"""Signals that end a run: SIGTERM of a scheduler, SIGINT of Ctrl-C, SIGHUP of a closed terminal.

While a step is running a signal is only noted: the step is finished, the run is saved, then it
stops. Everywhere else it stops at once. A second Ctrl-C does so too.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")  # not every system has all of them


class StoppedError(RuntimeError):
    """A run that a signal has ended.

    Args:
        message: What is left of the run.
        number: The signal.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.exit_code = 128 + number


class Stop:
    """Whether the run shall stop.

    Attributes:
        number: The signal that came; 0 before one did.
        deferred: Whether a signal is only noted.
    """

    def __init__(self) -> None:
        self.number = 0
        self.deferred = False

    @contextmanager
    def later(self) -> Iterator[None]:
        """Notes a signal, for whoever looks at `number`."""
        before, self.deferred = self.deferred, True
        try:
            yield
        finally:
            self.deferred = before

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """Notes a signal, or ends the run."""
        again = self.number == number == signal.SIGINT
        self.number = number
        if again or not self.deferred:
            raise self.error("--resume goes on from the last checkpoint, if there is one")

    def error(self, left: str) -> StoppedError:
        """The error that ends the run."""
        name = signal.Signals(self.number).name
        return StoppedError(f"stopped by {name}; {left}", self.number)


@contextmanager
def watched_signals() -> Iterator[Stop]:
    """Handles the signals until the end; what the caller had set is set again.

    Signals that are ignored, as SIGHUP is under nohup, stay so. Outside of the main thread, where
    Python handles no signals, nothing changes.
    """
    stop, before = Stop(), {}
    if threading.current_thread() is threading.main_thread():
        for name in SIGNALS:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, stop.handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_to_the_main_process() -> None:
    """In a process that loads samples: signals to the whole group are for the process that trains, which ends this one."""
    for name in SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)

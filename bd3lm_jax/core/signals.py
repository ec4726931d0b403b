"""Signals that ask a long command to stop, received so that it can first put in order what it has begun."""

import signal
import threading
from types import FrameType


class Signals:
    """While this context is open, SIGINT, SIGTERM and SIGHUP (a closed terminal) only go to the list `received`.

    Outside the main thread, which alone may handle signals, nothing is received.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self):
        self.received: list[int] = []
        self._came, self._previous = threading.Event(), {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._add) for number in self.NUMBERS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def wait(self, seconds: float) -> None:
        """Until the first signal, at most so long."""
        self._came.wait(seconds)

    def _add(self, number: int, _: FrameType | None) -> None:
        self.received.append(number)
        self._came.set()

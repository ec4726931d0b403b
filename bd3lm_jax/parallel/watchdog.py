"""A thread that ends a process which no longer gets anywhere: a collective whose other side is gone waits for ever."""

import faulthandler
import os
import sys
import threading
import time

from bd3lm_jax.core.errors import WatchdogTimeout

CHECKS = 50  # at the clock within the time limit


class Watchdog:
    """Ends the process with exit code 75 when `done` was not called for `seconds` (0: never); a context manager.

    The stacks of all threads go to stderr first. what: for the message, e.g. "no step finished". Time in which the
    whole process was stopped (Ctrl-Z, a suspended machine) does not count.
    """

    def __init__(self, seconds: float, what: str):
        self._seconds, self._what = seconds, what
        self._progress, self._closed, self._thread = threading.Event(), threading.Event(), None

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def done(self) -> None:
        """Something finished: the time runs anew."""
        self._progress.set()

    def _watch(self) -> None:
        interval = self._seconds / CHECKS
        waited, last = 0.0, time.monotonic()
        while not self._closed.wait(interval):
            now = time.monotonic()
            waited, last = waited + min(now - last, 5 * interval), now
            if self._progress.is_set():
                self._progress.clear()
                waited = 0.0
            if waited >= self._seconds:
                self._terminate()

    def _terminate(self) -> None:
        print("stacks of all threads:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        print(f"error: {self._what} within {self._seconds:g} s: run the same command again", file=sys.stderr)
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(WatchdogTimeout.exit_code)

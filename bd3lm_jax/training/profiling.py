"""A trace of a few training steps, for people: which operation took how long, on the devices and on the host."""

import os
from pathlib import Path

import jax

from bd3lm_jax.core.errors import RunError
from bd3lm_jax.core.log import note
from bd3lm_jax.training.callbacks import Callback, Progress

FIRST, STEPS = 3, 4  # the first steps compile and warm up


class Profiler(Callback):
    """Writes WORKDIR/profile from `num` steps, `first_step` being the first (num 0: nothing); a context manager.

    Only the first process traces. A run that ends earlier leaves a trace of what it did.
    """

    def __init__(self, workdir: str | os.PathLike, first_step: int, num: int):
        self.directory = Path(workdir).absolute() / "profile"
        self._first, self._last = first_step, first_step + num
        self._annotation = None

    def before_step(self, now: Progress) -> None:
        """Waits for the steps so far where the trace begins and ends."""
        step, pending = now.step, now.state
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
            if step >= self._last:
                jax.block_until_ready(pending)
                self._stop()
                return
        elif step != self._first or step >= self._last or jax.process_index() > 0:
            return
        else:
            jax.block_until_ready(pending)
            self._start()
        self._annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
        self._annotation.__enter__()

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
            self._stop()

    def _start(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(self.directory, create_perfetto_trace=True)
        except (OSError, RuntimeError) as error:
            raise RunError(f"cannot trace into {self.directory}: {error}; run without --profile") from None

    def _stop(self) -> None:
        self._annotation = None
        jax.profiler.stop_trace()
        traces = sorted(self.directory.rglob("perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime)
        note(f"trace of steps {self._first} to {self._last - 1} in {traces[-1] if traces else self.directory}: open it "
             f"at ui.perfetto.dev, or: pip install xprof; xprof {self.directory}")

"""What happens around the steps of a run: the loop (train.py) knows callbacks, and each of them one concern."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from bd3lm_jax.checkpoints.checkpoint import Checkpoints, items_of
from bd3lm_jax.core.log import RunLog
from bd3lm_jax.core.state import TrainState
from bd3lm_jax.parallel import replicas
from bd3lm_jax.parallel.distributed import Stop
from bd3lm_jax.parallel.watchdog import Watchdog
from bd3lm_jax.training.noise import NoiseSelector
from bd3lm_jax.training.validation import Validator


@dataclasses.dataclass
class Progress:
    """Where a run is, handed to every callback, which may change it.

    step: updates launched. finished: updates done and metrics of the newest step whose metrics were read, None if none
    was. valid: the validation of this step, {} without one. noise: what is used from then on, for metrics. losses: the
    latest ones; they travel with the checkpoint, so that a resumed run logs the same.
    """

    state: TrainState
    losses: list[float]
    step: int = 0
    is_last: bool = False
    is_stopping: bool = False
    finished: tuple[int, dict[str, float]] | None = None
    valid: dict = dataclasses.field(default_factory=dict)
    noise: dict = dataclasses.field(default_factory=dict)


class Callback:
    """Called around steps; does nothing unless a subclass says what.

    every: the call itself is due when so many steps are done. at_end, at_stop: it is due after the last step, and when
    the run is to stop. waits: it needs the step to be finished, so the loop waits for it when this is due.
    """

    every: int = 1
    at_end: bool = False
    at_stop: bool = False
    waits: bool = False

    def is_due(self, now: Progress) -> bool:
        return now.step % self.every == 0 or self.at_end and now.is_last or self.at_stop and now.is_stopping

    def at_start(self, now: Progress) -> None:
        """Before the first step of this start."""

    def before_step(self, now: Progress) -> None:
        """Before a step is launched."""

    def after_launch(self, now: Progress) -> None:
        """A step was launched, and `now.finished` is the one before it."""

    def __call__(self, now: Progress) -> None:
        """The loop has waited for the step that `now.finished` is, and this callback is due."""


def call_due(callbacks: Sequence[Callback], now: Progress) -> None:
    """Every callback that is due, in order; what one changes decides about those behind it."""
    now.valid, now.noise = {}, {}
    for callback in callbacks:
        if callback.is_due(now):
            callback(now)


class ReplicaCheck(Callback):
    """Copies of the state on several devices are the same after the first step of this start."""

    def __init__(self, start: int, devices: int):
        self.first = start + 1 if devices > 1 else None

    def after_launch(self, now: Progress) -> None:
        if now.step == self.first:
            replicas.check(items_of(now.state), f"found after step {now.step}, the first of this start")


class Alive(Callback):
    """Tells the watchdog that steps finish, and looks for a save in the background that failed."""

    def __init__(self, watchdog: Watchdog, checkpoints: Checkpoints):
        self.watchdog, self.checkpoints = watchdog, checkpoints

    def after_launch(self, now: Progress) -> None:
        self.watchdog.done()
        self.checkpoints.check()


class Validation(Callback):
    """The bound on the validation split, every `eval.every` steps; SIGTERM ends it without a result."""

    at_end, waits = True, True

    def __init__(self, validator: Validator, every: int, stop: Stop, before_first_step: bool):
        self.validator, self.every, self.stop, self.before_first_step = validator, every, stop, before_first_step

    def at_start(self, now: Progress) -> None:
        """What foreign weights are worth."""
        if self.before_first_step:
            now.valid = self.validator(now.state, is_final=False)

    def __call__(self, now: Progress) -> None:
        if not now.is_stopping:
            now.valid = self.stop.run_unless_stopped(lambda: self.validator(now.state, is_final=now.is_last), {})
        now.is_stopping = now.is_stopping or self.stop.signalled.is_set()


class NoiseSelection(Callback):
    """Noise chosen from the data where that needs passes of its own; due with every validation."""

    at_end = True

    def __init__(self, selector: NoiseSelector, every: int, batch: Callable[[int], dict]):
        self.selector, self.every, self.batch = selector, every, batch

    def __call__(self, now: Progress) -> None:
        now.state, now.noise = self.selector(now.state, self.batch, now.step)


class Saving(Callback):
    """Checkpoints, every `checkpoint.every` steps, at the end and when the run is to stop.

    metadata: of a state, what stands beside it.
    """

    at_end = at_stop = waits = True

    def __init__(self, checkpoints: Checkpoints, every: int, log: RunLog, watchdog: Watchdog, validator: Validator,
                 metadata: Callable[[TrainState], dict[str, Any]]):
        self.checkpoints, self.every, self.log, self.watchdog = checkpoints, every, log, watchdog
        self.validator, self.metadata = validator, metadata

    def __call__(self, now: Progress) -> None:
        self.log.sync()
        self.checkpoints.save(now.step, now.state, {**self.metadata(now.state), "losses": now.losses},
                              wait=now.is_last or now.is_stopping,
                              bound=self.validator.best_checkpoint_bound(now.state, now.valid, now.is_last))
        self.watchdog.done()

"""Trackers: where the metrics of a run go beside metrics.jsonl, by their names in `log.trackers`.

A new tracker is one function and one line in TRACKERS.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from bd3lm_jax.core.errors import lookup
from bd3lm_jax.core.log import note


class Tracker(Protocol):
    """Takes the metrics of one start of a run."""

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """What metrics.jsonl gets for `step` updates: names such as "train/loss" and numbers or lists of them."""
        ...

    def close(self) -> None:
        """After the last step, also when the run was stopped or failed."""
        ...


# name -> f(run directory, config as nested dict, updates done at this start: 0 for a new run) -> Tracker
TRACKERS: dict[str, Callable[[Path, dict[str, Any], int], Tracker]] = {}


def check(names: Sequence[str]) -> None:
    """UserError for a name that nobody has registered."""
    for name in names:
        lookup(TRACKERS, name, "tracker log.trackers")


class Trackers:
    """The trackers of a run; a context manager. One that fails is named in a warning and dropped: the run goes on."""

    def __init__(self, names: Sequence[str], workdir: Path, config: dict[str, Any], start_step: int):
        self._open: dict[str, Tracker] = {}
        for name in names:
            self._guard(name, lambda name=name: self._open.update({name: TRACKERS[name](workdir, config, start_step)}))

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *exception: object) -> None:
        for name, tracker in list(self._open.items()):
            self._guard(name, tracker.close)

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Hand the line of a step to every tracker."""
        for name, tracker in list(self._open.items()):
            self._guard(name, lambda tracker=tracker: tracker.metrics(step, values))

    def _guard(self, name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            self._open.pop(name, None)
            note(f"warning: tracker '{name}' failed and gets nothing more: {type(error).__name__}: {error}")

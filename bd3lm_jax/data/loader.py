"""Batches as a function of (seed, step) and of nothing else, so the step is all that a resumed run needs."""

import collections
import functools
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from bd3lm_jax.data.mixture import MixedRows
from bd3lm_jax.data.order import rows_at
from bd3lm_jax.data.rows import TokenRows

ARRAYS = ("tokens", "segments", "positions")
EXTRA = ("density", "prompt")  # where the rows were prepared with them


def row_ids(num_rows: int, batch: int, seed: int, step: int) -> np.ndarray:
    """int64 [batch]: rows of a step. Every epoch is a new permutation of all rows; a batch may straddle epochs."""
    return rows_at(num_rows, seed, _positions(batch, step))


def mixed_row_ids(rows: MixedRows, batch: int, seed: int, step: int) -> np.ndarray:
    """int64 [batch]: rows of a step, from every source in its share; the epochs are those of each source."""
    return rows.ids_at(seed, _positions(batch, step))


def _positions(batch: int, step: int) -> np.ndarray:
    return np.arange(step * batch, (step + 1) * batch, dtype=np.int64)


class Loader:
    """`get(step)` -> row ids [B] and the arrays `tokens`, `segments`, `positions` (int32 [B, L]) of the batch, with
    `density` and `prompt` (float32 [B, L]) if the rows were prepared with them.

    With a `sharding` (over [B, L]) they are global jax arrays, of which a process reads only the rows that lie on its
    own devices; without one they are NumPy arrays.
    """

    def __init__(self, rows: TokenRows, batch: int, seed: int, sharding):
        self.rows, self.batch, self.seed, self.sharding = rows, batch, seed, sharding

    def get(self, step: int) -> tuple[np.ndarray, dict]:
        ids = self._ids(step)
        if self.sharding is None:
            return ids, read_rows(self.rows, ids)
        return ids, place_rows(self.rows, ids, self.sharding)

    def _ids(self, step: int) -> np.ndarray:
        if isinstance(self.rows, MixedRows):
            return mixed_row_ids(self.rows, self.batch, self.seed, step)
        return row_ids(len(self.rows), self.batch, self.seed, step)


def read_rows(rows: TokenRows, ids: np.ndarray) -> dict[str, np.ndarray]:
    """`tokens`, `segments` and `positions`, int32 [n, L], of the given rows, and those of EXTRA that they have."""
    return {name: getattr(rows, name)(ids) for name in array_names(rows)}


def array_names(rows: TokenRows) -> tuple[str, ...]:
    """Names of the arrays of a batch of these rows."""
    return ARRAYS + tuple(name for name in EXTRA if getattr(rows, f"has_{name}", False))


def place_rows(rows: TokenRows, ids: np.ndarray, sharding) -> dict:
    """As `read_rows`, as jax arrays sharded over all processes; reads only what this process's devices hold."""
    import jax

    @functools.cache
    def read(start: int | None, stop: int | None) -> dict[str, np.ndarray]:
        return read_rows(rows, ids[start:stop])

    def place(name: str):
        def part(index: Any) -> np.ndarray:
            return read(index[0].start, index[0].stop)[name][:, index[1]]

        return jax.make_array_from_callback((len(ids), rows.length), sharding, part)

    return {name: place(name) for name in array_names(rows)}


def prefetch(get: Callable[[int], object], start: int, stop: int, workers: int, depth: int) -> Generator:
    """`get(start)`, ..., `get(stop - 1)` in order, computed up to `depth` steps ahead in `workers` threads.

    An exception in `get` is raised here, at its step.
    """
    with ThreadPoolExecutor(workers) as pool:
        pending = collections.deque()
        try:
            for step in range(start, stop):
                pending.append(pool.submit(get, step))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

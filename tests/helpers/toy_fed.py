"""What training was fed: hashes of the rows of every step, wherever they lay. Also a command of ours, so recorded.

    python tests/helpers/toy_fed.py FILE train --config=...

With TOY_UNREADABLE=STEP in its environment the process cannot read that checkpoint, which others can; with TOY_UNLIKE
it does not say in which environment it computes.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np

from bd3lm_jax.checkpoints.checkpoint import Checkpoints
from bd3lm_jax.data.loader import Loader
from bd3lm_jax.parallel import replicas
from launch.__main__ import launch


def record(path) -> None:
    """From now on every batch of this process appends a line to `path`: its step, and its rows' hashes by number."""
    get = Loader.get

    def recorded(self, step):
        ids, batch = get(self, step)
        line = json.dumps([step, _hashes(batch)]) + "\n"
        with open(path, "a") as file:
            file.write(line)
        return ids, batch

    Loader.get = recorded


def _hashes(batch: dict) -> dict[str, str]:
    """SHA-256 by "array/row" of the rows that lie on devices of this process."""
    found = {}
    for name, array in batch.items():
        for shard in array.addressable_shards:
            first = shard.index[0].start or 0
            for i, row in enumerate(np.asarray(shard.data)):
                found[f"{name}/{first + i}"] = hashlib.sha256(row.tobytes()).hexdigest()
    return found


def hide(hidden: int) -> None:
    """From now on this process cannot read step `hidden` of any run."""
    restored = Checkpoints._restore_items

    def reading(self, step, **arguments):
        if step == hidden:
            raise OSError("input/output error")
        return restored(self, step, **arguments)

    Checkpoints._restore_items = reading


def fed(*paths) -> dict[int, dict[str, str]]:
    """By step the hashes that the processes of one run recorded; where two hold the same row they must agree."""
    steps: dict[int, dict[str, str]] = {}
    for path in paths:
        for step, rows in map(json.loads, Path(path).read_text().splitlines()):
            known = steps.setdefault(step, {})
            assert all(known.get(row, value) == value for row, value in rows.items()), (path, step)
            known |= rows
    return steps


if __name__ == "__main__":
    record(sys.argv[1])
    if "TOY_UNREADABLE" in os.environ:
        hide(int(os.environ["TOY_UNREADABLE"]))
    if "TOY_UNLIKE" in os.environ:
        replicas.numeric_environment = dict
    launch(sys.argv[2:])

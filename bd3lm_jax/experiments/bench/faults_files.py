"""Faults of files that processes share: many that prepare the same, steps deleted while they are read, a full disk."""

import collections
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bd3lm_jax.checkpoints.checkpoint import TRASH, Checkpoints
from bd3lm_jax.checkpoints.checkpoint_selection import BEST, LATEST, CheckpointNotFound
from bd3lm_jax.config import DataConfig
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.experiments.bench import concurrent_prepare, full_disk
from bd3lm_jax.experiments.bench.kills import TEXT, TOO_LONG_S, Runs
from bd3lm_jax.parallel.fingerprint import fingerprints

KINDS = ("simultaneous prepare, some killed", "a step deleted while it is read", "full disk in a writer")
PROCESSES, KILLED, WITHIN_S = 200, 20, 4.0  # that prepare at once
EVERY = 10  # rounds in which they do so once
READS = 4  # of deleted steps, a round
PAUSE_S = 0.2  # between deletions
TOKENIZER = "bpe:270"


def campaign(runs: Runs, rounds: int, seed: int) -> Iterator[dict]:
    """Results of all these kinds."""
    yield prepare_at_once(runs.home, max(1, rounds // EVERY), seed, PROCESSES, KILLED)
    yield delete_while_reading(runs, READS * rounds, seed)
    yield fill_the_disk(runs)


def prepare_at_once(home: Path, rounds: int, seed: int, processes: int, killed: int) -> dict:
    """Rows in parts and a trained tokenizer, by so many processes in an empty cache, `killed` of them at random
    moments: all others get what one alone gets, and the next call leaves nothing beside it."""
    began, outcomes, details = time.monotonic(), collections.Counter(), []
    data = DataConfig(source="text", path=str(home / TEXT), tokenizer=TOKENIZER, seq_len=32, valid_fraction=0.1,
                      cache_dir=str(home / "alone"), workers=1)
    expected = concurrent_prepare.content(data)
    for i in range(rounds):
        with tempfile.TemporaryDirectory(dir=home) as cache:
            there = dataclasses.replace(data, cache_dir=cache)
            arguments = {
                "data": dataclasses.asdict(there), "processes": processes, "killed": killed, "within_s": WITHIN_S,
                "part_chars": full_disk.PART_CHARS, "seed": seed + i
            }
            command = [sys.executable, "-m", concurrent_prepare.__name__, json.dumps(arguments)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=TOO_LONG_S,
                                  env=os.environ | {"JAX_PLATFORMS": "cpu"})
            if done.returncode:
                details.append(f"the program failed: {done.stderr[-500:]}")
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            outcomes["processes that got the rows"] += found["codes"].count(0)
            details += [f"a process failed: {error}" for error in found["errors"]]
            if set(found["contents"]) != {expected} or concurrent_prepare.content(there) != expected:
                details.append("other rows than those of a process alone")
            if len(left := os.listdir(cache)) != 2:
                details.append(f"left in the cache: {sorted(left)}")
    return _result(KINDS[0], rounds * processes, outcomes, details, began)


def delete_while_reading(runs: Runs, times: int, seed: int) -> dict:
    """The steps of the undisturbed run come and go, the oldest of two as soon as a newer one is there, each by one
    rename as training does it; meanwhile the latest, the best and numbered steps are read."""
    began, outcomes, details = time.monotonic(), collections.Counter(), []
    workdir, draw = runs.home / "deleted", np.random.default_rng((seed, 3))
    trainer = _Retention(runs.whole / "checkpoints", workdir / "checkpoints")
    with trainer:
        for _ in range(times):
            warnings = []
            which = draw.choice([LATEST, BEST, "number"], p=[0.6, 0.1, 0.3])
            try:
                with Checkpoints(workdir, 1, read_only=True, warn=warnings.append) as checkpoints:
                    chosen = which if which != "number" else min(checkpoints.steps())
                    state, _ = checkpoints.restore(runs.abstract, chosen)
            except CheckpointNotFound:
                outcomes["told to be gone"] += 1
                details += [] if which != LATEST else ["no latest step"]
                continue
            except (UserError, OSError) as error:
                details.append(f"{which}: {error!r}"[:300])
                continue
            outcomes["read"] += 1
            if fingerprints(state) != runs.truth(int(state.step)):
                details.append(f"step {int(state.step)} holds other values")
            details += warnings
    outcomes["steps deleted meanwhile"] = trainer.deleted
    return _result(KINDS[1], times, outcomes, details, began)


class _Retention:
    """A thread that copies the steps of a run to another one in a cycle, and keeps the latest two there."""

    def __init__(self, source: Path, target: Path):
        self._steps = sorted((path for path in source.iterdir() if path.name.isdecimal()), key=lambda x: int(x.name))
        self._target, self._thread, self._done, self.deleted = target, threading.Thread(target=self._run), False, 0
        (target / TRASH).mkdir(parents=True)
        for path in self._steps[:2]:
            shutil.copytree(path, target / path.name)

    def __enter__(self) -> "_Retention":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done = True
        self._thread.join()

    def _run(self) -> None:
        there = self._steps[:2]
        while not self._done:
            for path in self._steps:
                if path in there or self._done:
                    continue
                coming = self._target / TRASH / "coming"
                shutil.copytree(path, coming)
                coming.rename(self._target / path.name)
                there.append(path)
                going = there.pop(0)
                (self._target / going.name).rename(self._target / TRASH / going.name)
                shutil.rmtree(self._target / TRASH / going.name)
                self.deleted += 1
                time.sleep(PAUSE_S)


def fill_the_disk(runs: Runs) -> dict:
    """Each writer once, while files cannot grow."""
    began, outcomes, details = time.monotonic(), collections.Counter(), []
    for i, name in enumerate(full_disk.WRITERS):
        home = runs.home / f"full-{i}"
        home.mkdir()
        place = full_disk.prepare_place(home, runs.home / TEXT, runs.whole)
        found = full_disk.outcome(name, place)
        outcomes["one line, exit code 1, nothing left" if not found else "otherwise"] += 1
        details += [f"{name}: {found}"] if found else []
    return _result(KINDS[2], len(full_disk.WRITERS), outcomes, details, began)


def _result(name: str, times: int, outcomes: collections.Counter, details: list[str], began: float) -> dict:
    return {"variant": name, "times": times, "wrong": len(details), "outcomes": dict(outcomes), "details": details,
            "seconds": time.monotonic() - began}

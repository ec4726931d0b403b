"""Damage to the files of a finished checkpoint, and what a restore makes of it."""

import collections
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.experiments.bench.kills import Runs

KINDS = ("one flipped bit", "one truncated file", "half-deleted checkpoint", "an item missing")
ITEMS = ("params", "ema", "opt", "meta")


def campaign(runs: Runs, rounds: int, seed: int) -> Iterator[dict]:
    """Results of all kinds of damage: `2 * rounds` flipped bits, `rounds` of each other kind."""
    draw = np.random.default_rng((seed, 1))
    kinds = zip(KINDS, ((flip, 2 * rounds), (truncate, rounds), (delete_some, rounds), (delete_item, len(ITEMS))))
    for name, (fault, times) in kinds:
        yield _injected(runs, name, times, lambda step, i, fault=fault: fault(step, draw, i))


def flip(step: Path, draw: np.random.Generator, i: int) -> str:
    """Flip a random bit: every other time of all bits alike, else of a random file, however small."""
    files = _files(step)
    sizes = np.array([file.stat().st_size for file in files], np.float64)
    chosen = files[draw.choice(len(files), p=sizes / sizes.sum() if i % 2 else (sizes > 0) / (sizes > 0).sum())]
    data = bytearray(chosen.read_bytes())
    bit = draw.integers(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    chosen.write_bytes(data)
    return f"bit {bit} of {chosen.relative_to(step)}"


def truncate(step: Path, draw: np.random.Generator, i: int) -> str:
    """Cut a random file at a random length."""
    del i
    filled = [file for file in _files(step) if file.stat().st_size]
    chosen = filled[draw.choice(len(filled))]
    length = int(draw.integers(chosen.stat().st_size))
    with open(chosen, "r+b") as file:
        file.truncate(length)
    return f"{chosen.relative_to(step)} cut to {length} bytes"


def delete_some(step: Path, draw: np.random.Generator, i: int) -> str:
    """Delete some files, at least one, as a deletion that was broken off."""
    del i
    files = _files(step)
    gone = draw.permutation(len(files))[:draw.integers(1, len(files) + 1)]
    for k in gone:
        files[k].unlink()
    return f"{len(gone)} of {len(files)} files deleted"


def delete_item(step: Path, draw: np.random.Generator, i: int) -> str:
    """Delete all of one item."""
    del draw
    shutil.rmtree(step / ITEMS[i % len(ITEMS)])
    return f"{ITEMS[i % len(ITEMS)]} deleted"


def _files(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


def _injected(runs: Runs, name: str, times: int, fault: Callable[[Path, int], str]) -> dict:
    """Damage the newer of two checkpoints, so many times, each in a fresh copy, and restore as training does."""
    began, outcomes, details = time.monotonic(), collections.Counter(), []
    source, workdir = runs.last_two(), runs.home / "damaged"
    older, newest = sorted(int(path.name) for path in (source / "checkpoints").iterdir() if path.name.isdecimal())
    for i in range(times):
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(source, workdir)
        what = fault(workdir / "checkpoints" / str(newest), i)
        try:
            step, right, warned = runs.restored(workdir)
            outcome = ("used silently" if not right else "harmless" if step == newest else
                       "detected" if step == older and warned else "other step")
        except UserError as error:
            outcome = "no step used"
            what = f"{what}: {error}"
        except Exception as error:
            outcome, what = "traceback", f"{what}: {error!r}"
        outcomes[outcome] += 1
        if outcome not in ("harmless", "detected"):
            details.append(f"{outcome}: {what}"[:300])
    return {"variant": name, "times": times, "wrong": len(details), "outcomes": dict(outcomes), "details": details,
            "seconds": time.monotonic() - began}

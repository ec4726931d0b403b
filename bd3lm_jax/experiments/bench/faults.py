"""What a run survives: SIGKILL at random moments, flipped bits, half-deleted checkpoints, a full disk, power cuts, lost
processes and ones that round differently.

A round is a SIGKILL of a run of one process, two flipped bits, a truncated file and a half-deleted checkpoint; every
fifth round one of two processes is killed as well, and power is cut. All runs are the same small one, in a temporary
directory. `wrong` counts what must not be: a checkpoint that was complete and is lost or holds other values than the
undisturbed run, a flipped bit whose values were used, other losses at the end, another exit code.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from bd3lm_jax.core import log
from bd3lm_jax.experiments.bench import damage, faults_files, kills, power
from bd3lm_jax.experiments.bench.runner import Limit, row_of

EVERY = 5  # rounds in which two processes are disturbed once
SEED = 0
NOTE = ("times: how often the fault was injected; wrong: how often what must not be happened. Moments, files and bits "
        f"are random, seed {SEED}.")
AGAINST = ()
LIMITS = tuple(Limit("faults", name, "undisturbed", "wrong", 0)
               for name in (*damage.KINDS, *faults_files.KINDS, *kills.KINDS, power.KIND))


def run(rounds: int, against: str) -> list[dict]:
    """A row a fault: `times`, `wrong` and `outcomes` (how often what happened)."""
    del against
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for fault in _faults(Path(directory), rounds):
            rows.append(row_of("faults", baseline="undisturbed", **fault))
            outcomes = ", ".join(f"{count} {name}" for name, count in fault["outcomes"].items())
            log.note(f"{fault['variant']}: {fault['times']} times in {fault['seconds']:.0f} s: {outcomes}")
            for detail in fault["details"]:
                log.note(f"  wrong: {detail}")
    return rows


def _faults(home: Path, rounds: int) -> Iterator[dict]:
    single = kills.Runs(home, processes=1)
    yield from damage.campaign(single, rounds, SEED)
    yield from faults_files.campaign(single, rounds, SEED)
    yield kills.full_disk(single)
    yield kills.kill(single, rounds, SEED)
    yield power.power_cuts(single, max(1, rounds // EVERY), SEED)
    pair = kills.Runs(home, processes=2)
    yield kills.stop_one(pair)
    yield kills.mismatched_replicas(pair)
    yield kills.kill(pair, max(1, rounds // EVERY), SEED)


def draw(path: Path, rows: list[dict]) -> None:
    """No picture: the counts say it all."""
    del path, rows

"""Objectives side by side: trained runs under one bound, with their own losses, training speed and texts.

Needs `--workdir=DIR,DIR,...`, or one directory of a sweep, whose finished runs are taken in its order. The first
autoregressive run judges the texts of all. `--rounds` are draws of the bound.
"""

import os
from pathlib import Path

from bd3lm_jax.checkpoints import rundir
from bd3lm_jax.core import checksummed, paths
from bd3lm_jax.core.errors import UserError, command_line
from bd3lm_jax.evaluation import family
from bd3lm_jax.experiments.bench.runner import row_of

TEXTS = 32  # of each run
NOTE = "Bits per byte; intervals over documents and draws, not over trainings."
AGAINST = ()
LIMITS = ()
WORKDIR = True


def run(rounds: int, against: str, workdir: str) -> list[dict]:
    """Rows of `family.compare` beside the fields of every benchmark."""
    del against
    workdirs = runs_of(workdir)
    scorer = next((path for path in workdirs if rundir.read(path)[0].diffusion.kind == "ar"), "")
    rows = family.compare(workdirs, split="test", scorer=scorer, texts=TEXTS, draws=rounds, seed=0)
    family.show(rows, scorer)
    return [row_of(row.pop("name"), row["kind"], rows[0]["kind"], **row) for row in rows]


def runs_of(workdir: str) -> list[str]:
    """The run directories meant: those with commas between them, or the finished runs of a sweep.

    UserError for a sweep without any.
    """
    status = Path(workdir) / "status.json"
    if not status.exists():
        return paths.split(workdir)
    try:
        entries = checksummed.verify_checksum(status.read_bytes())["runs"]
        found = [str(Path(workdir) / entry["name"]) for entry in entries if entry["status"] == "finished"]
    except (checksummed.ChecksumError, KeyError, TypeError) as error:
        raise UserError(f"{status} is damaged ({error}): the sweep command writes it again") from None
    if not found:
        raise UserError(f"{workdir} is a sweep without a finished run: run it first, {command_line('sweep')}")
    return found


def draw(path: str | os.PathLike, rows: list[dict]) -> None:
    family.draw(Path(path), [row | {"name": row["case"]} for row in rows])

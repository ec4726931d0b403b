"""Priority masks on trained runs: the bound on dense and other tokens, lengths of masked runs, gradients.

Needs `--workdir=RUN,RUN,...`, runs that differ in their masks, or one directory of a sweep. A round is one batch of
rows of the test split, drawn by every run's own noise on the network of the first run (`density_study.study`).
"""

import os
from pathlib import Path

from bd3lm_jax.core import plots
from bd3lm_jax.experiments.bench.family import runs_of
from bd3lm_jax.experiments.bench.runner import row_of
from bd3lm_jax.experiments.density_study import PARTS, study

BATCH = 16  # rows of a round
NOTE = ("Bounds are those of uniform masks, whatever a run was trained with. Gradient variances are relative to the "
        "squared mean loss: heuristic losses have other means. Intervals do not cover the spread between trainings.")
AGAINST = ()
LIMITS = ()
WORKDIR = True


def run(rounds: int, against: str, workdir: str) -> list[dict]:
    """A row a run: fields of `density_study.study` beside those of every benchmark."""
    del against
    found = study(runs_of(workdir), split="test", batch=BATCH, draws=rounds, seed=0)
    return [row_of(f"S={row['block_size']}", f"{Path(row['run']).name}: {row['masks']}", found[0]["masks"], **row)
            for row in found]


def draw(path: str | os.PathLike, rows: list[dict]) -> None:
    """The bounds with their intervals, a line a domain and kind of token."""
    series = {}
    for row in rows:
        for domain, parts in row["bounds"].items():
            for name in PARTS:
                if parts[name] is not None:
                    point = parts[name]["nll"], *parts[name]["nll_ci95"]
                    series.setdefault(f"{domain}, {name}", {})[row["masks"]] = point
    plots.intervals(path, "Bound by masks that training preferred", series, "bound, nats a token")

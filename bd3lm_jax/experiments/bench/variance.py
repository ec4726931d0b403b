"""The loss and its gradient on a trained run, by noise schedule: how much they vary, against the linear schedule.

Needs `--workdir=DIR`, or several with commas. A round is one batch of rows of the test split, which all schedules see;
the 95 % intervals are over rounds (`variance.study`).
"""

import os
from pathlib import Path

from bd3lm_jax.core import paths, plots
from bd3lm_jax.experiments.bench.runner import row_of
from bd3lm_jax.experiments.variance import LINEAR, study

BATCH = 16  # rows of a round
NOTE = "Ratios to the linear schedule. Clipped schedules have other means: compare their variance over mean^2."
AGAINST = ()
LIMITS = ()
WORKDIR = True


def run(rounds: int, against: str, workdir: str) -> list[dict]:
    """Rows of all runs: fields of `variance.study` beside those of every benchmark."""
    del against
    return [row_of(f"{Path(directory).name}, S={found['block_size']}", found.pop("schedule"), LINEAR, **found)
            for directory in paths.split(workdir)
            for found in study(directory, split="test", batch=BATCH, draws=rounds, seed=0)]


def draw(path: str | os.PathLike, rows: list[dict]) -> None:
    """Ratios of the loss's variance with their intervals, a line a schedule; what was published as points."""
    series = {}
    for row in rows:
        series.setdefault(row["case"], {})[row["variant"]] = (row["variance_ratio"], *row["variance_ratio_ci95"])
    for row in rows:
        if row["published_ratio"] is not None:
            series.setdefault(f"published, S={row['block_size']}", {})[row["variant"]] = (row["published_ratio"],) * 3
    plots.intervals(path, "How noisy the training loss is, by schedule", series,
                    "variance of the loss, ratio to the linear schedule")

"""A tracker: the training loss and the validated bound of a run in a CSV file, for a spreadsheet.

    python -m launch train --import=examples.plugins.tracker --config.log.trackers="('csv',)" --workdir=runs/tiny
"""

import csv

from bd3lm_jax.training.trackers import TRACKERS

COLUMNS = ("step", "train/loss", "valid/nll")


class CSV:
    """The methods of bd3lm_jax/training/trackers.py's `Tracker`. A run that goes on appends to its file."""

    def __init__(self, workdir, config, start_step):
        del config
        self.file = (workdir / "metrics.csv").open("a" if start_step else "w", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, COLUMNS, extrasaction="ignore")
        if not start_step:
            self.writer.writeheader()

    def metrics(self, step, values):
        self.writer.writerow({"step": step, **values})

    def close(self):
        self.file.close()


TRACKERS["csv"] = CSV

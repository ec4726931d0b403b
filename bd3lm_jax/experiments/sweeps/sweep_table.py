"""The table and the plot of a sweep: what its runs reached, with intervals and paired differences."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bd3lm_jax.core import files, plots
from bd3lm_jax.core.log import note, table
from bd3lm_jax.core.stats import format_interval, format_number
from bd3lm_jax.evaluation.titles import key_title, phrase, run_titles
from bd3lm_jax.likelihood import paired

MEASURES = {"nll": "valid_nll", "nll_ci95": "nll_ci95", "ppl": "valid_ppl", "bits_per_byte": "bits_per_byte",
            "bits_per_byte_comparable": "bits_per_byte_comparable"}
BEST = "best"
FILES = MARKDOWN, CSV = "table.md", "table.csv"
CAPTION = ("The validation split; 95 % intervals over its documents and the noise, not over training seeds. All runs "
           "are measured on the same documents: a difference of two is known better than their intervals say.")
INCOMPARABLE = " * the tokenizer does not give the text back: not to be compared with other tokenizers."


class Table:
    """Runs of a sweep (`sweep.Run`) in their order. keys: the columns of what differs.

    baseline: the number of the run that the others are compared with, or "best".
    """

    def __init__(self, runs: Sequence[Any], keys: Sequence[str], baseline: int | str):
        self.runs, self.keys = runs, keys
        self.measured = [run for run in runs if run.status == "finished" and run.measured["valid_nll"] is not None]
        self.baseline = self._baseline(baseline)
        self.differences = {} if self.baseline is None else self._differences(self.runs[self.baseline])

    def entries(self) -> list[dict[str, Any]]:
        """The runs of the result of the `sweep` command."""
        result = []
        for run in self.runs:
            found = self.differences.get(run.name)
            result.append(run.entry() | {"difference": found and found[0],
                                         "difference_ci95": found and list(found[1:])})
        return result

    def show(self, title: str) -> None:
        heading, *rows = self._lines()
        table(title, heading, rows)
        note(self._caption())

    def write(self, directory: Path) -> None:
        """table.md and table.csv."""
        heading, *rows = self._lines()
        lines = [heading, ["---"] * len(heading), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        files.write(directory / MARKDOWN, f"{text}\n\n{self._caption()}\n".encode())
        with io.StringIO(newline="") as file:
            writer = csv.writer(file)
            result_columns = ("valid_nll", "valid_ppl", "bits_per_byte", "step", "status")
            writer.writerow(["run", "name", *self.keys, *result_columns, "low", "high", "difference", "difference_low",
                             "difference_high"])
            for i, (run, entry) in enumerate(zip(self.runs, self.entries())):
                values = run.values()
                writer.writerow([
                    i, run.name, *(values.get(key) for key in self.keys), *(entry[key] for key in result_columns),
                    *(entry["nll_ci95"] or (None, None)), *self.differences.get(run.name, (None,) * 3)
                ])
            files.write(directory / CSV, file.getvalue().encode())

    def draw(self, path: Path) -> None:
        if self.measured:
            plots.nll_intervals(path, f"Runs of the sweep {path.parent.name}", *_curves(self.measured, self.keys))

    def _caption(self) -> str:
        return CAPTION + INCOMPARABLE * any(_incomparable(run) for run in self.measured)

    def _baseline(self, choice: int | str) -> int | None:
        """None while that run is not finished."""
        if isinstance(choice, str):  # BEST
            choice = self.runs.index(min(self.measured, key=lambda run: run.measured["valid_nll"])) \
                if self.measured else 0
        return choice if self.runs[choice] in self.measured else None

    def _differences(self, baseline: Any) -> dict[str, tuple[float, float, float]]:
        baseline_documents = paired.read(baseline.workdir)
        if baseline_documents is None:
            return {}
        documents_by_run = {run.name: paired.read(run.workdir) for run in self.measured if run is not baseline}
        found = {
            name: paired.difference(documents, baseline_documents)
            for name, documents in documents_by_run.items() if documents
        }
        return {name: difference for name, difference in found.items() if difference}

    def _lines(self) -> list[list[str]]:
        """For people: a heading and a row a run."""
        leaves = [key.rpartition(".")[2] for key in self.keys]
        headings = leaves if len(set(leaves)) == len(leaves) else self.keys
        difference_heading = [f"less run {self.baseline}"] if self.differences else []
        lines = [[
            "run", *headings, "nats/token", "95 % interval", *difference_heading, "perplexity", "bits/byte", "status"
        ]]
        for i, run in enumerate(self.runs):
            values, nll, interval, ppl, bits, difference = run.values(), "", "", "", "", ""
            if run.measured.get("valid_nll") is not None:
                nll, ends, ppl, bits, _ = (run.measured[key] for key in MEASURES.values())
                nll, ppl, bits = (format_number(x, form) for x, form in ((nll, ".4f"), (ppl, ".2f"), (bits, ".4f")))
                bits += "*" * _incomparable(run)
                interval = format_interval(ends, ".4f")
            if run.name in self.differences:
                value, low, _ = self.differences[run.name]
                difference = f"{value:+.4f} ± {format_number(value - low, '.4f')}"
            measured = [nll, interval, *([difference] if difference_heading else []), ppl, bits]
            lines.append([str(i), *(str(values.get(key, "")) for key in self.keys), *measured, run.status])
        return lines


def _incomparable(run: Any) -> bool:
    """Whether its tokenizer is known to lose text."""
    return run.measured.get("bits_per_byte_comparable") is False


def _curves(runs: Sequence[Any], keys: Sequence[str]) -> tuple[str, dict[str, list[tuple]]]:
    """Label of the horizontal axis and `{curve: [(x, nll, low, high), ...]}`.

    x is the swept number with the most values, and a curve has the same other values; without numbers x is the name.
    """
    values = [run.values() for run in runs]
    distinct = {key: len({str(value.get(key)) for value in values}) for key in keys}
    numbers = [key for key in keys if all(type(value.get(key)) in (int, float) for value in values)]
    x_key = max(numbers, key=distinct.__getitem__, default=None)
    others = [key for key in keys if x_key and key != x_key and distinct[key] > 1]
    result = {}
    for run, value, title in zip(runs, values, run_titles([run.point.config for run in runs])):
        nll = run.measured["valid_nll"]
        low, high = (nll if end is None else end for end in run.measured["nll_ci95"])
        label = ", ".join(phrase(key, value.get(key)) for key in others)
        result.setdefault(label, []).append((value[x_key] if x_key else title, nll, low, high))
    return key_title(x_key or ""), {label: sorted(points) for label, points in result.items()}

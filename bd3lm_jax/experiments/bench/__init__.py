"""Benchmarks: all sides of a comparison run in turns in one process, and ratios are reported, not times.

A benchmark is a module with `run(rounds, against) -> rows` (see `runner.row_of`), LIMITS (what this library promises),
NOTE (how to read it), AGAINST (what it can be compared with) and a line in BENCHES. One with WORKDIR = True measures
trained runs, `run(rounds, against, workdir)`; one with `draw(path, rows)` has a picture of its own; SIMULATED: it is
compiled for so many simulated devices.
"""

import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from bd3lm_jax.core import files, log, plots
from bd3lm_jax.core.errors import UserError, lookup
from bd3lm_jax.experiments.bench import (
    attention,
    data,
    density,
    evaluate,
    family,
    faults,
    loss,
    sampling,
    scaling,
    step,
    variance,
)
from bd3lm_jax.experiments.bench.runner import Limit, check_limits
from bd3lm_jax.planning import compilers

BENCHES = {"attention": attention, "step": step, "loss": loss, "data": data, "eval": evaluate,
           "sampling": sampling, "variance": variance, "density": density, "family": family, "scaling": scaling,
           "faults": faults}
COLUMNS = {  # field of a row -> heading and format of its column
    "time_ratio": ("time", "{:.3f}"), "cpu_ratio": ("CPU", "{:.3f}"), "memory_ratio": ("memory", "{:.3f}"),
    "flops_ratio": ("FLOPs", "{:.3f}"), "median_ms": ("ms", "{:,.1f}"), "temp_mib": ("MiB", "{:,.0f}"),
    "mfu": ("MFU", "{:.0%}"), "compile_s": ("compile s", "{:.1f}"), "rows_per_s": ("rows/s", "{:,.0f}"),
    "tokens_per_s": ("tokens/s", "{:,.0f}"), "times": ("times", "{:,}"), "wrong": ("wrong", "{:,}"),
}
PANELS = {"cpu_ratio": "CPU time", "time_ratio": "time", "memory_ratio": "temporary memory", "flops_ratio": "FLOPs"}


def bench(name: str, rounds: int, against: str, out: str | os.PathLike,
          workdir: str = "") -> dict[str, Any]:
    """Run a benchmark: tables on stderr, NAME.json and NAME.png in the directory `out`.

    against: "torch" to run PyTorch's side too, "" for ours alone. workdir: trained runs, for benchmarks of them, else
    "". Returns the result of the `bench` command. Raises UserError for an unknown benchmark, rounds below 1, a side
    that is missing here or that it does not have, run directories missing or of no use, and a directory that cannot be
    created.
    """
    module = lookup(BENCHES, name, "benchmark")
    if rounds < 1:
        raise UserError(f"rounds is {rounds}, expected at least 1")
    if against and against not in module.AGAINST:
        raise UserError(f"benchmark '{name}' cannot run against '{against}': " + (
            f"known: {', '.join(module.AGAINST)}" if module.AGAINST else "leave --baseline out"))
    if against and importlib.util.find_spec(against) is None:
        raise UserError(f"--baseline={against} needs a package that is missing: pip install 'bd3lm_jax[bench]'")
    needs_runs = getattr(module, "WORKDIR", False)
    if needs_runs != bool(workdir):
        raise UserError(f"benchmark '{name}' measures a trained run: give --workdir=DIR" if needs_runs else
                        f"benchmark '{name}' needs no trained run: leave --workdir={workdir} out")
    out = _directory(out)
    if hasattr(module, "SIMULATED"):
        compilers.simulate(module.SIMULATED)
    device = jax.devices()[0].device_kind
    rows = module.run(rounds, against, *([workdir] if needs_runs else []))
    _show(f"{name}, {rounds} rounds in turns, on {device}", module.NOTE, rows, module.LIMITS)
    packages = ["jax", "jaxlib", "flax", "optax", *filter(None, [against])]
    versions = {package: importlib.metadata.version(package) for package in packages}
    result = {"bench": name, "device": device, "versions": versions, "rows": rows}
    files.write(out / f"{name}.json", json.dumps(result, indent=1).encode() + b"\n")
    draw = getattr(module, "draw", lambda path, rows: plots.ratio_bars(
        path, _panels(rows), f"Benchmark {name}, on {device}"))
    draw(out / f"{name}.png", rows)
    log.note(f"result: {out / name}.json")
    return result


def _directory(out: str | os.PathLike) -> Path:
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the directory --out={out}: {error.strerror or error}") from None
    return Path(out)


def _show(title: str, note: str, rows: list[dict], limits: Sequence[Limit]) -> None:
    """A table a case and baseline, a column for everything that is known; a line a promise."""
    log.note(f"{title}\n{note}")
    for case, baseline in dict.fromkeys((row["case"], row["baseline"]) for row in rows):
        inside = [row for row in rows if (row["case"], row["baseline"]) == (case, baseline)]
        measured_columns = [key for key in COLUMNS if any(row.get(key) is not None for row in inside)]
        columns = [key for key in measured_columns if key != "compile_s" or "median_ms" not in measured_columns]
        if not columns:
            continue  # nothing of COLUMNS: the benchmark has shown tables of its own
        log.table(f"{case}: to {baseline}", ("variant", *(COLUMNS[key][0] for key in columns)),
                  [(row["variant"], *(_cell(key, row.get(key)) for key in columns)) for row in inside])
    for limit, row, met in check_limits(rows, limits):
        log.note(f"{'met' if met else 'MISSED'}: {limit.variant} to {limit.baseline}: {limit.field} "
                 f"{_cell(limit.field, row[limit.field])}, at most {limit.value:g} ({row['case']})")


def _cell(key: str, value: float | None) -> str:
    return "-" if value is None else COLUMNS[key][1].format(value)


def _panels(rows: list[dict]) -> dict[str, dict]:
    """Ratios by measure, those to each case's first baseline."""
    first = {}
    for row in rows:
        first.setdefault(row["case"], row["baseline"])
    on_cpu = any(row["cpu_ratio"] is not None for row in rows)
    panels = {}
    for key in PANELS:
        if key == ("time_ratio" if on_cpu else "cpu_ratio"):
            continue
        values = {(row["case"], row["variant"]): row[key] for row in rows
                  if row[key] and row["baseline"] == first[row["case"]]}
        if values:
            panels[PANELS[key]] = values
    return panels

"""Variants of the same work run in turns in one process: their ratios survive a busy machine, single times do not."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bd3lm_jax.core import hardware, log
from bd3lm_jax.planning import flops

FIELDS = ("time_ratio", "cpu_ratio", "memory_ratio", "median_ms", "flops_ratio", "mfu", "cpu_ms", "temp_mib",
          "compile_s")
MIB = 2**20
QUEUED = 10  # runs of a round on an accelerator, queued so that launching them is hidden, as in a training loop


@dataclasses.dataclass
class Variant:
    """One way to do the work of a case.

    run() starts it once and returns what `wait` waits for; None: it is not run. temp_bytes: temporary memory by the
    compiler's account. flops: of the matrix products of one run, flops_needed: what the mathematics asks for. parts: a
    run does the work of so many (noised copies), and times and FLOPs are given for one of them. None: not known.
    """

    name: str
    run: Callable[[], Any] | None
    wait: Callable[[Any], Any] = jax.block_until_ready
    temp_bytes: int | None = None
    compile_s: float | None = None
    flops: float | None = None
    flops_needed: float | None = None
    parts: int = 1


class Limit(NamedTuple):
    """A promise: `field` is at most `value` in the rows of `variant` to `baseline` whose case contains `case`."""

    case: str
    variant: str
    baseline: str
    field: str
    value: float


def compiled(name: str, function: Callable, arguments: tuple, *, carries: bool, flops_needed: float | None = None,
             parts: int = 1) -> Variant:
    """A variant that is a jitted function of `arguments`.

    carries: its first result is its next first argument, whose buffers it reuses, as in training. Arguments may be
    abstract (`jax.ShapeDtypeStruct`): the variant is then compiled, not run.
    """
    variant = Variant(name, None, flops=products(function, *arguments), flops_needed=flops_needed, parts=parts)
    with _left_out_if_too_large(name):
        began = time.perf_counter()
        program = jax.jit(function, donate_argnums=(0,) if carries else ()).lower(*arguments).compile()
        variant.compile_s, memory = time.perf_counter() - began, program.memory_analysis()
        variant.temp_bytes = None if memory is None else memory.temp_size_in_bytes
        if not any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(arguments)):
            variant.run = _repeatable(program, arguments, carries)
    return variant


def _repeatable(program: Callable, arguments: tuple, carries: bool) -> Callable[[], Any]:
    first, rest = arguments[0], arguments[1:]

    def run():
        nonlocal first
        results = program(first, *rest)
        if carries:
            first = results[0]
        return results

    return run


def products(function: Callable, *arguments: Any) -> float | None:
    """FLOPs of all matrix products of a function (arguments may be abstract); None if it calls a kernel."""
    try:
        return float(flops.count(function, *arguments))
    except ValueError:
        return None


def compare(case: str, variants: Sequence[Variant], baseline: str, rounds: int,
            pairs: Sequence[tuple[str, str]] = ()) -> list[dict]:
    """Run the variants in turns, `rounds` times after a first run that does not count; one result row each.

    Ratios are to the variant `baseline`: medians over the rounds of the ratio of two runs of the same round. pairs:
    (variant, baseline) for further rows. What is not known (times of what is only compiled, the memory of other
    libraries) is None.
    """
    if rounds:
        log.note(f"{case}: {rounds} rounds of {', '.join(variant.name for variant in variants if variant.run)}")
    wall, cpu = _measure(variants, rounds)
    by_name = {variant.name: variant for variant in variants}
    rows = []
    for name, base_name in [(name, baseline) for name in by_name] + list(pairs):
        variant, base = by_name[name], by_name[base_name]
        seconds, cpu_seconds = _median(wall.get(name)), _median(cpu.get(name))
        rows.append(row_of(
            case, name, base_name, time_ratio=_paired(wall, name, base_name), cpu_ratio=_paired(cpu, name, base_name),
            memory_ratio=_ratio(variant.temp_bytes, base.temp_bytes), median_ms=seconds and seconds * 1e3,
            flops_ratio=_ratio(_per_part(variant), _per_part(base)), mfu=_utilisation(variant, seconds),
            cpu_ms=cpu_seconds and cpu_seconds * 1e3, temp_mib=_ratio(variant.temp_bytes, MIB),
            compile_s=variant.compile_s))
    return rows


def row_of(case: str, variant: str, baseline: str, **values) -> dict:
    """A row of the result with all FIELDS; those that are not given are None.

    time_ratio, cpu_ratio, memory_ratio (temporary memory), flops_ratio: to the baseline. median_ms, cpu_ms: of one run.
    mfu: needed FLOPs a second over the device's peak. temp_mib: temporary memory. compile_s: seconds of compilation
    (few where JAX's compilation cache is on).
    """
    return {"case": case, "variant": variant, "baseline": baseline, **dict.fromkeys(FIELDS), **values}


def _measure(variants: Sequence[Variant], rounds: int) -> tuple[dict, dict]:
    """Seconds and CPU seconds of a run of every variant that runs, for each round: two dicts of lists.

    CPU seconds are those of all threads of this process, and nothing where an accelerator does the work.
    """
    on_cpu = jax.default_backend() == "cpu"
    queued = 1 if on_cpu else QUEUED
    running = []
    for variant in variants:
        if variant.run is not None:
            with _left_out_if_too_large(variant.name):
                variant.wait(variant.run())
                running.append(variant)
    wall, cpu = ({variant.name: [] for variant in running} for _ in range(2))
    for _ in range(rounds):
        for variant in running:
            began, cpu_began = time.perf_counter(), time.process_time()
            results = None
            for _ in range(queued):
                results = variant.run()
            variant.wait(results)
            cpu[variant.name].append((time.process_time() - cpu_began) / queued / variant.parts)
            wall[variant.name].append((time.perf_counter() - began) / queued / variant.parts)
    return wall, cpu if on_cpu else {}


@contextlib.contextmanager
def _left_out_if_too_large(name: str) -> Iterator[None]:
    """Goes on, with a line for people, where the device has too little memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        log.note(f"{name} does not fit into the memory of this device: left out")


def _paired(seconds: dict, name: str, baseline: str) -> float | None:
    if name not in seconds or baseline not in seconds:
        return None
    return float(np.median(np.divide(seconds[name], seconds[baseline])))


def _median(values: list[float] | None) -> float | None:
    return None if values is None else float(np.median(values))


def _per_part(variant: Variant) -> float | None:
    return None if variant.flops is None else variant.flops / variant.parts


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else value / base


def _utilisation(variant: Variant, seconds: float | None) -> float | None:
    """Needed FLOPs a second over the peak of this device (bf16)."""
    if seconds is None or variant.flops_needed is None:
        return None
    return hardware.utilisation(variant.flops_needed / variant.parts, seconds, jax.devices()[:1])


def check_limits(rows: list[dict], limits: Sequence[Limit]) -> list[tuple[Limit, dict, bool]]:
    """Every limit with each row that has a value for it, and whether it is met."""
    return [(limit, row, row[limit.field] <= limit.value) for limit in limits for row in rows
            if (row["variant"], row["baseline"]) == (limit.variant, limit.baseline) and limit.case in row["case"]
            and row[limit.field] is not None]

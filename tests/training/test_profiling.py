import functools
import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from bd3lm_jax.core.errors import RunError
from bd3lm_jax.training.callbacks import Progress
from bd3lm_jax.training.profiling import Profiler


@functools.partial(jax.jit, donate_argnums=0)
def work(x):
    return x @ x


def run(directory, first, num, steps):
    """Steps that give their state away, as training does."""
    state = jnp.ones((64, 64))
    with Profiler(directory, first, num) as profiler:
        for step in steps:
            profiler.before_step(Progress(state, [], step))
            state = work(state)
    return sorted((directory / "profile").rglob("*"))


def traced_steps(files) -> set[str]:
    (trace,) = [path for path in files if path.name == "perfetto_trace.json.gz"]
    events = json.loads(gzip.decompress(trace.read_bytes()))
    events = events["traceEvents"] if isinstance(events, dict) else events
    return {event["args"]["step_num"] for event in events if event.get("name") == "train"}


def test_the_steps_asked_for_are_traced(tmp_path, capsys):
    files = run(tmp_path, 3, 2, range(8))
    assert traced_steps(files) == {"3", "4"}
    assert any(path.name.endswith(".xplane.pb") for path in files)
    said = capsys.readouterr().err
    assert "trace of steps 3 to 4" in said and str(tmp_path) in said and "ui.perfetto.dev" in said


def test_a_run_that_ends_earlier_leaves_what_it_did(tmp_path):
    assert traced_steps(run(tmp_path, 1, 10, range(3))) == {"1", "2"}


def test_nothing_without_steps_or_after_them(tmp_path):
    assert run(tmp_path, 3, 0, range(5)) == run(tmp_path, 3, 2, range(10, 15)) == []


def test_no_place_to_write(tmp_path):
    (tmp_path / "profile").write_text("a file")
    with pytest.raises(RunError, match="cannot trace into .*run without --profile"):
        run(tmp_path, 0, 1, range(2))

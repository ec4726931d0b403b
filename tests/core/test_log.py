import io
import json
import math
import os
import pty
import subprocess
import sys
import time
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from bd3lm_jax.core import log
from bd3lm_jax.core.errors import RunError
from bd3lm_jax.core.log import RunLog, note, read_metrics, result, save, table


def write(workdir, steps, **options):
    with RunLog(workdir, total_steps=100, quiet=True, **options) as run:
        for step in steps:
            run.metrics(step, {"train/nll": step / 2})


def test_one_json_object_a_line(tmp_path):
    write(tmp_path / "run", [10, 20])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    for line, content in zip(lines, ('{"step": 10, "train/nll": 5.0}', '{"step": 20, "train/nll": 10.0}'), strict=True):
        assert line == f'{content[:-1]}, "crc32": "{zlib.crc32(content.encode()):08x}"}}'


def test_a_line_is_on_disk_before_the_run_ends(tmp_path):
    with RunLog(tmp_path, 100, quiet=True) as run:
        run.metrics(1, {"a": 1})
        assert read_metrics(tmp_path) == [{"step": 1, "a": 1}]


def test_resumed_run_repeats_no_step(tmp_path):
    write(tmp_path, [10, 20, 30, 40])
    write(tmp_path, [30, 40], start_step=25)
    assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20, 30, 40]


def test_new_run_starts_empty(tmp_path):
    write(tmp_path, [0, 10])
    write(tmp_path, [0])
    assert [line["step"] for line in read_metrics(tmp_path)] == [0]


def test_line_cut_by_a_kill_is_left_out_and_repaired(tmp_path):
    write(tmp_path, [10, 20])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "train/n')
    assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20]
    write(tmp_path, [30], start_step=25)
    assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20, 30]


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path) == []


def test_result_is_one_strict_json_line_on_stdout(tmp_path, capsys):
    result({"nll": jnp.float32(0.5), "nll_ci95": [float("nan"), np.float64("inf")], "steps": np.int64(3),
            "sampler": {"name": "é"}, "workdir": tmp_path, "done": True, "ppl": None})
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1 and captured.err == ""
    assert json.loads(captured.out, parse_constant=pytest.fail) == {
        "nll": 0.5, "nll_ci95": [None, None], "steps": 3, "sampler": {"name": "é"}, "workdir": str(tmp_path),
        "done": True, "ppl": None}


def test_a_saved_file_is_whole_or_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "numbers.json"
    save(path, {"nll": jnp.float32(1.5), "ci": [math.nan, np.float64(2.0)], 4: "é"})
    old = {"nll": 1.5, "ci": [None, 2.0], "4": "é"}
    old |= {"crc32": f"{zlib.crc32(json.dumps(old).encode()):08x}"}
    assert json.loads(path.read_text(encoding="utf-8")) == old

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save(path, {"nll": 2.5})
    assert json.loads(path.read_text(encoding="utf-8")) == old


def test_notes_and_tables_go_to_stderr_as_they_are(capsys):
    note("[b]not markup[/b] " + "long " * 50)
    table("Scores", ["name", "[nats]"], [["model [4]", 1.5]])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[0] == "[b]not markup[/b] " + "long " * 50
    for text in ("Scores", "name", "[nats]", "model [4]", "1.5"):
        assert text in captured.err


def test_plain_progress_is_sparse_and_shows_the_last_step(tmp_path, capsys, monkeypatch):
    seconds = iter(np.arange(0.0, 1000.0))  # one second a step
    monkeypatch.setattr(log.time, "monotonic", lambda: float(next(seconds)))
    with RunLog(tmp_path, total_steps=13) as run:
        for step in range(1, 14):
            run.progress(step, 2.0, 1234.5)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/13", "6/13", "11/13", "13/13"]
    assert lines[1] == "step 6/13  loss 2.0000  1,234 tokens/s  0m07s left"


@pytest.mark.parametrize("seconds, text", [(0.4, "0m00s"), (59.6, "1m00s"), (3599, "59m59s"), (3661, "1h01m")])
def test_durations(seconds, text):
    assert log._duration(seconds) == text


def test_quiet_says_nothing(tmp_path, capsys):
    with RunLog(tmp_path, 2, quiet=True) as run:
        run.progress(2, 1.0, 1.0)
        run.note("hello")
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


def test_loss_that_is_not_finite_can_be_logged(tmp_path):
    with RunLog(tmp_path, 2, quiet=True) as run:
        run.metrics(1, {"train/loss": math.inf})
    assert read_metrics(tmp_path) == [{"step": 1, "train/loss": None}]


def test_terminal_shows_a_live_bar(tmp_path):
    code = """
import sys
from bd3lm_jax.core import log
from bd3lm_jax.core.log import RunLog, result
with RunLog(sys.argv[1], total_steps=4) as run:
    for step in range(1, 5):
        run.progress(step, 1.25, 5000.0)
        run.note(f"after step {step}")
result({"step": 4})
"""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, stderr=slave,
                          env=environment, timeout=60)
    os.close(slave)
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert done.returncode == 0 and json.loads(done.stdout) == {"step": 4}
    for text in ("4/4", "loss 1.2500", "5,000 tokens/s", "after step 2", "left"):
        assert text in shown


def test_work_without_steps_shows_that_it_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(log, "BUSY_SECONDS", 0.05)
    with log.spinner("compiling [the step]"):
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 6 and set(lines) == {"compiling [the step]: 0m00s"}
    with log.spinner("short"):
        pass
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_seconds_while_nothing_else_moves(monkeypatch):
    """Above, or beside, the bar of a run; nothing of it stays on the screen."""
    screen = io.StringIO()
    monkeypatch.setattr(log, "_console", Console(file=screen, force_terminal=True, width=80, highlight=False,
                                                 _environ={"TERM": "xterm"}))
    with log.spinner("validating {all} [of it]"):
        time.sleep(0.3)
        log.note("a note meanwhile")
    shown = screen.getvalue()
    assert "validating {all} [of it]" in shown and "0:00:00" in shown and "a note meanwhile" in shown


def test_a_full_disk_is_one_clear_error(tmp_path):
    with RunLog(tmp_path, 10, quiet=True) as run:
        run._file.close()
        run._file = open("/dev/full", "a", encoding="utf-8")
        with pytest.raises(RunError, match="metrics.jsonl: No space left on device; free some disk space"):
            run.metrics(1, {"train/loss": 1.0})
        run._file = None


def test_a_table_wider_than_the_terminal_becomes_lines(monkeypatch):
    columns, rows = ["name", "bits per byte", "interval"], [["first model", "1.25", "1.2 .. 1.3"], ["second", "", "x"]]
    text = shown_on(monkeypatch, 80, True, columns, rows)
    assert all("│" in line for line in text.splitlines() if "model" in line)
    text = shown_on(monkeypatch, 30, True, columns, rows)
    assert text == ("Scores\nname first model\n  bits per byte  1.25\n  interval       1.2 .. 1.3\nname second\n"
                    "  interval       x\n")


def test_a_file_gets_the_whole_table(monkeypatch):
    text = shown_on(monkeypatch, 30, False, ["name", "value"], [["x" * 40, "1"], ["y", "2"]])
    assert [line.count("│") for line in text.splitlines() if "x" in line or "y" in line] == [3, 3]


def shown_on(monkeypatch, width, terminal, columns, rows):
    file = io.StringIO()
    monkeypatch.setattr(log, "_console", Console(file=file, width=width, force_terminal=terminal, color_system=None,
                                                 highlight=False))
    table("Scores", columns, rows)
    return file.getvalue()

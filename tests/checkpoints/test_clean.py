"""`clean` shows and removes what nobody needs, and nothing that somebody does."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from places import ROOT
from toy_build import BUILD

from bd3lm_jax.checkpoints import clean
from bd3lm_jax.core import files, lock
from launch.__main__ import main

HOST = socket.gethostname()
GONE = 2 ** 22 + 1  # no process of Linux has such a number
DAY = 24 * 3600.0
ROWS = "text-train-0123456789abcdef0123"


def make(path, age_s=0.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(7))
    for entry in (path, path.parent):
        os.utime(entry, (time.time() - age_s,) * 2)
    return path


def found(*directories):
    return {str(x.path.name): x.kind for x in clean.find(list(directories), DAY)}


def test_leftovers_of_the_cache(tmp_path):
    make(tmp_path / ROWS / "tokens.npy")
    make(tmp_path / "tokenizer-0123456789abcdef0123.json")
    mine = f".tokenizer-a.json.{files.unique()}.tmp"
    make(tmp_path / mine)
    expected = {
        f"{ROWS}.part-{HOST}-{GONE}-0123abcd": clean.WORK, f"{ROWS}.parts": clean.UNFINISHED,
        f".tokenizer-a.json.{HOST}-{GONE}-0123abcd.tmp": clean.TEMPORARY,
        "tokenizer-0123456789abcdef0123.4711.part": clean.TEMPORARY, f".{ROWS}.lock": clean.LOCK}
    make(tmp_path / f"{ROWS}.part-{HOST}-{GONE}-0123abcd" / "tokens.flat")
    make(tmp_path / f"{ROWS}.parts" / "000000-a.npz")
    make(tmp_path / f".tokenizer-a.json.{HOST}-{GONE}-0123abcd.tmp")
    make(tmp_path / "tokenizer-0123456789abcdef0123.4711.part", 2 * DAY)
    (tmp_path / f".{ROWS}.lock").write_text('{"pid": 1, "host": "a", "since": "b"}')
    (tmp_path / ".another.lock").write_text("of another program")
    os.utime(tmp_path)
    assert found(tmp_path) == expected
    assert all(clean.remove(x) for x in list(clean.find([tmp_path], DAY)))
    assert set(os.listdir(tmp_path)) == {ROWS, "tokenizer-0123456789abcdef0123.json", mine, ".another.lock"}


def test_what_others_may_be_writing_stays_for_a_day(tmp_path):
    names = [f"{ROWS}.part-elsewhere-1-0123abcd", f"{ROWS}.part-abcdefg_", f"{ROWS}.parts"]
    for name in names:
        make(tmp_path / name / "a", DAY / 2)
    assert found(tmp_path) == {}
    for name in names:
        make(tmp_path / name / "a", 2 * DAY)
    assert set(found(tmp_path)) == set(names)


def test_nothing_that_a_living_process_holds(tmp_path):
    """Its directory, and the parts that it goes on with, though they have not changed for long."""
    with subprocess.Popen([sys.executable, "-c", BUILD, str(tmp_path / ROWS)], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE) as process:
        name = process.stdout.readline().strip()
        make(tmp_path / f"{ROWS}.parts" / "000000-a.npz", 2 * DAY)
        leftovers = list(clean.find([tmp_path], DAY))
        process.kill()
    assert leftovers == []
    assert set(found(tmp_path)) == {name, f"{ROWS}.parts", f".{ROWS}.lock"}


def test_what_is_begun_after_it_was_found_stays(tmp_path):
    make(tmp_path / f"{ROWS}.parts" / "000000-a.npz", 2 * DAY)
    (leftover,) = clean.find([tmp_path], DAY)
    code = BUILD.replace("workspace.directory(Path(sys.argv[1]), \"builds\")",
                         "lock.hold_waiting(Path(sys.argv[1]), '')")
    code = code.replace("import workspace", "import lock").replace("made.name", "made")
    with subprocess.Popen([sys.executable, "-c", code, str(leftover.lock)], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == "True\n"
        assert not clean.remove(leftover) and leftover.path.is_dir()
        process.kill()
    assert clean.remove(leftover) and not leftover.path.exists()


@pytest.fixture
def run(tmp_path):
    """A run directory, in which a process was killed, in runs/."""
    run = tmp_path / "runs" / "mine"
    make(run / "config.json")
    make(run / "checkpoints" / "20" / "params")
    make(run / "checkpoints" / ".damaged" / "10" / "params")
    make(run / "checkpoints" / ".trash" / "5" / "params", 2 * DAY)
    make(run / "checkpoints" / "30.orbax-checkpoint-tmp-1" / "params", 2 * DAY)
    make(run / "checkpoints" / "40.orbax-checkpoint-tmp-1" / "params")
    make(run / f".report.json.{HOST}-{GONE}-0123abcd.tmp")
    make(tmp_path / "runs" / "moved" / "train.lock", 2 * DAY)
    (tmp_path / "runs" / "moved" / "checkpoints" / ".trash").mkdir(parents=True)
    for path in (tmp_path / "runs" / "moved" / "checkpoints" / ".trash", tmp_path / "runs" / "moved" / "checkpoints",
                 tmp_path / "runs" / "moved"):
        os.utime(path, (time.time() - 2 * DAY,) * 2)
    make(tmp_path / "runs" / f"hf.part-{HOST}-{GONE}-0123abcd" / "model.safetensors")
    return run


def test_leftovers_of_runs(tmp_path, run):
    expected = {"10": clean.DAMAGED, "5": clean.TRASH, "30.orbax-checkpoint-tmp-1": clean.TRASH, "moved": clean.BARE,
                f".report.json.{HOST}-{GONE}-0123abcd.tmp": clean.TEMPORARY,
                f"hf.part-{HOST}-{GONE}-0123abcd": clean.WORK}
    assert found(tmp_path / "runs") == expected
    with lock.hold(run / "train.lock"):  # training goes on
        other = ("import sys; from pathlib import Path; from bd3lm_jax.checkpoints import clean; "
                 "print([x.path.name for x in clean.find([Path(sys.argv[1])], 86400.0)])")
        done = subprocess.run([sys.executable, "-c", other, str(run)], cwd=ROOT, text=True, capture_output=True)
    assert done.stdout == f"['.report.json.{HOST}-{GONE}-0123abcd.tmp']\n"


def test_the_leftovers_of_a_conversion_are_found_by_its_target(tmp_path, run):
    (tmp_path / "runs" / "hf").mkdir()
    assert found(tmp_path / "runs" / "hf") == {f"hf.part-{HOST}-{GONE}-0123abcd": clean.WORK}


def test_the_command_shows_and_then_removes(tmp_path, run, capsys):
    code = main(["clean", f"--workdir={tmp_path / 'runs'}"])
    shown, said = capsys.readouterr()
    shown = json.loads(shown)
    assert code == 0 and shown["bytes"] > 30 and shown["removed"] == 0 and "--remove deletes them" in said
    assert {"path", "kind", "bytes", "age_s", "removed"} == set(shown["leftovers"][0])
    assert main(["clean", f"--workdir={tmp_path / 'runs'}", "--remove"]) == 0
    removed = json.loads(capsys.readouterr().out)
    assert removed["removed"] == shown["bytes"] and all(x["removed"] for x in removed["leftovers"])
    assert main(["clean", f"--workdir={tmp_path / 'runs'}"]) == 0
    assert "nothing is left behind" in capsys.readouterr().err
    assert (run / "checkpoints" / "20" / "params").exists() and (run / "config.json").exists()


def test_a_directory_that_is_none(tmp_path, capsys):
    assert main(["clean", f"--workdir={tmp_path / 'nowhere'}"]) == 2
    assert "is no directory" in capsys.readouterr().err

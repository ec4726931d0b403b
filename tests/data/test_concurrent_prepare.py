"""Many processes that prepare the same text at once, some of them killed: all others get the same, and nothing is
left."""

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from toy_runs import environment, write_text

from bd3lm_jax.core import workspace
from bd3lm_jax.data import parts
from bd3lm_jax.data.prepare import prepare, prepare_tokenizer
from bd3lm_jax.data.tokenizers import ByteTokenizer
from bd3lm_jax.experiments.bench import concurrent_prepare

PART = 500


@pytest.fixture
def text_config(data_config, tmp_path):
    write_text(tmp_path / "some.txt", 200)
    return lambda **changes: data_config(source="text", path=str(tmp_path / "some.txt"), **changes)


@pytest.mark.ci_slow
def test_many_processes_some_of_them_killed(text_config, tmp_path, monkeypatch):
    """Rows in parts, and a tokenizer that is trained: built once, while the others wait."""
    data = text_config(tokenizer="bpe:270")
    asked = {"data": dataclasses.asdict(data), "processes": 24, "killed": 4, "within_s": 0.5, "part_chars": PART,
             "seed": 0}
    done = subprocess.run([sys.executable, "-m", "bd3lm_jax.experiments.bench.concurrent_prepare",
                           json.dumps(asked)], env=environment(), capture_output=True, text=True, timeout=300)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["errors"] == [] and found["codes"] == [0] * 20
    prepare(data, "train", 4, prepare_tokenizer(data))  # tidies up after the killed ones
    assert sorted(name.split("-")[0] for name in os.listdir(data.cache_dir)) == ["text", "tokenizer"]
    assert found["contents"] == [
        concurrent_prepare.content(text_config(tokenizer="bpe:270", cache_dir=str(tmp_path / "alone")))
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_parts_that_go_under_a_slower_process(text_config, tmp_path, monkeypatch, workers):
    """Where files cannot be locked another one may be done first, and removes them."""
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    expected = prepare(text_config(cache_dir=str(tmp_path / "whole")), "train", 4, ByteTokenizer()).stream()
    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(parts, "PART_CHARS", PART)
    gone = []

    def finish(documents, tokens):
        for directory in (tmp_path / "cache").glob("*.parts"):
            shutil.rmtree(directory, ignore_errors=True)
            gone.append(directory)

    rows = prepare(text_config(), "train", 4, ByteTokenizer(), finish, workers)
    assert len(gone) > 5 and (rows.stream() == expected).all()
    assert not list((tmp_path / "cache").glob("*.part*"))


def test_leftovers_go_though_the_rows_are_there(text_config, tmp_path):
    rows = prepare(text_config(), "train", 4, ByteTokenizer())
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    left = rows.path.with_name(f"{rows.path.name}.part-{os.uname().nodename}-{int(child.stdout)}-0123abcd")
    left.mkdir()
    (left / "tokens.flat").write_bytes(bytes(9))
    workspace.parts(rows.path).mkdir()
    prepare(text_config(), "train", 4, ByteTokenizer())
    assert os.listdir(rows.path.parent) == [rows.path.name]


def test_rows_in_a_directory_that_cannot_be_written_are_read(text_config, monkeypatch):
    rows = prepare(text_config(), "train", 4, ByteTokenizer())
    workspace.parts(rows.path).mkdir()

    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("bd3lm_jax.core.lock._open", refuse)
    assert prepare(text_config(), "train", 4, ByteTokenizer()).path == rows.path
    assert Path(workspace.parts(rows.path)).is_dir()

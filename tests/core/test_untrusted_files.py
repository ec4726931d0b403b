"""What others made: files without end, links that lead away, sizes that no file holds, texts that steer a terminal."""

import io
import json
import os
import shutil
import socket
import time
from pathlib import Path

import pytest
from places import GOLDEN, HF
from rich.console import Console

from bd3lm_jax.checkpoints import hf, rundir
from bd3lm_jax.checkpoints.published.tensors import open_file
from bd3lm_jax.core import log, untrusted_files
from bd3lm_jax.core.errors import UserError, escape_control_characters
from bd3lm_jax.data import chat_template, corpus, text_files
from bd3lm_jax.data.density.file import Annotations
from bd3lm_jax.data.tokenizers import ByteTokenizer, load_tokenizer
from bd3lm_jax.evaluation import convert
from bd3lm_jax.evaluation.settings import read_object
from bd3lm_jax.evaluation.tasks.math500 import MATH500, last_boxed
from bd3lm_jax.evaluation.tasks.task import read_problems
from bd3lm_jax.generation.constraints import automaton
from bd3lm_jax.generation.sample_files import read as read_samples
from bd3lm_jax.generation.trace import read_html
from launch.infill import read_texts

READERS = {
    "tokenizer": load_tokenizer, "settings": read_object, "trace": read_html, "infill": read_texts,
    "problems": lambda path: read_problems(MATH500, str(path)), "weights": lambda path: open_file(Path(path)),
    "model": lambda path: hf.read_config(Path(path)), "dialogues": lambda path: chat_template._read_config(Path(path)),
    "density": lambda path: Annotations(Path(path)),
    "samples": lambda path: read_samples(str(path)),
}


@pytest.fixture(params=["pipe", "device", "directory", "socket", "endless"])
def no_file(request, tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "device":
        path = Path("/dev/zero")
    elif request.param == "directory":
        path.mkdir()
    elif request.param == "socket":
        monkeypatch.chdir(tmp_path)
        server = socket.socket(socket.AF_UNIX)
        server.bind(path.name)
        request.addfinalizer(server.close)
    else:
        with open(path, "wb") as file:
            file.truncate(5 << 30)
    return path


@pytest.mark.parametrize("name", READERS)
def test_only_regular_files_of_a_bounded_size_are_read(name, no_file):
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        READERS[name](no_file)
    assert time.monotonic() - began < 5 and "\n" not in str(error.value)


def test_the_config_of_a_run_is_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / rundir.CONFIG)
    with pytest.raises(UserError, match="config.json: it is a pipe, expected a regular file"):
        rundir.planned_steps(tmp_path)


@pytest.mark.parametrize("ending", ["", ".gz", ".xz"])
def test_corpora_are_regular_files(tmp_path, ending):
    path = tmp_path / f"train.txt{ending}"
    os.mkfifo(path)
    for read in (lambda: list(text_files.lines(path)), lambda: corpus._sha256(path)):
        with pytest.raises(UserError, match="it is a pipe, expected a regular file"):
            read()


def test_a_text_is_read_as_before(tmp_path):
    (tmp_path / "x").write_bytes("a\r\nb\rc\n\u2028é".encode())
    assert untrusted_files.read_text(tmp_path / "x") == "a\nb\nc\n\u2028é"
    with pytest.raises(OSError, match="more than 3 bytes"):
        untrusted_files.read_bytes(tmp_path / "x", 3)


def test_links_that_leave_a_directory_are_not_copied(tmp_path):
    """Those of the Hub's cache lead to blobs/ beside snapshots/."""
    (tmp_path / "secret").write_text("{}")
    model = tmp_path / "model"
    shutil.copytree(HF / "llama", model)
    (model / "vocab.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="vocab.json: it is a link to .*secret, outside"):
        convert._copied(model)
    (model / "vocab.json").unlink()
    (model / "added_tokens.json").symlink_to("config.json")
    (model / "merges.txt").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="cannot copy .*merges.txt"):
        convert._copied(model)
    (model / "merges.txt").unlink()
    assert list(convert._copied(model)) == ["added_tokens.json", "generation_config.json"]
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "1", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "ab").write_text("{}")
    (snapshot / "vocab.json").symlink_to("../../blobs/ab")
    assert convert._copied(snapshot) == {"vocab.json": b"{}"}
    (snapshot / "merges.txt").symlink_to("../../../secret")
    with pytest.raises(UserError, match="outside of the directory"):
        convert._copied(snapshot)


def test_chat_templates_that_are_links_are_not_copied(tmp_path):
    (tmp_path / "secret").write_text("x")
    (tmp_path / "run").mkdir()
    ByteTokenizer().save(tmp_path / "run" / "tokenizer.json")
    (tmp_path / "run" / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="outside of the directory"):
        chat_template.chat_files(tmp_path / "run" / "tokenizer.json")


@pytest.mark.parametrize("name", ["bd3lm_block4", "sedd", *(f"hf/{path.name}" for path in (HF).iterdir())])
@pytest.mark.parametrize("number", [10**6, 10**9, 10**18])
def test_no_number_of_a_config_makes_us_wait(tmp_path, name, number):
    """Layers, heads, vocabulary, experts, sizes: bound by what the files hold."""
    published = json.loads((GOLDEN / name / "config.json").read_text())
    for file in (GOLDEN / name).glob("*.safetensors"):
        shutil.copy(file, tmp_path)
    for key in [key for key, value in published.items() if type(value) is int]:
        (tmp_path / "config.json").write_text(json.dumps(published | {key: number}))
        began = time.monotonic()
        try:
            hf.read_model(tmp_path)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 3000
        assert time.monotonic() - began < 10, key


STEERING = {"\x1b[2J": r"\x1b[2J", "\x9b2J": r"\x9b2J", "a\rb": r"a\rb", "\u202eabc": r"\u202eabc", "\x07": r"\x07",
            "\u2028": r"\u2028", "\udc80": r"\udc80", "\x7f": r"\x7f"}
HARMLESS = "a\n\tb é 漢字 \u00a0 👩\u200d💻 שלום"


def test_what_steers_a_terminal_is_shown_escaped():
    for text, shown in STEERING.items():
        assert escape_control_characters(text) == shown
    assert escape_control_characters(HARMLESS) == HARMLESS


@pytest.mark.parametrize("terminal", [False, True])
def test_notes_tables_and_results_steer_no_terminal(monkeypatch, capsys, terminal):
    out = io.StringIO()
    monkeypatch.setattr(log, "_console", Console(file=out, force_terminal=terminal, color_system=None, width=200))
    for text in STEERING:
        log.note(f"<{text}>")
        log.table(f"<{text}>", [f"<{text}>", "b"], [[f"<{text}>", 1]])
        log.result({text: [text]})
    shown = out.getvalue()
    for text, escaped in STEERING.items():
        assert shown.count(f"<{escaped}>") == 4 and f"<{text}>" not in shown
    printed = capsys.readouterr().out
    assert [json.loads(line) for line in printed.split("\n") if line] == [{text: [text]} for text in STEERING]
    assert not set(printed) & set("\x1b\x9b\r\u202e\x07\u2028\udc80\x7f")


def test_a_live_line_steers_no_terminal(monkeypatch):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system=None, width=200, _environ={"TERM": "xterm"})
    monkeypatch.setattr(log, "_console", console)
    for text, escaped in STEERING.items():
        with log.spinner(f"<{text}>"):
            pass
        assert f"<{escaped}>" in out.getvalue() and f"<{text}>" not in out.getvalue()


@pytest.mark.parametrize("constraint", [
    "(" * 3000 + "a" + ")" * 3000, "(" * 3000, "(?:" * 3000 + ")" * 3000, "[" * 3000, "(a|" * 3000 + "b" + ")" * 3000,
    {"type": "array", "items": None}, {"anyOf": None},
])
def test_deep_constraints_are_one_line(constraint):
    if isinstance(constraint, dict):
        key, inner = next(key for key, value in constraint.items() if value is None), {"type": "integer"}
        for _ in range(3000):
            inner = {**constraint, key: [inner] if key == "anyOf" else inner}
        constraint = inner
    with pytest.raises(UserError) as error:
        automaton.build(constraint, ByteTokenizer(), 300, [8], ())
    assert "\n" not in str(error.value)


def test_deep_answers_are_read_in_time():
    began = time.monotonic()
    assert last_boxed("\\boxed{" * 3000 + "7" + "}" * 3000) == "7"
    assert last_boxed("\\boxed{" * 20_000) is None
    assert last_boxed("\\boxed " * 20_000 + "5 cm") == "5"
    assert last_boxed(r"\boxed{a{b}c} and \boxed{\frac{1}{2}} }} {") == r"\frac{1}{2}"
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("record", [
    "", "[]", "{}", "nonsense", "[" * 3000, '{"title": 1}', '{"title":"x","mask":1,"end":2,"pieces":{},"samples":[1]}',
    '{"title":"x","mask":1,"end":2,"pieces":{"1":2},"samples":[]}',
    '{"title":"x","mask":1,"end":2,"pieces":{},"samples":[{"number":0,"canvas":["<b>"],"steps":[],"stop":null,'
    '"nfe":null}]}',
    '{"title":"x","mask":1,"end":2,"pieces":{},"samples":[{"number":0,"canvas":[1],"steps":[{"block":0,"step":1,'
    '"nfe":1,"revealed":[[9,1,0.5]],"remasked":[]}],"stop":null,"nfe":null}]}',
])
def test_pages_beside_that_hold_no_trace(tmp_path, record):
    page = tmp_path / "page.html"
    page.write_text(f'<script type="application/json" id="record">{record}</script>')
    with pytest.raises(UserError, match="no page that sample --trace wrote"):
        read_html(page)

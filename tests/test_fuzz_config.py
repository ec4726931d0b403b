"""Configs, run directories, command lines with random damage: they mean something, or one line says what is wrong."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_fuzz import damaged, damaged_bytes, fuzz, values, works_or_says_why, written

from bd3lm_jax.checkpoints import rundir
from bd3lm_jax.config import Config
from bd3lm_jax.data.tokenizers import ByteTokenizer
from configs import common, tiny
from launch import arguments, sample, train
from launch import prepare as prepare_command
from launch.__main__ import main

BASE = tiny.get_config().to_dict()
KEYS = ["seed", *(f"{section}.{key}" for section, keys in BASE.items() if isinstance(keys, dict) for key in keys)]
WORDS = st.one_of(st.text(max_size=8), values.map(repr), st.sampled_from([
    "1", "-1", "0", "1e999", "nan", "True", "None", "()", "((", "[1", "'a", "{}", "__import__('os')", "9" * 5000,
    "\x00", "\x1b[2J"]))
FLAGS = st.tuples(st.sampled_from(["num", "prompt", "length", "config", "split", "steps"]), WORDS).map(
    "--{0[0]}={0[1]}".format)


@fuzz(150)
@given(content=st.one_of(damaged(BASE), values))
def test_mappings(content):
    config = works_or_says_why(lambda: Config.from_dict(copy.deepcopy(content)) if isinstance(content, dict) else None)
    if isinstance(config, Config):
        assert Config.from_dict(json.loads(json.dumps(config.to_dict()))).sha256() == config.sha256()


@fuzz(120)
@given(key=st.sampled_from(KEYS), value=values)
def test_one_key(key, value):
    content = copy.deepcopy(BASE)
    target = content
    *before, last = key.split(".")
    for part in before:
        target = target[part]
    target[last] = value
    works_or_says_why(lambda: Config.from_dict(content))


@fuzz(60)
@given(algo=st.sampled_from(common.algorithms()), data=st.data())
def test_objectives(algo, data):
    content = tiny.get_config()
    common.set_algo(content, algo, 0)
    works_or_says_why(lambda: Config.from_dict(data.draw(damaged(content.to_dict()))))


@fuzz(60)
@given(words=st.lists(st.tuples(st.one_of(st.sampled_from(KEYS), st.text(max_size=8)), WORDS), max_size=2))
def test_overrides(words):
    works_or_says_why(lambda: arguments.load_config("configs/tiny.py",
                                                    [f"--config.{key}={value}" for key, value in words]))


@fuzz(60)
@given(spec=st.one_of(st.text(max_size=12), st.text(max_size=12).map(lambda text: f"configs/tiny.py:{text}"),
                      st.text(max_size=12).map(lambda text: f"configs/lm1b.py:{text}"),
                      WORDS.map(lambda text: f"configs/lm1b.py:block_size={text}")))
def test_specs(spec):
    works_or_says_why(lambda: arguments.load_config(spec, []))


@fuzz(80)
@given(argv=st.lists(st.one_of(WORDS, FLAGS), max_size=4))
def test_flags(argv):
    for command in (sample, prepare_command, train):
        spec, overrides, rest = works_or_says_why(lambda: arguments.split_config(argv))
        works_or_says_why(lambda: arguments.parse_flags(command.define, rest))


@fuzz(100)
@given(data=st.data())
def test_run_directories(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("run")
    stored = Config.from_dict(BASE).with_vocab(258).to_dict() | {"config_sha256": "0"}
    written(path / "config.json", data.draw(st.one_of(damaged(stored), damaged_bytes(json.dumps(stored).encode()),
                                                      values)))
    (path / "tokenizer.json").write_bytes(ByteTokenizer().to_bytes())
    works_or_says_why(lambda: rundir.read(path))


@pytest.mark.parametrize("source, code", [
    ("get_config = 3", 2), ("def get_config(): return 3", 2), ("def get_config(:", 2), ("import nowhere", 1),
    ("def get_config():\n    raise ValueError('no')", 2), ("\x00", 2), ("def get_config(): return {'sed': 0}", 2),
])
def test_config_files(tmp_path, capsys, source, code):
    path = tmp_path / "some.py"
    path.write_text(source)
    assert main(["prepare", f"--config={path}"]) == code
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error


RAISED = [
    ("x = 1 / 0", "line 1: ZeroDivisionError: division by zero"),
    ("import os\n\nos.nothing", "line 3: AttributeError: module 'os' has no attribute 'nothing'"),
    ("from os import nothing", "line 1: ImportError: cannot import name 'nothing'"),
    ("def f():\n    return {}['no']\nx = f()", "line 2: KeyError: 'no'"),
    ("raise RuntimeError('two\\nlines')", "line 1: RuntimeError: two lines"),
    ("import sys\nsys.exit('enough')", "line 2: SystemExit: enough"),
    ("def f(): f()\nf()", "line 1: RecursionError: maximum recursion depth exceeded"),
    ("assert False", "line 1: AssertionError"),
    ("{body}", "line {line}: KeyError: 'no'"),
]


def of_function(name):
    """`{body}` stands for a function that raises; its error line follows its head."""
    head = f"def {name}():\n    "
    return [(source.replace("{body}", head + "return {}['no']"), message.replace("{line}", "2"))
            for source, message in RAISED] + [
        (head + "raise TypeError('no')", "line 2: TypeError: no"), (head + "import os; os.nothing", "AttributeError"),
        (f"{name} = 3", f"has no function {name}("), (f"from configs.nothing import {name}", "not installed"),
        (head + "raise ValueError('no')", ": no")]


@pytest.mark.parametrize("source, message", [
    *of_function("get_config"), ("get_config = dict", "ValueError: no signature found"),
    ("def get_config(): return {1: 2}", "the key 1, expected a text"),
    ("def get_config(): return {'a': {(): 2}}", "the key (), expected a text"),
    ("def get_config(): return {'a.b': 2}", "ValueError: "),
    ("def get_config():\n    from configs import common\n    return common.nothing()", "line 3: AttributeError")])
def test_what_a_config_file_raises_is_told_with_its_line(tmp_path, capsys, source, message):
    assert_says(["prepare"], tmp_path, capsys, source, message)


@pytest.mark.parametrize("source, message", [
    *of_function("sweep"), ("def sweep():\n    yield {}\n    yield {}['no']", "line 3: KeyError: 'no'"),
    ("def sweep(): return 3", "TypeError: 'int' object is not iterable")])
def test_what_a_sweep_raises_is_told_with_its_line(tmp_path, capsys, source, message):
    assert_says(["sweep", f"--workdir={tmp_path / 'runs'}"], tmp_path, capsys, source, message)
    assert not (tmp_path / "runs").exists()


def assert_says(command, tmp_path, capsys, source, message):
    path = tmp_path / "some.py"
    path.write_text(source)
    assert main([*command, f"--config={path}"]) == (1 if message == "not installed" else 2)
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and message in error, error
    assert str(path) in error or message == "not installed"


@pytest.mark.parametrize("words, message", [
    (["--config.data.source=mixture", "--config.data.mixture=(('austen',0),)"], "weight of 'austen' is 0.0"),
    (["--config.data.source=\x1b[2J\n\ud800"], r"data.source is '\x1b[2J\n\ud800'"),
    (["\x1b[2Ja\nb\ud800"], r"unexpected argument '\x1b[2Ja b\ud800'"),
    (["9" * 10_000], "9 ... 9"),
])
def test_the_whole_command_says_one_short_line(capsys, words, message):
    """Nor does what is quoted reach the terminal as a control character, or without end."""
    assert main(["prepare", *words]) == 2
    said = capsys.readouterr().err.strip("\n")
    assert message in said and said.isprintable() and len(said) < 2000

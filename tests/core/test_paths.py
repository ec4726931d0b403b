"""Paths as people write them, in flags, configs and Python; and what the surroundings of a command may be like."""

import importlib
import json
import os
import pty
import subprocess
import sys

import fsspec
import pytest
from absl import flags
from grids import some
from toy_runs import ROOT, toy_config

from bd3lm_jax.checkpoints import hf
from bd3lm_jax.core import paths
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data.prepare import cache_directory
from launch import arguments, bench, clean, convert, infill, sample, sweep, tpu, train
from launch import eval as evaluate
from launch.__main__ import COMMANDS

LOCAL_FLAGS = [(module, name) for module, names in {
    train: ("workdir",), sweep: ("workdir",), convert: ("from", "to", "tokenizer"), infill: ("workdir",),
    sample: ("workdir", "out", "trace"), bench: ("workdir", "out", "scorer"),
    evaluate: ("workdir", "data_dir", "baseline", "scorer", "plot"),
    tpu: ("out",), clean: ("workdir", "cache_dir")}.items() for name in names]
INPUT_FLAGS = [(module, name) for module, names in {
    infill: ("file",), sample: ("settings", "json_schema", "compare_traces"),
    evaluate: ("data", "samples", "reference", "file")}.items() for name in names]


@pytest.mark.parametrize("module, name", LOCAL_FLAGS + INPUT_FLAGS)
def test_every_path_flag_expands_a_home(module, name, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    found = arguments.parse_flags(module.define, [f"--{name}=~/x"])[name].value
    assert found == (["/somewhere/x"] if name == "compare_traces" else "/somewhere/x")


@pytest.mark.parametrize("module, name", LOCAL_FLAGS)
def test_a_path_that_is_no_input_refuses_a_scheme(module, name):
    for url in ("gs://bucket/run", "s3://bucket/run", "hf://org/name", "https://host/run", "memory://run"):
        with pytest.raises(UserError, match=f"{name}.*{url}: {url.partition(':')[0]}:// is no local path"):
            arguments.parse_flags(module.define, [f"--{name}={url}"])


@pytest.mark.parametrize("module, name", INPUT_FLAGS)
def test_an_input_may_have_a_scheme_that_can_be_read_here(module, name):
    fsspec.register_implementation("missing", "no_such_package.System", errtxt="Please install no-such-package",
                                   clobber=True)
    found = arguments.parse_flags(module.define, [f"--{name}=memory://texts/x.jsonl"])[name].value
    assert "memory://texts/x.jsonl" in found
    for url, problem in (("missing://b/x", "cannot be read here .*Please install no-such-package"),
                         ("nowhere://b/x", "cannot be read here .*nowhere"), ("file:///dev/zero", "is no local path")):
        with pytest.raises(UserError, match=f"^[^\n]*{name}.*{url}: {url.partition(':')[0]}:// {problem}[^\n]*$"):
            arguments.parse_flags(module.define, [f"--{name}={url}"])


def test_no_flag_that_says_it_is_a_path_is_forgotten():
    # which may be a bucket, and a size
    words, others = ("directory", " file", "page"), ("shared_dir", "max_shard_size")
    for command in COMMANDS:
        module, values = importlib.import_module(f"launch.{command}"), flags.FlagValues()
        module.define(values)
        for name in values:
            is_path = isinstance(values[name].parser, arguments.PathParser)
            says_so = values[name].flag_type() == "string" and any(word in values[name].help for word in words)
            assert is_path or not says_so or name in others, (module.__name__, name)


@pytest.mark.parametrize("key, value", [
    ("data.path", "~/text.txt"), ("data.cache_dir", "~/cache"), ("data.tokenizer", "~/tokenizer.json"),
    ("train.init_from", "~/run"),
])
def test_paths_in_a_config(key, value, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    section, name = key.split(".")
    assert getattr(getattr(toy_config(tmp_path, {key: value}), section), name) == value.replace("~", "/somewhere")
    if key == "data.path":
        # also where it cannot be read: a run of another machine opens here
        assert toy_config(tmp_path, {key: "nowhere://x"}).data.path == "nowhere://x"
        return
    with pytest.raises(UserError, match=f"{key}=gs://bucket/x: gs:// is no local path"):
        toy_config(tmp_path, {key: "gs://bucket/x"})


def test_a_name_with_commas_that_is_there_is_one_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b", "c", "d"):
        (tmp_path / name).mkdir()
    assert paths.split("a,b") == ["a,b"]
    assert paths.split("c,a,b,d") == ["c", "a,b", "d"]
    assert paths.split("a,c") == ["a", "c"]
    assert arguments.parse_flags(evaluate.define, ["--workdir=a,b"]).workdir == "a,b"


def test_an_unknown_home(monkeypatch):
    with pytest.raises(UserError, match="home directory of '~nobody-of-that-name' is not known"):
        paths.local("~nobody-of-that-name/x")


@pytest.mark.parametrize("home", [None, "/proc/nowhere", ""])
def test_without_a_home_that_can_be_written_the_cache_is_a_private_temporary_directory(home, tmp_path, monkeypatch):
    monkeypatch.delenv("BD3LM_CACHE", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    monkeypatch.delenv("HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    found = cache_directory("")
    assert found == tmp_path / f"bd3lm_jax-{os.getuid()}" and found.stat().st_mode & 0o777 == 0o700
    found.chmod(0o777)
    with pytest.raises(UserError, match="is not a private directory of yours"):
        paths.default_cache()


@pytest.mark.parametrize("name, is_name", [
    ("gpt2", True), ("openai-community/gpt2", True), ("nowhere.gguf", False), ("runs/tiny", False), ("a/b/c", False),
    ("../gpt2", False), ("/gpt2", False), ("", False),
])
def test_names_on_the_hub(name, is_name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    monkeypatch.setattr(hf, "download", lambda name: asked.append(name) or str(tmp_path / "copy"))
    assert hf.local(name) == (str(tmp_path / "copy") if is_name else name)
    assert asked == [name] * is_name


def test_a_hub_name_of_one_part_comes_out_of_the_local_cache(monkeypatch, tmp_path):
    """In the layout of huggingface_hub, without a network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    snapshot = tmp_path / "models--gpt2" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--gpt2" / "refs").mkdir()
    (tmp_path / "models--gpt2" / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    import huggingface_hub

    plain = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: plain(
        *args, **kwargs, cache_dir=str(tmp_path)))
    assert hf.local("gpt2") == str(snapshot)


def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=os.environ | environment, capture_output=True,
                          timeout=200)


@pytest.mark.parametrize("locale", some([
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONIOENCODING": "ascii"}, {"PYTHONUTF8": "1"},
], 0))
def test_a_result_is_said_in_every_locale(locale):
    text = "café \u2603 \u2028 \udcff"
    done = run("-c", f"from bd3lm_jax.core import log; log.note({text!a}); log.result({{'text': {text!a}}})", **locale)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode("utf-8").split("\n")  # JSON is UTF-8
    assert len(lines) == 2 and json.loads(lines[0]) == {"text": text}


LOCALES = [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONUTF8": "1"}]
TEXT_FLAGS = {"sample": ("prompt", "stop", "constraint", "fixed_tokens"), "infill": ("text",)}


@pytest.mark.parametrize("locale", LOCALES)
def test_texts_of_the_command_line_are_utf8_in_every_locale(locale):
    """Every flag that is a text; paths stay the bytes that the file system has."""
    code = ("import os, sys; from launch import arguments, infill, sample\n"
            "said = [arguments.parse_flags(sample.define, [f'--{name}={sys.argv[1]}', '--out=' + sys.argv[1]])\n"
            f"        for name in {TEXT_FLAGS['sample']}]\n"
            f"texts = [flags[name].value for flags, name in zip(said, {TEXT_FLAGS['sample']})]\n"
            "texts.append(arguments.parse_flags(infill.define, ['--text', sys.argv[1]]).text)\n"
            "keys = ('source=jsonl', 'path=x', 'field=' + sys.argv[1])\n"
            "config = arguments.load_config('configs/tiny.py', ['--config.data.' + key for key in keys])\n"
            "print(ascii(texts + [config.data.field]), [os.fsencode(flags.out) for flags in said])")
    done = run("-c", code, "caf\u00e9 \u2603", **locale)
    assert done.returncode == 0, done.stderr
    text, path = "caf\\xe9 \\u2603", b"caf\xc3\xa9 \xe2\x98\x83"
    assert done.stdout.decode().strip() == (
        f"[['{text}'], ['{text}'], '{text}', ['{text}'], ['{text}'], '{text}'] {[path] * 4}")


@pytest.mark.parametrize("module, name", [(module, name) for module in (sample, infill)
                                          for name in TEXT_FLAGS[module.__name__.split(".")[1]]])
def test_texts_that_are_not_utf8_are_refused(module, name):
    for text in (os.fsdecode(b"caf\xe9"), "\ud83d"):
        with pytest.raises(UserError, match=rf"^--{name}='.*' is not UTF-8 \(.*\): give UTF-8 text$"):
            arguments.parse_flags(module.define, [f"--{name}={text}"])


@pytest.mark.parametrize("platforms", some(["gpux", "tpu", "cuda"], 0))
def test_a_platform_that_is_not_there_is_one_line(platforms):
    done = run("-m", "launch", "sample", "--workdir=tests/data/golden/hf/gpt2", "--length=8", JAX_PLATFORMS=platforms)
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 2 and [line for line in lines if line.startswith("error:")] == lines[-1:]
    assert f"JAX_PLATFORMS={platforms}; unset it" in lines[-1] and "Traceback" not in done.stderr.decode()


@pytest.mark.parametrize("term, live", [("dumb", False), ("xterm", True)])
def test_a_terminal_that_cannot_move_its_cursor_gets_lines(term, live, tmp_path):
    code = ("import sys; from bd3lm_jax.core.log import RunLog\n"
            "with RunLog(sys.argv[1], 3) as log:\n"
            "    for step in (1, 2, 3): log.progress(step, 2.5, 100.0)\n")
    main, other = pty.openpty()
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stderr=other, timeout=100,
                          env=os.environ | {"TERM": term, "COLUMNS": "80"})
    os.close(other)
    said = os.read(main, 100_000).decode()
    os.close(main)
    assert done.returncode == 0
    assert ("step 3/3  loss 2.5000" in said) == (not live)

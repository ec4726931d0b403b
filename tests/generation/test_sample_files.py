import json

import pytest

from bd3lm_jax.checkpoints import rundir
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.generation import sample_files

ONE = {"samples": [{"text": "a b", "num_tokens": 2, "nfe": 3, "stop": "end"},
                   {"text": "", "num_tokens": 0, "nfe": 2, "stop": "length"}], "sampler": {"block_size": 4}}
TWO = {"samples": [{"text": "c", "num_tokens": 3, "nfe": 5, "stop": "end"}], "sampler": {"block_size": 4}}


@pytest.fixture
def write(tmp_path):
    def write(content: str, name: str = "texts.json") -> str:
        (tmp_path / name).write_text(content, encoding="utf-8")
        return str(tmp_path / name)
    return write


@pytest.mark.parametrize("layout", ["lines", "indented"])
def test_results_of_sample(write, layout):
    found = sample_files.read(write(f"{json.dumps(ONE)}\n{json.dumps(TWO)}\n" if layout == "lines" else
                                    json.dumps({**ONE, "samples": ONE["samples"] + TWO["samples"]}, indent=1)))
    assert found.texts == ["a b", "", "c"] and found.name == "texts"
    assert found.nfe_per_token == 10 / 5
    assert found.block_size == 4 and found.stops == {"end": 2, "length": 1}


def test_lines_of_texts(write):
    """U+2028 is no end of a line."""
    found = sample_files.read(write('{"text": "a\\u2028b"}\n\n{"text": "c", "source": 1}\n', "texts.jsonl"))
    assert found.texts == ["a\u2028b", "c"]
    assert (found.nfe_per_token, found.block_size, found.stops) == (None, None, {})
    raw = sample_files.read(write('{"text": "a\u2028b"}\n{"text": "c"}\n'))
    assert raw.texts == ["a\u2028b", "c"]


def test_block_sizes_that_differ_are_not_known(write):
    other = {**TWO, "sampler": {"block_size": 8}}
    assert sample_files.read(write(f"{json.dumps(ONE)}\n{json.dumps(other)}")).block_size is None


def test_a_run_directory_gives_its_latest_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(rundir, "read", lambda path: (type("Config", (), {"block_size": 16}), None))
    with pytest.raises(UserError, match="has no texts in samples/"):
        sample_files.read(str(tmp_path))
    (tmp_path / "samples").mkdir()
    for step in (90, 1000):
        (tmp_path / "samples" / f"step_{step}.txt").write_text(f"at {step}\n--\n\n--\nline\nline\n")
    found = sample_files.read(str(tmp_path))
    assert found.texts == ["at 1000", "", "line\nline"] and found.block_size == 16
    assert found.name == tmp_path.name


def test_names_are_told_apart():
    files = [sample_files.Texts(name, path, [], None, None, {}) for name, path in (("a", "x/a"), ("b", "x/b"))]
    assert sample_files.names(files) == ["a", "b"]
    assert sample_files.names([files[0], files[1]._replace(name="a")]) == ["x/a", "x/b"]


@pytest.mark.parametrize("content, said", [
    ("", "holds no samples"), ('{"samples": []}', "holds no samples"), ("[1]", "holds a JSON list, expected"),
    ('{"samples": [{"text": null}]}', "without text"), ('{"txt": "a"}', "without text"),
    ('{"text": "a"}\nplain words', "line 2 is not JSON"), ('{"samples": 3}', "holds no samples")])
def test_files_that_hold_something_else(write, content, said):
    with pytest.raises(UserError, match=said):
        sample_files.read(write(content))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no file .*nothing.json: expected"):
        sample_files.read(str(tmp_path / "nothing.json"))
    (tmp_path / "bad.json").write_bytes(b"\xff\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        sample_files.read(str(tmp_path / "bad.json"))

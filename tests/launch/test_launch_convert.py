"""`python -m launch convert`: flags in, one JSON line out, one line for each error."""

import json
import shutil

import pytest
from places import GOLDEN
from word_tokenizer import write_tokenizer

import bd3lm_jax
from launch.__main__ import main


def run(capsys, *argv):
    code = main(["convert", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_there_and_back(tmp_path, capsys):
    shutil.copytree(GOLDEN / "ar", tmp_path / "model")
    write_tokenizer(tmp_path / "model", 66)
    code, out, err = run(capsys, f"--from={tmp_path / 'model'}", f"--to={tmp_path / 'run'}", "--format=native",
                         "--length=16")
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result == {"tensors": 12, "bytes": 273728, "path": str(tmp_path / "run"), "dtype": "float32",
                                    "format": "native"}
    assert bd3lm_jax.load(tmp_path / "run").context == 16
    code, out, err = run(capsys, f"--from={tmp_path / 'run'}", f"--to={tmp_path / 'out'}", "--dtype=bfloat16",
                         "--check=8", "--max_shard_size=0.05MB")
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result.keys() == {"tensors", "bytes", "path", "dtype", "format", "checked_tokens",
                                           "max_difference", "largest_logit"}
    assert (result["tensors"], result["checked_tokens"]) == (21, 8) and 0 < result["max_difference"] < 0.1
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() and "logits of 8 random tokens" in err


@pytest.mark.parametrize("argv, message", [
    ((), "--from is missing"), (("--from=SOURCE",), "--to is missing"),
    (("--from=nowhere", "--to=TMP/out"), "no run directory nowhere"),
    (("--from=SOURCE", "--to=TMP"), "exists and is never overwritten"),
    (("--from=SOURCE", "--to=TMP/out", "--format=native"), "brings no tokenizer"),
    (("--from=SOURCE", "--to=TMP/out", "--check=33"), "check is 33 tokens, expected at most 32"),
    (("--from=SOURCE", "--to=TMP/out", "--dtype=int4"), "--dtype=int4"),
])
def test_bad_usage(tmp_path, capsys, argv, message):
    words = [word.replace("SOURCE", str(GOLDEN / "ar")).replace("TMP", str(tmp_path)) for word in argv]
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "") and message in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()

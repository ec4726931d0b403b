"""`python -m launch infill`: what reaches the library, what comes back, and clear errors."""

import json

import pytest
from toy_lm import LETTERS, make_lm, masked

import bd3lm_jax
from launch.__main__ import main


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(bd3lm_jax, "load", lambda workdir, weights: make_lm(masked(4), tokenizer=LETTERS))


def run(capsys, *argv):
    code = main(["infill", "--workdir=there", *argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_result(capsys, tmp_path):
    (tmp_path / "texts.txt").write_text("ab[MASK]e\n\nabcek[MASK:1-2]f\n", encoding="utf-8")
    code, out, err = run(capsys, "--text=a[MASK:3]b", f"--file={tmp_path / 'texts.txt'}", "--mc_samples=1")
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and [len(one["holes"]) for one in result["texts"]] == [1, 1, 1]
    assert result["texts"][0]["holes"][0].keys() == {"start", "num_tokens", "text"}
    assert [one["score"] is None for one in result["texts"]] == [True, True, False]
    assert result["criterion"].startswith("log-likelihood in nats") and result["nfe"] == 3 + 1 + 1 + 2
    assert [one["input"] for one in result["texts"]] == ["a[MASK:3]b", "ab[MASK]e", "abcek[MASK:1-2]f"]
    assert [one["text"] in err for one in result["texts"]] == [True] * 3


def test_flags_reach_the_sampler(capsys):
    greedy = [json.loads(run(capsys, "--text=a[MASK:3]b", "--temperature=0", f"--seed={seed}", "--sampler=confidence",
                             "--steps=3")[1].splitlines()[-1]) for seed in (0, 1)]
    assert greedy[0]["texts"] == greedy[1]["texts"] and greedy[0]["texts"][0]["nfe"] == 3
    assert greedy[1]["seed"] == 1 and greedy[0]["criterion"] is None
    assert greedy[0]["sampler"] == {"name": "confidence", "steps": 3, "threshold": None, "temperature": 0.0,
                                    "top_k": None, "top_p": None}


@pytest.mark.parametrize("argv, message", [
    ((), "nothing to fill: give --text or --file, with holes: [MASK], [MASK:5] or [MASK:2-8]"),
    (("--text=abc",), "the text 'abc' has no hole"), (("--file=nowhere.txt",), "--file=nowhere.txt does not exist"),
    (("--text=a[MASK]", "--sampler=first"), "unknown sampler 'first': did you mean 'first_hitting'"),
    (("--text=a[MASK]", "--mc_samples=0"), "--mc_samples=0")])
def test_bad_usage(capsys, argv, message):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "") and message in err and len(err.splitlines()) == 1

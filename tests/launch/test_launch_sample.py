"""`python -m launch sample` and `bench sampling`: flags to options, and the result."""

import json

import pytest
from toy_lm import LETTERS, make_lm, masked

from bd3lm_jax.evaluation import cache_cost
from bd3lm_jax.generation import sample_files
from launch.__main__ import main

FIELDS = {"name", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "forbidden", "steps", "threshold",
          "block_size", "stop", "min_length", "min_entropy", "window", "cache_dtype", "approximate_cache", "guidance",
          "constraint", "forced", "cache_bytes_per_token", "source"}


@pytest.fixture
def lm(monkeypatch):
    """The model that every directory holds."""
    found = make_lm(masked(4), tokenizer=LETTERS)
    monkeypatch.setattr("bd3lm_jax.load", lambda path, weights, step: found)
    return found


def sample(capsys, *words):
    code = main(["sample", "--workdir=w", *words])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if code == 0 else None, captured.err


@pytest.mark.parametrize("words, step", [((), "latest"), (("--step=best",), "best"), (("--step=70",), 70)])
def test_the_checkpoint_that_is_loaded(capsys, lm, monkeypatch, words, step):
    asked = []
    monkeypatch.setattr("bd3lm_jax.load", lambda path, weights, step: asked.append(step) or lm)
    assert sample(capsys, "--num_samples=1", "--length=8", *words)[0] == 0
    assert asked == [step]


def test_the_result(capsys, lm):
    code, result, err = sample(capsys, "--prompt=ab", "--prompt=c", "--num=1", "--top_k=9", "--seed=3", "--length=16")
    expected = lm.generate(["ab", "c"], num=1, length=16, top_k=9, seed=3)
    assert code == 0 and set(result) == {"samples", "tokens_per_s", "nfe_per_token", "seed", "sampler"}
    assert result["samples"] == [{"prompt_index": i, "prompt": ("ab", "c")[i], "text": text, "num_tokens": len(tokens),
                                  "nfe": nfe, "stop": stop} for i, (text, tokens, nfe, stop) in enumerate(expected)]
    assert result["nfe_per_token"] == sum(s.nfe for s in expected) / sum(len(s.tokens) for s in expected)
    assert result["tokens_per_s"] > 0 and result["seed"] == 3
    used = result["sampler"]
    assert set(used) == FIELDS
    assert (used["name"], used["top_k"], used["steps"], used["block_size"]) == ("first_hitting", 9, 4, 4)
    assert used["cache_dtype"] == "float32" and used["source"] == "defaults"
    assert used["cache_bytes_per_token"] == {name: cache_cost.bytes_per_token(lm, name)
                                             for name in ("float32", "bfloat16", "int8")}
    assert expected[0].text in err and "bytes a token: float32 512, bfloat16 256, int8 160" in err


def test_every_text_names_its_prompt(capsys, lm):
    """Several texts of each prompt, also when they are watched; without prompts there is none to name."""
    code, result, err = sample(capsys, "--prompt=ab", "--prompt=c", "--num_samples=2", "--length=8")
    named = [(one["prompt_index"], one["prompt"]) for one in result["samples"]]
    assert named == [(0, "ab"), (0, "ab"), (1, "c"), (1, "c")]
    assert [line.split(":")[0] for line in err.splitlines() if line.startswith("--- ")] == [
        "--- sample 0 of prompt 0 'ab'", "--- sample 1 of prompt 0 'ab'", "--- sample 2 of prompt 1 'c'",
        "--- sample 3 of prompt 1 'c'"]
    _, result, err = sample(capsys, "--num_samples=2", "--length=8")
    assert [(one["prompt_index"], one["prompt"]) for one in result["samples"]] == [(None, None)] * 2
    assert "--- sample 1: " in err


@pytest.fixture
def calls(lm, monkeypatch):
    """Options of the calls of `generate`, which writes nothing."""
    found = []
    monkeypatch.setattr(lm, "generate", lambda prompts, **options: found.append(options) or [], raising=False)
    return found


def test_every_flag_reaches_the_model(capsys, calls):
    given = {"sampler": "factor", "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1,
             "repetition_penalty": 1.5, "steps": 2, "threshold": 0.7, "block_size": 4, "min_length": 2,
             "min_entropy": 1.5, "cache_dtype": "int8", "guidance": 2.0, "constraint": "a+"}
    words = [f"--{name}={value}" for name, value in given.items()]
    code, result, _ = sample(capsys, *words, "--window", "--stop=a", "--stop=b, c", "--num=2", "--length=9")
    assert code == 0
    assert calls == [{**given, "window": True, "stop": ["a", "b, c"], "num": 2, "length": 9, "seed": 0}]
    used = result["sampler"]
    assert {name: used[name] for name in given if name != "sampler"} == {
        name: value for name, value in given.items() if name != "sampler"}
    assert used["name"] == "factor" and used["stop"] == ["a", "b, c"] and used["window"] is True


def test_preferences_and_files(capsys, calls, tmp_path):
    preset = sample(capsys, "--prefer=speed")[1]["sampler"]
    assert (preset["name"], preset["threshold"]) == ("threshold", 0.6)
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"speed": {"sampler": "confidence", "steps": 2}}))
    words = (f"--settings={path}", "--prefer=speed", "--num_samples=2", "--length=8")
    used = sample(capsys, *words)[1]["sampler"]
    assert (used["name"], used["steps"], used["source"]) == ("confidence", 2, f"speed of {path}")
    sample(capsys, *words, "--steps=1")
    sample(capsys, *words, "--sampler=first_hitting")
    every = {"num": 2, "length": 8, "seed": 0}
    assert calls[1:] == [{"sampler": "confidence", "steps": 2, **every}, {"sampler": "confidence", "steps": 1, **every},
                         {"sampler": "first_hitting", **every}]
    path.write_text('{"seed": 7}')
    assert sample(capsys, f"--settings={path}")[1]["seed"] == calls[-1]["seed"] == 7
    assert sample(capsys, f"--settings={path}", "--seed=0")[1]["seed"] == calls[-1]["seed"] == 0
    path.write_text('{"speed": {"smapler": "confidence"}}')
    code, _, err = sample(capsys, *words)
    assert code == 2 and "unknown option 'smapler': did you mean 'sampler'?" in err


def test_forced_texts_and_approximate_caches(capsys, calls):
    """Whether they fit the model is for `generate` to say."""
    words = ("--fixed_tokens=5:ab", "--fixed_tokens=9: c:d", "--approximate_cache=dual", "--block_size=4")
    used = sample(capsys, *words)[1]["sampler"]
    assert calls[0]["forced"] == used["forced"] == {"5": "ab", "9": " c:d"}
    assert calls[0]["approximate_cache"] == used["approximate_cache"] == "dual"
    for word in ("--fixed_tokens=5", "--fixed_tokens=5:"):
        code, _, err = sample(capsys, word)
        assert code == 2 and "expected PLACE:TEXT" in err
    assert sample(capsys, "--fixed_tokens=5:a", "--fixed_tokens=5:b")[0] == 2


def test_a_schema_is_read_from_its_file(capsys, calls, tmp_path):
    path = tmp_path / "schema.json"
    path.write_text('{"type": "boolean"}')
    assert sample(capsys, f"--json_schema={path}")[0] == 0
    assert calls[0]["constraint"] == {"type": "boolean"}
    code, _, err = sample(capsys, f"--json_schema={path}", "--constraint=a")
    assert code == 2 and "give one of them" in err


def test_texts_that_are_watched_are_the_same(capsys, lm, tmp_path):
    words = ("--num_samples=3", "--length=16", "--seed=2")
    page, lines = tmp_path / "trace.html", tmp_path / "texts.jsonl"
    watched = sample(capsys, *words, "--animate", f"--trace={page}", f"--out={lines}")[1]
    assert watched["samples"] == sample(capsys, *words)[1]["samples"]
    assert "<html" in page.read_text() and watched["samples"][0]["text"] in lines.read_text()
    both = tmp_path / "both.html"
    sample(capsys, *words, f"--trace={both}", f"--compare_traces={page}")
    assert both.read_text().count("<iframe") == 2
    code, _, err = sample(capsys, f"--compare_traces={page}")
    assert code == 2 and "--compare_traces goes with --trace" in err
    found = sample_files.read(str(lines))
    assert found.texts == [one["text"] for one in watched["samples"]]
    assert found.nfe_per_token == pytest.approx(watched["nfe_per_token"])


@pytest.mark.parametrize("flag, message", [
    ("--out=/nowhere/x.jsonl", "cannot write --out=/nowhere/x.jsonl: /nowhere is no directory"),
    ("--trace=/nowhere/x.html", "cannot write --trace=/nowhere/x.html: /nowhere is no directory"),
    ("--settings=/nowhere/s.json", "cannot read /nowhere/s.json: No such file"),
    ("--prefer=fast", "--prefer=fast"), ("--steps=0", "--steps=0"), ("--block_size=8", "block_size is 8, expected 4")])
def test_bad_flags(capsys, lm, flag, message):
    code, _, err = sample(capsys, "--num_samples=1", "--length=8", flag)
    assert code == 2 and message in err and len(err.strip().splitlines()[-1]) < 300


def test_bench_sampling_of_a_run(capsys, monkeypatch):
    calls = []
    monkeypatch.setattr("bd3lm_jax.evaluation.tune_sampling.tune_sampling",
                        lambda *a, **k: calls.append((a, k)) or {"bench": "sampling"})
    assert main(["bench", "sampling", "--workdir=w", "--scorer=s", "--rounds=2", "--num_samples=5"]) == 0
    assert calls == [(("w",), {"scorer": "s", "rounds": 2, "texts": 5})]
    assert capsys.readouterr().out == '{"bench": "sampling"}\n'
    for words in (("step", "--scorer=s"), ("step", "--num_samples=3"), ("sampling", "--workdir=w", "--out=d")):
        assert main(["bench", *words]) == 2
    assert "bench sampling --workdir=DIR" in capsys.readouterr().err

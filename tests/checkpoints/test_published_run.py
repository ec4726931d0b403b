"""A published directory where a run directory could stand: eval, sample, infill, scorer, the Hub."""

import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from places import GOLDEN, HF
from scipy.special import log_softmax
from word_tokenizer import write_tokenizer

import bd3lm_jax
from bd3lm_jax.checkpoints import adapt, hf
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.evaluation.convert import TOKENIZER_FILES
from bd3lm_jax.evaluation.scorer import Scorer
from bd3lm_jax.experiments import density_study, variance
from launch.__main__ import main

LENGTH = 16


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("BD3LM_CACHE", str(tmp_path / "cache"))


def published(tmp_path, name, size, *special):
    directory = tmp_path / "model"
    shutil.copytree(GOLDEN / name, directory)
    write_tokenizer(directory, size, *special)
    return directory


def write_words(path, documents):
    random = np.random.default_rng(0)
    lines = [" ".join(f"w{i}" for i in random.integers(1, 50, size=random.integers(3, 30))) for _ in range(documents)]
    path.write_text("\n".join(lines) + "\n")
    return lines


def run(capsys, *argv):
    code = main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def result_of(capsys, *argv):
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


def test_likelihood_of_a_text(tmp_path, capsys):
    """By hand: documents one after the other in rows, each first token given, the others from the published logits."""
    directory = published(tmp_path, "hf/llama", 59)
    documents = write_words(tmp_path / "text.txt", 12)
    lm = bd3lm_jax.load(directory)
    ids = np.concatenate([np.append(lm.tokenizer.encode(line), 58) for line in documents])
    rows, nats, count = [ids[at:at + LENGTH] for at in range(0, len(ids), LENGTH)], 0.0, 0
    for row in rows:
        if len(row) > 1:
            scores = log_softmax(np.asarray(lm.logits(row[None, :-1]), np.float64)[0], -1)
            nats -= scores[np.arange(len(row) - 1), row[1:]].sum()
            count += len(row) - 1
    found = result_of(capsys, "eval", f"--workdir={directory}", f"--data={tmp_path / 'text.txt'}", f"--length={LENGTH}")
    assert (found["tokens"], found["length"], found["estimator"], found["step"]) == (count, LENGTH, "nll", 0)
    assert found["nll"] == pytest.approx(nats / count, rel=1e-5)


def test_a_mask_token_is_never_invented(tmp_path, capsys):
    """LLaDA without mask_token_id: rows 57 and 58 lie behind the 57 tokens of its tokenizer and are nobody's mask."""
    directory = published(tmp_path, "hf/llada", 57)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"mask_token_id": None}))
    write_words(tmp_path / "text.txt", 4)
    lm = bd3lm_jax.load(directory)
    assert lm.data is None and (lm.special.mask, lm.special.end) == (-1, 56) and lm.logits([[1, 2]]).shape == (1, 2, 59)
    with pytest.raises(UserError, match="this model fills in masked tokens, and neither its config.json"):
        lm.nll([[1, 2]])
    for argv in (["eval", f"--workdir={directory}", f"--data={tmp_path / 'text.txt'}"],
                 ["convert", f"--from={directory}", f"--to={tmp_path / 'run'}", "--format=native"]):
        code, _, err = run(capsys, *argv)
        assert code != 0 and "says which token is the mask: name it in config.json" in err
    assert not (tmp_path / "run").exists()
    shutil.rmtree(directory)
    assert bd3lm_jax.load(published(tmp_path, "hf/roberta", 59, "<mask>")).special.mask == 57


@pytest.mark.ci_slow
def test_bound_of_a_block_model(tmp_path, capsys):
    """Against `LM.nll`, whose bound other tests enumerate, at the same block size."""
    directory = published(tmp_path, "bd3lm_block4", 66)
    write_words(tmp_path / "text.txt", 40)
    lm = bd3lm_jax.load(directory)
    ids = np.concatenate([np.append(lm.tokenizer.encode(line), 65)
                          for line in (tmp_path / "text.txt").read_text().splitlines()])
    rows = ids[:len(ids) // 32 * 32].reshape(-1, 32)
    found = result_of(capsys, "eval", f"--workdir={directory}", f"--data={tmp_path / 'text.txt'}",
                      "--estimator=exact_count", "--mc_samples=4")
    expected = lm.nll(rows, draws=16)
    assert found["length"] == 32
    assert found["nll"] == pytest.approx(expected.mean, abs=4 * found["nll_mc_se"] + 0.02)


@pytest.mark.ci_slow
def test_texts_and_holes(tmp_path, capsys):
    directory = published(tmp_path, "bd3lm_block4", 66)
    found = result_of(capsys, "sample", f"--workdir={directory}", "--num_samples=2", "--length=12", "--prompt=w3 w4")
    assert [sample["num_tokens"] <= 10 and isinstance(sample["text"], str) for sample in found["samples"]] == [True] * 2
    filled = result_of(capsys, "infill", f"--workdir={directory}", "--text=w3 w4 [MASK:2] w5")
    assert filled["texts"][0]["holes"][0]["num_tokens"] == 2


@pytest.mark.ci_slow
def test_greedy_text_of_a_causal_model(tmp_path, capsys):
    """Token by token from the published logits; every id may be written, for the network has no mask token."""
    directory = published(tmp_path, "hf/llama", 59)
    lm = bd3lm_jax.load(directory)
    ids = [3, 4]
    while len(ids) < 12 and ids[-1] != 58:
        ids.append(int(np.asarray(lm.logits([ids]))[0, -1].argmax()))
    found = result_of(capsys, "sample", f"--workdir={directory}", "--num_samples=1", "--length=12", "--prompt=w3 w4",
                      "--temperature=0")
    assert found["samples"][0]["text"] == lm.tokenizer.decode([i for i in ids[2:] if i != 58])
    assert lm.special.mask == -1


def test_last_id_of_a_causal_model_is_no_mask(tmp_path):
    lm = bd3lm_jax.load(HF / "llama")
    assert np.isfinite(lm.nll([[3, 58, 4]]).mean)


@pytest.mark.ci_slow
def test_scorer_slides_over_texts(tmp_path):
    """Every token by the window that the rule gives it, from the published logits."""
    lm = bd3lm_jax.load(published(tmp_path, "hf/llama", 59))
    scorer = Scorer(lm, "model", 32)
    assert (scorer.window, scorer.first, scorer.separator) == (96, 1, (58,))
    text = write_words(tmp_path / "text.txt", 1)[0]
    assert scorer.encode(text).tolist() == [int(word[1:]) for word in text.split()]
    ids = np.random.default_rng(1).integers(0, 59, size=150)
    nats = scorer.nats([ids])[0]
    for i in (1, 95, 96, 127, 128, 149):
        start = max(0, -(-(i + 1 - 96) // 32)) * 32
        scores = log_softmax(np.asarray(lm.logits(ids[None, start:i]), np.float64)[0, -1])
        assert nats[i] == pytest.approx(-scores[ids[i]], abs=1e-4), i
    assert nats[0] == 0


@pytest.mark.ci_slow
def test_generative_perplexity(tmp_path, capsys):
    directory = published(tmp_path, "hf/llama", 59)
    texts = write_words(tmp_path / "text.txt", 4)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = result_of(capsys, "eval", f"--samples={tmp_path / 'texts.jsonl'}", f"--scorer={directory}",
                      "--reference=none")
    lm, nats, count = bd3lm_jax.load(directory), 0.0, 0
    for text in texts:
        per_token = lm.nll(lm.tokenizer.encode(text)[None]).per_token[0, 1:]
        nats, count = nats + per_token.sum(), count + len(per_token)
    assert found["rows"][0]["gen_ppl"] == pytest.approx(np.exp(nats / count), rel=1e-4)


@pytest.mark.parametrize("argv, message", [
    ((), "brings no corpus: give --data=austen or another text"),
    (("--data=TEXT", "--length=97"), "--length=97 is more than the 96 tokens that"),
    (("--data=TEXT", "--step=best"), "is a published checkpoint, which has no steps"),
])
def test_bad_evaluations(tmp_path, capsys, argv, message):
    directory = published(tmp_path, "hf/llama", 59)
    write_words(tmp_path / "text.txt", 3)
    argv = [word.replace("TEXT", str(tmp_path / "text.txt")) for word in argv]
    code, out, err = run(capsys, "eval", f"--workdir={directory}", *argv)
    assert (code, out) == (2, "") and message in err


def test_tokenizers_that_do_not_fit(tmp_path, capsys):
    with pytest.raises(UserError, match="has 59 ids, fewer than the 60 of its tokenizer"):
        bd3lm_jax.load(published(tmp_path, "hf/llama", 60))
    (tmp_path / "text.txt").write_text("w1\n")
    code, _, err = run(capsys, "eval", f"--workdir={GOLDEN / 'hf/llama'}", f"--data={tmp_path / 'text.txt'}")
    assert code == 2 and "brings no tokenizer, which texts need" in err


def test_the_named_mask_wins(tmp_path):
    """Dream names its mask in config.json; BERT's is its tokenizer's [MASK]."""
    assert bd3lm_jax.load(published(tmp_path / "a", "hf/dream", 58)).special.mask == 58
    assert bd3lm_jax.load(published(tmp_path / "b", "bd3lm_block4", 66, "[MASK]")).special.mask == 66
    assert bd3lm_jax.load(published(tmp_path / "c", "hf/llama", 59, "[MASK]")).special.mask == 57


@pytest.mark.parametrize("measure", [
    lambda path: variance.study(path, split="valid", batch=2, draws=2, seed=0),
    lambda path: density_study.study([path], split="valid", batch=2, draws=2, seed=0)])
def test_what_needs_a_corpus_says_so(tmp_path, measure):
    with pytest.raises(UserError, match="model is a published checkpoint, which brings no corpus: give a run"):
        measure(str(published(tmp_path, "bd3lm_block4", 66)))


# The Hub


def hub(monkeypatch, download):
    monkeypatch.setitem(sys.modules, "huggingface_hub", download and types.SimpleNamespace(snapshot_download=download))


def test_names_on_the_hub(monkeypatch):
    asked = []
    hub(monkeypatch, lambda name, allow_patterns, etag_timeout: asked.append((name, allow_patterns)) or str(
        HF / "llama"))
    assert bd3lm_jax.load("some-org/some.model").context == 96
    assert asked == [("some-org/some.model", list(hf.HUB_FILES))] and not any("bin" in one for one in hf.HUB_FILES)
    assert all(any(map(Path(name).match, hf.HUB_FILES)) for name in TOKENIZER_FILES)  # what `convert` hands on


@pytest.mark.ci_slow
def test_names_on_the_hub_are_evaluated(tmp_path, capsys, monkeypatch):
    """As their directories are; the name is what people see."""
    directory, asked = published(tmp_path, "hf/llama", 59), []
    write_words(tmp_path / "text.txt", 12)
    hub(monkeypatch, lambda name, **_: asked.append(name) or str(directory))
    monkeypatch.chdir(tmp_path)
    flags = f"--data={tmp_path / 'text.txt'}", f"--length={LENGTH}"
    code, out, err = run(capsys, "eval", "--workdir=org/one", "--baseline=org/two", *flags)
    found, expected = json.loads(out), result_of(capsys, "eval", f"--workdir={directory}", *flags)
    assert code == 0 and set(asked) == {"org/one", "org/two"} and "org/one less org/two" in err
    assert found["nll"] == expected["nll"] and found["against"]["workdir"] == "org/two"
    assert found["against"]["difference"] == 0
    source = adapt.read_source("org/three")
    assert (source.path, source.published, source.length) == (str(directory), True, 96) and "org/three" in asked


@pytest.mark.parametrize("path", ["a/b/c", "runs/nowhere", str(GOLDEN / "nowhere")])
def test_other_paths_are_never_asked_for(monkeypatch, tmp_path, path):
    monkeypatch.chdir(tmp_path)
    hub(monkeypatch, lambda *args, **kwargs: pytest.fail("asked the Hub"))
    with pytest.raises(UserError, match="no run directory"):
        bd3lm_jax.load(path)


def test_without_the_hub(monkeypatch):
    hub(monkeypatch, None)
    with pytest.raises(UserError, match="no run directory org/name; to take it from the Hugging Face Hub: pip install"):
        bd3lm_jax.load("org/name")


def test_without_the_network(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("Network is unreachable\nmany lines")
    hub(monkeypatch, fail)
    with pytest.raises(UserError, match=r"no run directory org/name, .*\(OSError: Network is unreachable\): check"):
        bd3lm_jax.load("org/name")

"""The autopilot: which settings it tries, what it measures of them, and which it recommends."""

import itertools
import json
import math

import numpy as np
import pytest
from grids import some
from toy_lm import CONTEXT, LETTERS, make_lm, masked
from toy_runs import toy_config, write_text

import bd3lm_jax
from bd3lm_jax.config import Config
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import AR
from bd3lm_jax.diffusion.mixed import Mixed
from bd3lm_jax.evaluation import settings, tune_sampling
from bd3lm_jax.evaluation.scorer import Scorer
from bd3lm_jax.generation.options import check_options, make_options
from bd3lm_jax.lm import CheckpointId
from bd3lm_jax.training.train import train
from launch.__main__ import main

MIXED = Mixed(block_size=4, sizes=(1, 4), schedule="loglinear", corruption="exact_count", complement=False, eps=1e-3)
SWEEP = [tune_sampling.EXACT, {"sampler": "threshold", "threshold": 0.5}, {"sampler": "threshold", "threshold": 0.05},
         {"sampler": "confidence", "steps": 2}]


def fresh(objective, trained=None):
    """A model that has compiled nothing yet."""
    lm = make_lm(objective, tokenizer=LETTERS)
    return bd3lm_jax.LM(lm.config, lm.params, lm.tokenizer, lm.model, lm.context, trained)


def row(name, ppl, tokens_per_call, entropy=4.0, mean_length=100.0):
    return {"name": name, "settings": {"sampler": name}, "gen_ppl": ppl, "tokens_per_call": tokens_per_call,
            "entropy": entropy, "mean_length": mean_length, "rejected": ""}


@pytest.mark.parametrize("objective", [masked(4), masked(1), masked(CONTEXT), AR(bos=True), MIXED])
def test_the_model_takes_every_candidate(objective, monkeypatch):
    monkeypatch.setattr(tune_sampling, "SHORT_BLOCK", 8)
    lm = make_lm(objective, tokenizer=LETTERS)
    found = tune_sampling.candidates(lm)
    for setting in found:
        at, rest = lm.resolve_options(setting)
        check_options(at, make_options(**rest))
    names = [tune_sampling.name_of(setting) for setting in found]
    assert names[0] == "first_hitting" and len(set(names)) == len(names)
    several = objective.block_size > 1
    assert 11 <= len(found) <= 20 if several else found == [tune_sampling.EXACT]
    assert ("first_hitting, block_size auto, block_confidence 0.3" in names) == (objective == MIXED)
    assert ("threshold 0.3, block_size 8" in names or "threshold 0.5, block_size 8" in names) == (
        objective.block_size == CONTEXT)


@pytest.mark.ci_slow
def test_measured_settings():
    lm = fresh(masked(4))
    found = tune_sampling.measure(lm, SWEEP, None, rounds=2, texts=3, length=CONTEXT)
    exact, high, low, two = found
    assert exact["tokens_per_call"] == 1 and two["tokens_per_call"] == 2  # steps 2 of a block of 4
    assert 1 <= high["tokens_per_call"] <= low["tokens_per_call"] <= 4
    assert exact["speedup"] == 1 and all(line["tokens_per_s"] > 0 for line in found)
    assert lm._programs["run"]._cache_size() == 3  # thresholds share theirs
    texts = [sample.tokens for seed in (0, 1) for sample in lm.generate(num=3, length=CONTEXT, min_length=CONTEXT,
                                                                        seed=seed)]
    shares = [np.unique(ids, return_counts=True)[1] / CONTEXT for ids in texts]
    assert exact["entropy"] == pytest.approx(np.mean([-(p * np.log(p)).sum() for p in shares]))
    assert exact["self_nll"] == pytest.approx(lm.nll(np.array(texts)).mean)
    ended = [len(sample.tokens) for seed in (0, 1) for sample in lm.generate(num=3, length=CONTEXT, seed=seed)]
    assert exact["mean_length"] == np.mean(ended) < CONTEXT


@pytest.mark.ci_slow
def test_a_scorer_judges():
    lm, judge = make_lm(masked(4), tokenizer=LETTERS), make_lm(AR(bos=True), tokenizer=LETTERS)
    samples = lm.generate(num=4, length=CONTEXT, min_length=CONTEXT)
    found = tune_sampling.text_metrics(lm, samples, Scorer(judge, "toy", 0))
    assert found["gen_ppl"] == pytest.approx(math.exp(judge.nll(np.array([s.tokens for s in samples])).mean))
    assert "self_nll" not in found and found["gen_ppl_ci95"][0] < found["gen_ppl"] < found["gen_ppl_ci95"][1]


def test_pareto_is_what_nothing_beats(monkeypatch):
    draw = np.random.default_rng(0)
    lines = [row(str(i), ppl, speed) for i, (ppl, speed) in enumerate(draw.integers(1, 6, size=(30, 2)).tolist())]
    beaten = {b["name"] for a, b in itertools.permutations(lines, 2)
              if a["gen_ppl"] <= b["gen_ppl"] and a["tokens_per_call"] >= b["tokens_per_call"]
              and (a["gen_ppl"], a["tokens_per_call"]) != (b["gen_ppl"], b["tokens_per_call"])}
    assert 0 < len(beaten) < 30
    assert {b["name"] for b in lines if any(tune_sampling._dominates(a, b) for a in lines)} == beaten


def test_recommendations():
    exact = row("exact", 100, 1.0)
    lines = [exact, row("best", 80, 1.0), row("good", 109, 2.0), row("slower", 105, 1.5), row("fast", 149, 4.0),
             row("bad", 151, 8.0), row("greedy", 10, 9.0, entropy=3.5), row("silent", 10, 9.0, mean_length=40)]
    for line in lines:
        line["rejected"] = tune_sampling._rejection_reason(line, exact)
    assert {line["name"]: line["rejected"] for line in lines if line["rejected"]} == {
        "greedy": "low entropy", "silent": "ends early"}
    assert tune_sampling.recommend(lines) == {"quality": {"sampler": "best"}, "balanced": {"sampler": "good"},
                                              "speed": {"sampler": "fast"}}


@pytest.mark.parametrize("scored", some([True, False], 1))
def test_the_file_is_what_sample_reads(tmp_path, monkeypatch, scored):
    lm, judge = fresh(masked(4), CheckpointId(9, "abc")), make_lm(AR(bos=True), tokenizer=LETTERS)
    monkeypatch.setattr(tune_sampling, "load", lambda path: judge if path == "judge" else lm)
    monkeypatch.setattr(tune_sampling, "prepare", lambda *arguments: None)
    monkeypatch.setattr(tune_sampling.cache_cost, "nll_cost", lambda *arguments, seed: [])
    monkeypatch.setattr(tune_sampling, "candidates", lambda lm: SWEEP[:1])
    lm.config = Config(lm.config.model, lm.config.diffusion, data=toy_config(tmp_path).data)
    result = tune_sampling.tune_sampling(str(tmp_path), scorer="judge" * scored, rounds=1, texts=2)
    written = json.loads((tmp_path / "sampling.json").read_text())
    assert written.pop("crc32") and written.keys() == result.keys() and len(written["measured"]) == 1
    assert (written["step"], written["config_sha256"]) == (9, "abc")
    assert written["scorer"] == ("judge" if scored else None)
    assert ("gen_ppl" in written["measured"][0]) == scored != ("self_nll" in written["measured"][0])
    assert (tmp_path / "plots" / "sampling.png").stat().st_size > 1000
    for name in settings.PREFERENCES:
        assert settings.settings_for(lm, str(tmp_path), "", name)[0] == written[name] in SWEEP


def test_what_cannot_be_measured(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="texts is 0, expected at least 1"):
        tune_sampling.tune_sampling(str(tmp_path), scorer="", rounds=1, texts=0)
    monkeypatch.setattr(tune_sampling, "load", lambda path: make_lm())
    with pytest.raises(UserError, match="has no tokenizer"):
        tune_sampling.tune_sampling(str(tmp_path), scorer="", rounds=1, texts=1)


@pytest.mark.ci_slow
def test_a_bidirectional_model_from_training_to_its_settings(tmp_path, capsys):
    """All settings of a model of block size = length, short windows among them; `sample` then takes what was found."""
    write_text(tmp_path / "text.txt", 200)
    run, length = tmp_path / "run", 2 * tune_sampling.SHORT_BLOCK
    train(toy_config(tmp_path, {"data.seq_len": length, "eval.sample_length": length, "train.steps": 2,
                                "diffusion.block_size": length}), str(run))
    assert main(["bench", "sampling", f"--workdir={run}", "--rounds=1", "--num_samples=2"]) == 0
    written = json.loads((run / "sampling.json").read_text())
    windows = [line for line in written["measured"] if line["settings"].get("block_size") == tune_sampling.SHORT_BLOCK]
    assert {line["settings"]["sampler"] for line in windows} == {"first_hitting", "threshold", "confidence"}
    two, = (line for line in windows if line["settings"]["sampler"] == "confidence")
    assert two["tokens_per_call"] == 2 and (written["step"], written["length"]) == (2, length)
    assert written["cache"] == [], "there is no exact cache to make smaller"
    for name in settings.PREFERENCES:
        capsys.readouterr()
        assert main(["sample", f"--workdir={run}", "--num_samples=1", f"--length={length}", f"--prefer={name}"]) == 0
        used = json.loads(capsys.readouterr().out)["sampler"]
        expected = {"name": written[name]["sampler"], **{key: value for key, value in written[name].items()
                                                         if key != "sampler"}}
        assert {key: used[key] for key in expected} == expected

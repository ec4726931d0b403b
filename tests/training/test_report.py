import types

import numpy as np
import pytest
from toy_runs import WORDS, network, toy_config, write_text

from bd3lm_jax.core.log import RunLog
from bd3lm_jax.data.prepare import prepare, prepare_tokenizer
from bd3lm_jax.data.token_bytes import RowsWithBytes
from bd3lm_jax.training import report

ESTIMATE = {"nll": 1.5, "nll_ci95": [1.4, 1.6], "ppl": float(np.exp(1.5)), "bits_per_byte": 2.25,
            "bits_per_byte_ci95": [2.1, 2.4], "documents": 20,
            "tokens": 700, "estimator": "exact_count", "nll_by_count": {1: 1.2, 2: 1.4, 3: 1.6, 4: 1.8},
            "wall_s": 12.5}
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What `train` hands to the report, with random weights."""
    directory = tmp_path_factory.mktemp("report")
    write_text(directory / "text.txt", 200)
    config = toy_config(directory, {"eval.num_samples": 2, "eval.sample_length": 16})
    tokenizer = prepare_tokenizer(config.data)
    rows = {split: prepare(config.data, split, 4, tokenizer) for split in ("train", "valid")}
    model, params = network(config)
    config = toy_config(directory, {"eval.num_samples": 2, "eval.sample_length": 16, "model.vocab_size": 258})
    run = types.SimpleNamespace(config=config, workdir=directory / "run", tokenizer=tokenizer, rows=rows,
                                valid_rows=RowsWithBytes(rows["valid"], tokenizer),
                                program=types.SimpleNamespace(model=model))
    with RunLog(run.workdir, 2) as log:
        for step in (1, 2):
            log.metrics(step, {"train/loss": 5.0 - step, "train/nll": 5.0 - step, "valid/nll": 5.1 - step})
    return run, params


def test_closing_leaves_plots_and_samples_and_a_table(run, capsys):
    run, params = run
    report.write_report(run, params, ESTIMATE, evaluator=None)
    for name in ("loss.png", "nll_by_count.png"):
        assert (run.workdir / "plots" / name).read_bytes().startswith(PNG)
    samples = (run.workdir / "samples" / "step_6.txt").read_text(encoding="utf-8")
    assert samples.count("\n--\n") >= 1
    told = report.read(run.workdir)
    assert told.pop("step") == 6 and set(told) == {"valid", "settings"}
    counts = {str(k): nll for k, nll in ESTIMATE["nll_by_count"].items()}
    assert told["valid"] == {key: value for key, value in ESTIMATE.items() if key != "wall_s"} | {
        "nll_by_count": counts, "bits_per_byte_comparable": True, "changed_documents": 0}
    shown = capsys.readouterr().err
    assert "valid: bound on the NLL, 20 documents, 700 tokens" in shown and "2 samples:" in shown
    for name in ("plots/loss.png", "plots/nll_by_count.png", "samples/step_6.txt"):
        assert f": {run.workdir / name}\n" in shown, "people are told where it is"
    for text in ("this model", "2.250", "2.100 .. 2.400", "1.5000", "unigram of its tokens", "byte 5-gram"):
        assert text in shown, text


def test_count_models_order_as_they_should(run):
    """Bytes are the tokens here, so all five are byte models; contexts tell the letters of the random words apart."""
    run, _ = run
    found = report._count_models(run, "valid", run.rows["valid"])
    assert list(found) == ["unigram of its tokens", "bigram of its tokens", "byte 3-gram", "byte 4-gram", "byte 5-gram"]
    bits = list(found.values())
    assert bits[:4] == sorted(bits[:4], reverse=True)  # contexts of four bytes are rare in so little text
    counts = np.bincount(run.rows["valid"].stream())
    share = counts[counts > 0] / counts.sum()
    entropy = -np.sum(share * np.log2(share))  # no unigram model of another text does better
    assert entropy < bits[0] < entropy + 0.15
    word_entropy = np.log2(len(WORDS)) / np.mean([len(word.encode()) + 1 for word in WORDS])
    assert bits[-1] > word_entropy  # the words are independent: nothing can do better


def test_large_corpora_are_not_counted(run, capsys, monkeypatch):
    run, _ = run
    monkeypatch.setattr(report, "COUNTED_TOKENS", 1000)
    monkeypatch.setattr(type(run.rows["train"]), "stream", None)  # not even read
    report._likelihood_table(run, "valid", run.rows["valid"], ESTIMATE)
    shown = capsys.readouterr().err
    assert "no count models: the training split has more than" in shown and "this model" in shown


def test_a_report_of_some_rows_has_no_count_models_of_all_rows(run, capsys):
    few = toy_config(run[0].workdir, {"eval.report_rows": 3})
    other = types.SimpleNamespace(**vars(run[0]) | {"config": few})
    report._likelihood_table(other, "valid", other.rows["valid"], ESTIMATE)
    shown = capsys.readouterr().err
    assert "no count models: the model is measured on the first rows alone, eval.report_rows=3" in shown


def test_the_embedded_corpus_is_tested_too(run, capsys, monkeypatch):
    run, params = run
    calls = []

    def evaluate(weights, rows, **settings):
        calls.append(settings)
        return {**ESTIMATE, "documents": 33}

    austen = toy_config(run.workdir, {"data.source": "austen", "data.path": "", "data.valid_fraction": 0.01})
    monkeypatch.setattr(report, "_test_rows", lambda run: run.rows["valid"])
    monkeypatch.setattr(report, "_count_models", lambda run, split, rows: {f"counts of {split}": 3.0})
    other = types.SimpleNamespace(**vars(run) | {"config": austen})
    report.write_report(other, params, ESTIMATE, types.SimpleNamespace(
        run=evaluate, autoregressive_summary=lambda *arguments: {}))
    assert calls == [{"estimator": "exact_count", "draws": austen.eval.mc_samples, "seed": austen.seed, "num_rows": 0}]
    shown = capsys.readouterr().err
    assert "test: bound on the NLL, 33 documents" in shown and "counts of test" in shown and "counts of valid" in shown
    assert "samples:" not in shown
    told = report.read(run.workdir)
    assert (told["valid"]["documents"], told["test"]["documents"]) == (20, 33)


def test_a_run_that_has_not_ended_has_no_report(tmp_path):
    assert report.read(tmp_path) is None

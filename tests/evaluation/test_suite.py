import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from places import HF
from toy_evaluation import evaluated, options_of
from toy_runs import AR, toy_config, write_text
from word_tokenizer import write_tokenizer

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data import corpora, domains
from bd3lm_jax.data.domains import Domain
from bd3lm_jax.evaluation import suite
from bd3lm_jax.evaluation.suite import evaluate_suite
from bd3lm_jax.likelihood.evaluate import open_run
from bd3lm_jax.likelihood.options import EstimatorOptions
from bd3lm_jax.training.train import train

LLAMA = HF / "llama"
FEW = {"near": Domain("Near text", file="a file", word_ppl=True), "far": Domain("Far text"), "gone": Domain("Gone")}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with two runs after a few steps, blocks and ar, and the files of two domains."""
    directory = tmp_path_factory.mktemp("suite")
    write_text(directory / "text.txt", 60)
    write_text(directory / "near.txt", 12, seed=1)
    (directory / "far.txt").write_text("".join(f"{i * 7919 % 1000} / {i}!\n" for i in range(15)))
    train(toy_config(directory), directory / "blocks")
    train(toy_config(directory, {"diffusion": AR, "model.adaln": False, "train.steps": 20}), directory / "ar")
    return directory


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(corpora, "tfds_is_prepared", lambda name: False)
    for module in (domains, suite):
        monkeypatch.setattr(module, "DOMAINS", FEW)


@pytest.fixture(scope="module")
def both(home):
    """The suite on both runs, with what the table said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "tfds_is_prepared", lambda name: False)
        for module in (domains, suite):
            patch.setattr(module, "DOMAINS", FEW)
        lines = []
        patch.setattr(suite.log, "table", lambda title, columns, rows: lines.extend([title, columns, *rows]))
        result = evaluate_suite([str(home / "ar"), str(home / "blocks")], **options_of(data_dir=str(home)))
    return result, lines


@pytest.mark.ci_slow
def test_every_run_on_every_text(home, both):
    result, _ = both
    assert [(entry["data"], entry["workdir"]) for entry in result["domains"]] == [
        (data, str(home / run)) for run in ("ar", "blocks") for data in ("near", "far")]
    assert list(result["skipped"]) == ["gone"] and "gone.txt" in result["skipped"]["gone"]
    assert result["plot"] == str(home / "ar" / "plots" / "domains.png") and (home / "ar/plots/domains.png").exists()
    json.dumps(result)


def test_an_entry_is_the_evaluation_of_its_text(home, both):
    """Words, bytes and tokens counted from the file."""
    near = both[0]["domains"][2]
    lines = (home / "near.txt").read_text().splitlines()
    size = sum(len(line.encode()) + 1 for line in lines)
    assert near["tokens"] == size and near["documents"] == len(lines) == 12
    assert near["bits_per_byte"] == pytest.approx(near["nll"] / math.log(2))  # a token is a byte
    words = sum(len(line.split()) + 1 for line in lines)
    assert near["word_ppl"] == pytest.approx(math.exp(near["nll"] * size / words))
    assert near["split"] == "all" and near["first_token"] == "predict" and near["estimator"] == "exact_count"
    assert "word_ppl" not in both[0]["domains"][3]


def test_differences_are_paired_by_document(home, both):
    """The ar run is exact: its documents from a measurement of its own, the bound from the mean of its estimates."""
    nats = []
    for name in ("blocks", "ar"):
        run = open_run(str(home / name))
        text = domains.open_text(run.data, run.config.block_size, run.tokenizer, data="far", split="test",
                                 data_dir=str(home),
                                 convention=domains.ScoringConvention("independent", 0, "predict", "count"))
        nats.append(run.evaluator.measure(run.params, text.rows, EstimatorOptions()).documents_UxN.mean(0))
    size = np.array([len(line) + 1 for line in (home / "far.txt").read_text().splitlines()])
    expected = (nats[0] - nats[1]).sum() / size.sum() / math.log(2)
    against = both[0]["domains"][3]["against"]
    low, high = against["difference_ci95"]
    assert against["difference"] == pytest.approx(expected)
    assert low < expected < high and against["workdir"] == str(home / "ar")
    residual = (nats[0] - nats[1]) / math.log(2) - expected * size
    se = math.sqrt(15 / 14 * (residual**2).sum()) / size.sum()
    assert (high - low) / 2 / 2.145 == pytest.approx(se, rel=0.5)  # t with 14 degrees of freedom; draws add a little
    assert "against" not in both[0]["domains"][1]


def test_the_table_says_who_is_better(both):
    title, columns, *lines = both[1]
    assert "independent rows of 32 tokens, first tokens predicted, ends of documents counted" in title
    assert [line[:2] for line in lines] == [["Near text", "ar"], ["Near text", "blocks"], ["Far text", "ar"],
                                            ["Far text", "blocks"]]
    assert len(columns) == len(lines[0]) and lines[0][-1] == ""
    assert lines[1][-1].endswith(suite.WORSE)  # 6 steps against 20
    verdicts = [suite._verdict({"comparable": True, "difference": 0.0, "difference_ci95": ci})
                for ci in ((-2, -1), (-1, 1), (1, 2))]
    assert [verdict.split(") ")[1] for verdict in verdicts] == [suite.BETTER, suite.UNCLEAR, suite.WORSE]


def test_one_run_is_measured_on_its_own_corpus_too(home):
    result = evaluate_suite([str(home / "blocks")], **options_of())
    assert [entry["data"] for entry in result["domains"]] == ["text"]
    assert sorted(result["skipped"]) == sorted(FEW)
    assert [entry["split"] for entry in result["domains"]] == ["valid"]
    again = evaluate_suite([str(home / "blocks")], **options_of())
    assert [{**entry, "wall_s": 0} for entry in again["domains"]] == [{**e, "wall_s": 0} for e in result["domains"]]


def words_of(path, documents):
    """Texts that the published network, which knows 59 words, and a run of bytes both can read."""
    random = np.random.default_rng(0)
    lines = [" ".join(f"w{i}" for i in random.integers(1, 50, size=12)) for _ in range(documents)]
    path.write_text("\n".join(lines) + "\n")


def test_published_models_take_part(home, tmp_path, monkeypatch):
    """Each entry is what `eval` says of that text alone; the plot is a run's, or here."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(LLAMA, tmp_path / "model")
    write_tokenizer(tmp_path / "model", 59)
    for name in ("near", "far"):
        words_of(tmp_path / f"{name}.txt", 9)
    options = options_of(data_dir=str(tmp_path), length=32)
    result = evaluate_suite(["model", str(home / "ar")], **options)
    assert [(entry["data"], Path(entry["workdir"]).name) for entry in result["domains"]] == [
        (data, run) for run in ("model", "ar") for data in ("near", "far")]
    assert result["plot"] == str(home / "ar" / "plots" / "domains.png")
    assert {(entry["length"], entry["first_token"]) for entry in result["domains"]} == {(32, "skip")}
    alone = evaluated("model", data="near", length=32, data_dir=str(tmp_path))
    assert result["domains"][0]["nll"] == alone["nll"] and alone["tokens"] == result["domains"][0]["tokens"] > 100
    assert result["domains"][2]["against"]["workdir"] == "model"
    only = evaluate_suite(["model"], **options)
    assert only["plot"] == "domains.png" and (tmp_path / "domains.png").exists() and list(only["skipped"]) == ["gone"]


def test_a_length_is_for_published_models(home):
    with pytest.raises(UserError, match="--length=16 is for published checkpoints: runs have the length"):
        evaluate_suite([str(home / "ar")], **options_of(length=16))


def test_a_run_without_the_split_is_measured_on_the_rest(home):
    result = evaluate_suite([str(home / "blocks")], **options_of("test", data_dir=str(home)))
    assert [entry["data"] for entry in result["domains"]] == ["near", "far"]
    assert "has no test split" in result["skipped"]["text"]


def test_bad_input_is_found_before_anything_is_measured(home, monkeypatch):
    monkeypatch.setattr(suite, "open_run", None)
    with pytest.raises(UserError, match="names a run twice"):
        evaluate_suite([str(home / "ar")] * 2, **options_of())
    with pytest.raises(UserError, match="no run directory"):
        evaluate_suite([str(home / "nothing")], **options_of())
    with pytest.raises(UserError, match="stride of 6 .* blocks of 4"):
        evaluate_suite([str(home / "ar"), str(home / "blocks")], **options_of(
            data_dir=str(home), context_mode="sliding", stride=6))
    with pytest.raises(UserError, match="none of the texts is here"):
        evaluate_suite([str(home / "ar"), str(home / "blocks")], **options_of())

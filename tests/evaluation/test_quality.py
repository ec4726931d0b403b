import json
import math
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
from toy_lm import CONTEXT, END, LETTERS, make_ids, make_lm

import bd3lm_jax
from bd3lm_jax.config import Config, DataConfig
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data import textmetrics
from bd3lm_jax.diffusion import AR
from bd3lm_jax.evaluation import quality
from bd3lm_jax.evaluation.quality import QualityOptions, evaluate_samples, figures, perplexity
from bd3lm_jax.evaluation.scorer import Words

OPTIONS = QualityOptions(scorer="toy", reference="none")


@pytest.fixture
def lm(monkeypatch):
    """The scorer that every directory holds."""
    found = make_lm(AR(bos=True), tokenizer=LETTERS)
    monkeypatch.setattr(quality, "load", lambda path, weights: found)
    return found


@pytest.fixture
def tables(monkeypatch):
    lines = []
    monkeypatch.setattr(quality.log, "table", lambda title, columns, rows: lines.append((title, columns, rows)))
    return lines


def write(path, texts, nfe=None, block_size=None):
    counts = {} if nfe is None else {"num_tokens": 1, "nfe": nfe, "stop": "end"}
    path.write_text(json.dumps({"samples": [{"text": text, **counts} for text in texts],
                                "sampler": {"block_size": block_size}}))
    return str(path)


def letters(*shape, seed=1):
    return [LETTERS.decode(row) for row in make_ids(*shape, seed=seed)]


# ---- figures


def test_perplexity_is_that_of_all_tokens_and_of_the_mean_text():
    """A short text that surprises, 1 token of 4 nats, and texts of 9 of 1 and of 4/3 nats each."""
    found = perplexity(np.array([4.0, 9, 9, 9, 12, 12]), np.array([1, 9, 9, 9, 9, 9]))
    assert found["gen_ppl"] == pytest.approx(math.exp(55 / 46))
    assert found["gen_ppl_sample_mean"] == pytest.approx((math.exp(4) + 3 * math.exp(1) + 2 * math.exp(4 / 3)) / 6)
    assert found["gen_ppl"] < found["gen_ppl_sample_mean"]
    low, high = found["gen_ppl_ci95"]
    assert low < found["gen_ppl"] < high and found["gen_ppl_sample_mean_ci95"][0] == 1.0


def test_equal_texts_have_one_perplexity():
    found = perplexity(np.full(5, 8.0), np.full(5, 4))
    assert found["gen_ppl"] == pytest.approx(math.exp(2)) == pytest.approx(found["gen_ppl_sample_mean"])
    assert found["gen_ppl_ci95"] == pytest.approx([math.exp(2)] * 2)


def test_intervals_cover_the_truth():
    """Texts of 5 to 50 tokens, each with a rate of its own; truths from the law that draws them."""
    rng, hits, runs = np.random.default_rng(0), np.zeros(2), 400
    for _ in range(runs):
        sizes = rng.integers(5, 51, size=40)
        nats = rng.gamma(3 * sizes, 1 / 3)  # mean 1 a token
        found = perplexity(nats, sizes)
        # exp of a gamma mean: (1 - 1/(3n))^-3n, averaged over n
        truths = math.e, np.mean([(1 - 1 / (3 * n)) ** (-3 * n) for n in range(5, 51)])
        for i, key in enumerate(("gen_ppl", "gen_ppl_sample_mean")):
            low, high = found[f"{key}_ci95"]
            hits[i] += low <= truths[i] <= high
    assert (0.91 < hits / runs).all() and (hits / runs < 0.985).all()


def test_one_text_has_no_interval():
    found = figures([np.arange(3)], [np.ones(3)], 0, 8)
    assert found["gen_ppl"] == pytest.approx(math.e)
    assert np.isnan([*found["gen_ppl_ci95"], *found["gen_ppl_sample_mean_ci95"], *found["entropy_ci95"]]).all()


def test_entropy_is_a_mean_over_texts():
    found = figures([np.arange(64), np.zeros(10, int)], None, 0, None)
    assert found["entropy"] == pytest.approx(math.log(64) / 2)
    assert found["entropy_below_4"] == 0.5
    assert "gen_ppl" not in found and (found["samples"], found["tokens"]) == (2, 74)
    assert (found["length_median"], found["length_max"]) == (37, 64)
    assert found["repeated_4grams"] == 10 / 74 and found["longest_repeat"] == 9
    assert found["distinct_1"] == 64 / 74


def test_tokens_that_are_not_scored_do_not_count():
    found = figures([np.arange(4)] * 2, [np.array([0.0, 1, 1, 1])] * 2, 1, 8)
    assert found["gen_ppl"] == pytest.approx(math.e) and found["tokens"] == 8


def test_long_texts_by_position():
    texts = [np.arange(9), np.zeros(13, int), np.arange(2), np.zeros(9, int)]
    nats = [np.repeat([1.0, 2, 9], [4, 4, 1]), np.repeat([3.0, 2, 4, 9], [4, 4, 4, 1]), np.ones(2),
            np.repeat([2.0, 2, 9], [4, 4, 1])]
    found = figures(texts, nats, 0, 4)["by_position"]
    assert [(part["start"], part["stop"], part["samples"]) for part in found] == [(0, 4, 3), (4, 8, 3), (8, 12, 1)]
    assert [part["gen_ppl"] for part in found] == pytest.approx(np.exp([2, 2, 4]))
    assert [part["entropy"] for part in found] == pytest.approx([math.log(4) / 3] * 2 + [0])
    assert found[1]["gen_ppl_ci95"] == pytest.approx([math.exp(2)] * 2)
    assert "by_position" not in figures([np.arange(7)], [np.ones(7)], 0, 4)


# ---- real text of the same lengths


def test_real_text_is_cut_to_the_same_lengths():
    words = Words()
    documents = ["a b", "c", "d e f", "g"]
    pieces = quality.cut_to_lengths([1, 3, 2, 99], documents, words)
    assert [[list(words._numbers)[i] for i in piece] for piece in pieces] == [
        ["a"], ["c", "d", "e"], ["d", "e"], ["g", "a", "b", "c", "d", "e", "f"]]


def test_documents_of_real_text_end(lm):
    scorer = quality.Scorer(lm, "toy", 0)
    assert quality.cut_to_lengths([5], ["ab", "ca"], scorer)[0].tolist() == [0, 1, END, 2, 0]


def test_the_scorers_own_corpus_is_the_reference(tmp_path, monkeypatch, tables):
    (tmp_path / "test.txt").write_text("abab\ncd\n")
    data = DataConfig(source="text", path=str(tmp_path))
    toy = make_lm(AR(bos=True), tokenizer=LETTERS)
    config = Config(toy.config.model, toy.config.diffusion, data=data)
    own = bd3lm_jax.LM(config, toy.params, LETTERS, toy.model, CONTEXT)
    monkeypatch.setattr(quality, "load", lambda path, weights: own)
    path = write(tmp_path / "a.json", ["aaa", "bbbbb"])
    result = evaluate_samples([path], replace(OPTIONS, reference=""))
    real = result["rows"][0]["reference"]
    assert result["reference"] == "text, test" and (real["samples"], real["tokens"], real["length_max"]) == (2, 8, 5)
    pieces = [own.nll(np.array([ids]), estimator="nll").total for ids in ([0, 1, 0], [2, 3, END, 0, 1])]
    assert real["gen_ppl"] == pytest.approx(math.exp(sum(pieces) / 8), rel=1e-5)
    names = [row[0] for row in tables[0][2]]
    assert names == ["a", "  real"]
    without = evaluate_samples([path], replace(OPTIONS, reference="", split="valid"))  # a directory without the split
    assert without["reference"] is None and without["rows"][0]["reference"] is None


# ---- the command


def test_known_text_has_the_perplexity_of_the_model(lm, tmp_path, tables):
    texts = letters(3, 9)
    result = evaluate_samples([write(tmp_path / "a.json", [*texts, ""], nfe=2, block_size=4)], OPTIONS)
    row, = result["rows"]
    direct = lm.nll(make_ids(3, 9), estimator="nll")
    assert row["gen_ppl"] == pytest.approx(math.exp(direct.mean), rel=1e-5)
    assert row["gen_ppl_ci95"] == pytest.approx(np.exp(direct.ci95), rel=1e-4)
    assert row["gen_ppl_sample_mean"] == pytest.approx(np.exp(direct.per_token.mean(1)).mean(), rel=1e-5)
    assert row["entropy"] == pytest.approx(np.mean([textmetrics.entropy_of_tokens(ids) for ids in make_ids(3, 9)]))
    assert (row["samples"], row["empty"], row["tokens"], row["nfe_per_token"], row["block_size"]) == (3, 1, 27, 2, 4)
    assert row["stops"] == {"end": 4} and row["mauve"] is None and row["reference"] is None
    assert (result["window"], result["stride"], result["max_tokens"]) == (CONTEXT, CONTEXT // 2, None)
    assert (result["first_token"], result["unit"], result["plot"]) == ("predict", "tokens", None)
    json.dumps(result)


def test_no_perplexity_without_the_entropy(lm, tmp_path, tables):
    evaluate_samples([write(tmp_path / "a.json", letters(2, 30))], OPTIONS)
    title, columns, lines = tables[0]
    assert "windows of 24 every 12" in title
    assert columns[2].startswith("gen. PPL") and columns[4] == "entropy"
    assert len(lines[0]) == len(columns) and float(lines[0][4]) > 0


def test_only_the_first_tokens(lm, tmp_path, tables):
    path = write(tmp_path / "a.json", letters(3, 9))
    row = evaluate_samples([path], replace(OPTIONS, max_tokens=4))["rows"][0]
    direct = lm.nll(make_ids(3, 9)[:, :4], estimator="nll")
    assert row["gen_ppl"] == pytest.approx(math.exp(direct.mean), rel=1e-5) and row["length_max"] == 4


def test_several_files_make_one_table_and_one_plot(lm, tmp_path, tables, monkeypatch):
    figures_, save = [], quality.plots.save
    monkeypatch.setattr(quality.plots, "save", lambda figure, path: figures_.append(figure) or save(figure, path))
    paths = [write(tmp_path / f"{name}.json", letters(2, 8, seed=i), nfe, size)
             for i, (name, nfe, size) in enumerate((("a", 1, 4), ("b", 2, 8), ("c", 3, 8), ("d", None, None)))]
    result = evaluate_samples(paths, replace(OPTIONS, reference=paths[0]))
    assert [row[0] for row in tables[0][2]] == ["a", "  real", "b", "  real", "c", "  real", "d", "  real"]
    assert result["plot"] == str(tmp_path / "quality.png") and (tmp_path / "quality.png").stat().st_size > 1000
    axes = figures_[0].axes[0]
    drawn = {bars.get_label(): bars.lines[0].get_xydata() for bars in axes.containers}
    rows = result["rows"]
    np.testing.assert_allclose(drawn["block size 4"], [[1, rows[0]["gen_ppl"]]])
    np.testing.assert_allclose(drawn["block size 8"], [[2, rows[1]["gen_ppl"]], [3, rows[2]["gen_ppl"]]])
    assert len(drawn) == 2 and f"H {rows[0]['entropy']:.2f}" in axes.texts[0].get_text()
    nowhere = evaluate_samples(paths, replace(OPTIONS, plot=str(tmp_path / "a.json" / "q.png")))
    assert nowhere["plot"] is None and len(nowhere["rows"]) == 4
    again = evaluate_samples(paths, replace(OPTIONS, reference=paths[0], plot=str(tmp_path / "other.png")))
    assert (tmp_path / "other.png").exists()
    assert len({json.dumps({**r, "wall_s": 0, "plot": 0}) for r in (again, result)}) == 1  # nan is not itself


def test_the_order_of_the_texts_does_not_matter(lm, tmp_path, tables):
    texts = [*letters(20, 5), *letters(3, 40)]
    rows = [evaluate_samples([write(tmp_path / "a.json", order)], OPTIONS)["rows"][0]
            for order in (texts, texts[::-1])]
    assert rows[0]["gen_ppl"] == pytest.approx(rows[1]["gen_ppl"], rel=1e-6)


def test_without_a_scorer_words_are_counted(tmp_path, tables):
    result = evaluate_samples([write(tmp_path / "a.json", ["the cat the cat", " "])], replace(OPTIONS, scorer=""))
    row = result["rows"][0]
    assert result["unit"] == "words" and result["window"] is None and "gen_ppl" not in row
    assert row["entropy"] == pytest.approx(math.log(2)) and row["tokens"] == 4 and row["empty"] == 1
    assert "no perplexity" in tables[0][0]


def test_bad_input(lm, tmp_path, tables):
    with pytest.raises(UserError, match="no file"):
        evaluate_samples([str(tmp_path / "none.json")], OPTIONS)
    with pytest.raises(UserError, match="none of 2 texts has a token to score"):
        evaluate_samples([write(tmp_path / "a.json", ["", ""])], OPTIONS)
    good = write(tmp_path / "b.json", ["ab"])
    with pytest.raises(UserError, match="holds no text that is not blank"):
        evaluate_samples([good], replace(OPTIONS, reference=write(tmp_path / "c.json", [" "])))


# ---- MAUVE


@pytest.fixture
def mauve(monkeypatch):
    """Stands in for the package; what it was called with."""
    calls = []

    def compute_mauve(**arguments):
        calls.append(arguments)
        return types.SimpleNamespace(mauve=0.5)

    monkeypatch.setitem(sys.modules, "mauve", types.SimpleNamespace(compute_mauve=compute_mauve))
    return calls


def test_mauve_compares_texts_with_real_ones(lm, tmp_path, tables, mauve):
    real = write(tmp_path / "real.json", ["abcdefgh"])
    path = write(tmp_path / "a.json", ["abc", "cb"])
    result = evaluate_samples([path], replace(OPTIONS, mauve=True, reference=real))
    assert result["rows"][0]["mauve"] == 0.5
    assert mauve == [{"p_text": ["abc", "ab"], "q_text": ["abc", "cb"], "verbose": False}]
    evaluate_samples([path], replace(OPTIONS, reference=real))
    assert len(mauve) == 1  # only when asked for


def test_mauve_that_cannot_be_had_is_null_and_says_why(lm, tmp_path, tables, monkeypatch):
    notes = []
    monkeypatch.setattr(quality.log, "note", notes.append)
    path = write(tmp_path / "a.json", ["abc", "cb"])
    monkeypatch.setitem(sys.modules, "mauve", None)
    assert evaluate_samples([path], replace(OPTIONS, mauve=True, reference=path))["rows"][0]["mauve"] is None
    assert "pip install mauve-text" in notes[0]
    assert evaluate_samples([path], replace(OPTIONS, mauve=True))["rows"][0]["mauve"] is None
    assert any("needs a scorer and real text" in note for note in notes)

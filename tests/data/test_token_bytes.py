import numpy as np
import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers

from bd3lm_jax.data.prepare import prepare
from bd3lm_jax.data.token_bytes import RowsWithBytes, count_lossy_documents
from bd3lm_jax.data.tokenizers import SubwordTokenizer, get_tokenizer

TEXTS = ["ab cab", "c", "b ca é ab", "cab cab cab cab"]
VOCAB = ["<unk>", "</s>", "\u2581", "a", "b", "c", "ab", "\u2581c", "\u2581ab", "cab", "\u2581cab", "é"]


def word_pieces(normalizer=None) -> SubwordTokenizer:
    """Marks a space before every word, also the first, as SentencePiece does."""
    merges = [("a", "b"), ("c", "ab"), ("\u2581", "c"), ("\u2581", "ab"), ("\u2581", "cab")]
    library = Library(models.BPE({token: i for i, token in enumerate(VOCAB)}, merges, unk_token="<unk>"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    if normalizer is not None:
        library.normalizer = normalizer
    return SubwordTokenizer("pieces", library.to_str(), 1, None)


@pytest.fixture
def rows(data_config, tmp_path):
    def get(tokenizer, texts=TEXTS, length=6, layout="wrap"):
        (tmp_path / "a.txt").write_text("".join(text + "\n" for text in texts), encoding="utf-8")
        data = data_config(source="text", path=str(tmp_path / "a.txt"), seq_len=length, packing=layout)
        return prepare(data, "all", 2, tokenizer)

    return get


def by_token(sized) -> list[tuple[int, float]]:
    ids = np.arange(len(sized))
    real = sized.documents(ids) >= 0
    return list(zip(sized.tokens(ids)[real].tolist(), sized.sizes(ids)[real].tolist()))


@pytest.mark.parametrize("with_bytes", [False, True])
@pytest.mark.parametrize("layout", ["wrap", "pack", "pad"])
def test_the_first_word_has_no_space_before_it(rows, layout, with_bytes):
    tokenizer = word_pieces()
    assert count_lossy_documents(TEXTS, tokenizer) == 0
    found = RowsWithBytes(rows(tokenizer, layout=layout), tokenizer,
                          np.array([len(text.encode()) + 1.0 for text in TEXTS]) if with_bytes else None)
    size = {"\u2581": 1, "é": 2, "\u2581c": 2, "\u2581ab": 3, "\u2581cab": 4, "</s>": 1, "a": 1, "b": 1}
    expected, first = [], True
    for token, _ in by_token(found):
        name = VOCAB[token]
        expected.append(size[name] - (first and name.startswith("\u2581")))
        first = name == "</s>"
    assert [bytes_ for _, bytes_ in by_token(found)] == expected
    assert sum(expected) == sum(len(text.encode()) + 1 for text in TEXTS)


def test_a_tokenizer_that_loses_text_has_bytes_in_proportion(rows):
    tokenizer = word_pieces(normalizers.Replace("é", "a"))
    assert count_lossy_documents(TEXTS, tokenizer) == 1
    whole = np.array([len(text.encode()) + 1.0 for text in TEXTS])
    found = RowsWithBytes(rows(tokenizer, layout="pad", length=32), tokenizer, whole)
    assert found.sizes(np.arange(4)).sum(1) == pytest.approx(whole)
    assert found.sizes(np.array([2]))[0].max() == pytest.approx(3 * whole[2] / (whole[2] - 1))  # " ca", " ab" of 3
    without = RowsWithBytes(rows(tokenizer, layout="pad", length=32), tokenizer)
    assert without.sizes(np.arange(4)).sum() == pytest.approx(whole.sum())


@pytest.mark.parametrize("text, changed", [("Anne", 1), ("anne had , said she", 1), ("anne", 0), ("anne  had", 1)])
def test_which_documents_do_not_come_back(text, changed):
    assert count_lossy_documents([text], get_tokenizer("bert-base-uncased", tuple)) == changed
    assert count_lossy_documents([text], get_tokenizer("gpt2", tuple)) == 0

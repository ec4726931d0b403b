import numpy as np
import pytest
from toy_packing import pack_rows

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data import packing

END = 99
LENGTH, BLOCK = 12, 4


def random_documents(seed: int, count: int = 40) -> list[list[int]]:
    """Documents of 0 to 30 tokens, many shorter and some longer than a row; every token occurs once."""
    rng = np.random.default_rng(seed)
    tokens = iter(range(1000, 10**6))
    return [[next(tokens) for _ in range(rng.choice([0, 1, 3, 5, 11, 12, 13, 24, 30]))] for _ in range(count)]


def rows_of(layout: str, documents: list) -> tuple[np.ndarray, np.ndarray]:
    return pack_rows(layout, documents, LENGTH, BLOCK, END)


@pytest.mark.parametrize("layout", ["wrap", "pack", "pad"])
@pytest.mark.parametrize("seed", range(5))
def test_every_token_once_and_padding_elsewhere(layout, seed):
    documents = random_documents(seed)
    tokens, pieces = rows_of(layout, documents)
    covered = np.zeros(tokens.shape, int)
    found = [[] for _ in documents]
    for row, start, length, document in sorted(pieces.tolist(), key=lambda p: tokens[p[0], p[1]]):
        assert length > 0 and start + length <= LENGTH
        covered[row, start:start + length] += 1
        found[document].append(tokens[row, start:start + length].tolist())
    assert covered.max() == 1
    assert (tokens[covered == 0] == END).all()
    for document, parts in zip(documents, found):
        # The part that holds only the end token sorts first: the others are in order.
        parts.sort(key=lambda part: part == [END])
        assert sum(parts, []) == document + [END]
    assert pieces.tolist() == sorted(pieces.tolist())
    assert set(pieces[:, 0].tolist()) == set(range(len(tokens)))


def test_wrap_is_the_plain_concatenation():
    documents = random_documents(7)
    tokens, pieces = rows_of("wrap", documents)
    joined = [token for document in documents for token in [*document, END]]
    owner = [index for index, document in enumerate(documents) for _ in [*document, END]]
    flat = tokens.reshape(-1).tolist()
    assert flat[:len(joined)] == joined and set(flat[len(joined):]) <= {END}
    assert len(flat) - len(joined) < LENGTH
    by_token = np.full(tokens.shape, -1)
    for row, start, length, document in pieces:
        by_token[row, start:start + length] = document
    assert by_token.reshape(-1)[:len(joined)].tolist() == owner


def test_pack_keeps_blocks_and_short_documents_whole():
    documents = random_documents(3)
    tokens, pieces = rows_of("pack", documents)
    owner = np.full(tokens.shape, -1)
    for row, start, length, document in pieces:
        assert start % BLOCK == 0
        owner[row, start:start + length] = document
    for block in owner.reshape(-1, BLOCK):
        assert len(set(block.tolist()) - {-1}) <= 1
    counts = np.bincount(pieces[:, packing.DOCUMENT])
    assert counts.tolist() == [-(-(len(document) + 1) // LENGTH) for document in documents]


def test_pack_is_first_fit():
    documents = [[1] * 7, [2] * 11, [3] * 3, [4] * 2]  # 8, 12, 4 and 4 tokens with their ends and padding
    tokens, pieces = rows_of("pack", documents)
    assert pieces.tolist() == [[0, 0, 8, 0], [0, 8, 4, 2], [1, 0, 12, 1], [2, 0, 3, 3]]
    assert tokens[2].tolist() == [4, 4] + [END] * 10


def test_pad_gives_every_piece_its_row():
    tokens, pieces = rows_of("pad", [[1, 2], [3] * LENGTH])
    assert pieces.tolist() == [[0, 0, 3, 0], [1, 0, 12, 1], [2, 0, 1, 1]]
    assert tokens.tolist() == [[1, 2] + [END] * 10, [3] * 12, [END] * 12]


def test_no_documents_no_rows():
    for layout in ("wrap", "pack", "pad"):
        tokens, pieces = rows_of(layout, [])
        assert tokens.shape == (0, LENGTH) and pieces.shape == (0, 4)


def test_block_size_must_divide_the_length():
    with pytest.raises(UserError, match="block size 5 does not divide data.seq_len=12.*15"):
        pack_rows("pack", [[1]], LENGTH, 5, END)

"""The bound through a cache: in float32 it is the two-stream bound on the same masks; in less memory it changes."""

import jax
import numpy as np
import pytest
from toy_lm import CONTEXT, END, LETTERS, make_ids, make_lm, masked

from bd3lm_jax.diffusion import AR
from bd3lm_jax.evaluation import cache_cost

CASES = [(masked(4), False), (masked(4), True), (masked(1), False), (AR(bos=True), False), (AR(bos=False), False)]


class Rows:
    """Rows as `data.prepare` gives them: the second half of each is another document."""

    length = CONTEXT

    def __init__(self, number: int, two_documents: bool):
        self.ids, self.second = make_ids(number, CONTEXT), two_documents * (np.arange(CONTEXT) >= CONTEXT // 2)

    def __len__(self):
        return len(self.ids)

    def tokens(self, ids):
        return self.ids[ids]

    def segments(self, ids):
        return np.broadcast_to(1 + self.second, self.ids[ids].shape).astype(np.int32)

    def positions(self, ids):
        return np.broadcast_to(np.arange(CONTEXT) - self.second * CONTEXT // 2, self.ids[ids].shape).astype(np.int32)


def through_cache(lm, rows, dtype):
    ids = np.arange(len(rows))
    key = jax.random.fold_in(jax.random.key(3), 0)
    return np.asarray(jax.jit(cache_cost.cached_nats(lm, dtype))(
        lm.params, key, ids, rows.tokens(ids), rows.positions(ids), rows.segments(ids)))


@pytest.mark.ci_slow
@pytest.mark.parametrize("objective, time_conditioning", CASES)
def test_a_float32_cache_gives_the_two_stream_bound(objective, time_conditioning):
    lm = make_lm(objective, time_conditioning, tokenizer=LETTERS)  # which says what a beginning token is
    rows = Rows(3, two_documents=False)
    expected = lm.nll(rows.ids, seed=3).per_token
    np.testing.assert_allclose(through_cache(lm, rows, "float32"), expected, atol=1e-5)


@pytest.mark.ci_slow
def test_packed_documents_do_not_see_each_other():
    lm, half = make_lm(masked(4)), CONTEXT // 2
    rows, other = Rows(2, two_documents=True), Rows(2, two_documents=True)
    other.ids = np.where(rows.second, rows.ids, END)  # another first document
    change = np.abs(through_cache(lm, rows, "float32") - through_cache(lm, other, "float32"))
    assert change[:, half:].max() < 1e-6 and change[:, :half].max() > 0.1


def test_the_price_of_less_memory():
    lm = make_lm(masked(4))
    float32, bfloat16, int8 = cache_cost.nll_cost(lm, Rows(20, two_documents=False), 20, seed=0)
    heads, head_size, layers = 2, 16, 2
    assert [row["bytes_per_token"] for row in (float32, bfloat16, int8)] == [
        2 * layers * heads * head_size * 4, 2 * layers * heads * head_size * 2, 2 * layers * heads * (head_size + 4)]
    assert float32["nll_change"] == 0 and float32["nll_change_ci95"] == [0, 0]
    for row in (bfloat16, int8):
        assert row["nll"] == pytest.approx(float32["nll"] + row["nll_change"], abs=1e-9)
        assert 0 < abs(row["nll_change"]) < 0.02
        assert row["nll_change_ci95"][0] <= row["nll_change"] <= row["nll_change_ci95"][1]


@pytest.mark.ci_slow
def test_only_what_is_read_from_the_cache_is_rounded():
    lm, half = make_lm(masked(CONTEXT // 2)), CONTEXT // 2
    rows = Rows(2, two_documents=False)
    exact, rounded = (through_cache(lm, rows, dtype) for dtype in ("float32", "int8"))
    np.testing.assert_array_equal(rounded[:, :half], exact[:, :half])  # the first block reads nothing
    assert np.abs(rounded[:, half:] - exact[:, half:]).max() > 1e-5


def test_one_block_reads_no_cache():
    assert cache_cost.nll_cost(make_lm(masked(CONTEXT)), Rows(4, two_documents=False), 4, seed=0) == []

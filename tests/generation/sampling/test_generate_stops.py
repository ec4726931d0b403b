"""The block loop: when rows stop, tokens that are never drawn, penalties; on networks that a test can foresee."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import some
from scipy import stats
from toy_blocks import KINDS, MASK, PVALUE, QUICK, ask, begin, make_request, row_keys, sample, settings

from bd3lm_jax.generation.sampling import STOPS, Filters, run_blocks
from bd3lm_jax.generation.sampling.generate import ENTROPY_TOKENS

END = 2


def test_an_end_token_stops_its_row_only():
    """A row of 4 blocks: after the block with its first end token nothing is written; an end in the prompt is text."""
    batch, length = 40, 8
    request = make_request(row_keys(batch), length, prompt=1)
    tokens, stopped, nfe = sample(request, np.full((batch, length), END), sampler="first_hitting",
                                  setting=settings(end_id=END, size=2))
    assert 0 < stopped.sum() < batch
    for row in range(batch):
        ends = np.flatnonzero(tokens[row, 1:] == END) + 1
        assert STOPS[stopped[row]] == ("end" if len(ends) else "length")
        count = 2 * (ends[0] // 2 + 1) if len(ends) else length
        assert (tokens[row, :count] < MASK).all() and (tokens[row, count:] == MASK).all()
        assert nfe[row] == count - 1
    assert len(set(nfe.tolist())) == 4


def test_no_end_token_before_its_time_and_never_what_is_forbidden():
    """Of three kinds one is forbidden, so that before its time there is no choice, and none is wasted afterwards."""
    batch, length, first = 200, 8, 3
    request = make_request(row_keys(batch), length, earliest_end=first, forbidden=[0])
    tokens, _, _ = sample(request, np.zeros((batch, length), int), sampler="first_hitting",
                          setting=settings(end_id=END, size=4))
    assert (tokens[:, :first] == 1).all() and not (tokens == 0).any()
    assert stats.binomtest(int((tokens[:, first] == END).sum()), batch, 0.5).pvalue > PVALUE


def test_rows_of_many_lengths_are_served_in_one_batch():
    """Blocks behind the wanted length cost nothing."""
    lengths = np.array([0, 1, 4, 5, 8])
    tokens, stopped, nfe = sample(make_request(row_keys(5), 8, length=lengths), np.zeros((5, 8), int),
                                  sampler="first_hitting", setting=settings(size=4))
    blocks = -(-lengths // 4) * 4
    np.testing.assert_array_equal(tokens < MASK, np.arange(8) < blocks[:, None])
    np.testing.assert_array_equal(nfe, blocks)
    np.testing.assert_array_equal(stopped, 0)


SIZE, ROW = 32, ENTROPY_TOKENS + 64


def entropy(tokens):
    chances = np.unique(tokens, return_counts=True)[1] / len(tokens)
    return -np.sum(chances * np.log(chances))


def write_long(given_BxP, tokens_BxL, min_entropy, chances_BxV):
    """Rows that go on after the given ones, tokens drawn with the same chances everywhere."""
    def network(canvas, block, previous, positions, level, cache):
        logits = jnp.log(jnp.asarray(chances_BxV))[:, None]
        return jnp.broadcast_to(logits, (*positions.shape, KINDS + 1)), cache

    context = ask("ancestral", settings(steps=1, size=SIZE, min_entropy=min_entropy), network)
    request = make_request(row_keys(len(tokens_BxL)), ROW, prompt=given_BxP)
    result = jax.jit(lambda: run_blocks(context, request, begin(context, request, tokens_BxL), ROW // SIZE),
                     compiler_options=QUICK)()
    return np.asarray(result.tokens), np.asarray(result.stopped)


def test_a_text_that_repeats_itself_is_given_up():
    """Not before its 256th token, whatever it says until then; one that varies goes on."""
    once, alike = [1.0, 0.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3, 0.0]
    tokens, stopped = write_long(0, np.zeros((2, ROW), int), 0.9, [once, alike])
    assert [STOPS[code] for code in stopped] == ["entropy", "length"]
    np.testing.assert_array_equal((tokens < MASK).sum(1), [ENTROPY_TOKENS, ROW])


def test_the_entropy_is_that_of_the_last_256_tokens():
    """Prompts that vary more or less; those below the limit after the first new block stop."""
    draw, limit, rows = np.random.default_rng(0), 0.75, 24
    prompts = np.stack([draw.choice(KINDS, p=draw.dirichlet([0.6] * KINDS), size=ROW) for _ in range(rows)])
    prompts[:, :SIZE] = 0  # these have left the last 256 tokens by then
    given = ENTROPY_TOKENS
    chances = np.tile([0.5, 0.25, 0.25, 0.0], (rows, 1))
    tokens, stopped = write_long(given, prompts, limit, chances)
    end = given + SIZE
    expected = np.array([entropy(row[end - ENTROPY_TOKENS:end]) for row in tokens])
    assert np.abs(expected - limit).min() > 1e-4 and 4 < (expected < limit).sum() < 20
    np.testing.assert_array_equal(tokens[:, end] == MASK, expected < limit)
    assert (stopped[expected < limit] == STOPS.index("entropy")).all()


@pytest.mark.parametrize("penalty", some([1.0, 1.5, 3.0], 1))
def test_repetition_penalty_by_hand(penalty):
    """Tokens that the row holds, given ones too, have their logits divided, or multiplied when negative."""
    logits, length, prompts = [2.0, 1.4, -0.1, 9.0], 6, np.array([[0], [1], [2]])

    def network(canvas, block, previous, positions, level, cache):
        return jnp.broadcast_to(jnp.array(logits), (*positions.shape, KINDS + 1)), cache

    setting = settings(size=1)._replace(filters=Filters(temperature=0.0, repetition_penalty=penalty))
    context = ask("first_hitting", setting, network)
    request = make_request(row_keys(3), length, prompt=1)
    tokens = np.pad(prompts, ((0, 0), (0, length - 1)))
    found = jax.jit(lambda: run_blocks(context, request, begin(context, request, tokens), length).tokens,
                    compiler_options=QUICK)()
    for row, prompt in zip(np.asarray(found), prompts):
        text = prompt.tolist()
        while len(text) < length:
            scores = [x if k not in text else x / penalty if x > 0 else x * penalty
                      for k, x in enumerate(logits[:KINDS])]
            text.append(int(np.argmax(scores)))
        np.testing.assert_array_equal(row, text)

"""The block loop on a toy whose every conditional is known: 6 tokens of 3 kinds, in blocks of 3."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bd3lm_jax.sampling import STEPS, Settings, generate

LENGTH, SIZE, KINDS = 6, 3, 3
MASK = KINDS
JOINT = np.random.default_rng(0).dirichlet(np.full(KINDS**LENGTH, 5.0)).reshape((KINDS,) * LENGTH)
RUNS = 2000
QUICK = {"xla_backend_optimization_level": 0}  # compilation is most of the time here
PVALUE = 1e-3


def with_unknowns(joint):
    """The joint with a fourth value on every axis, "unknown" (the mask id): summed over."""
    for axis in range(joint.ndim):
        joint = np.concatenate([joint, joint.sum(axis, keepdims=True)], axis)
    return joint


KNOWN = with_unknowns(JOINT)


def denoise(canvas_BxS, start, previous_BxS, previous_real, positions_BxP, level_B, stored_BxL):
    """Logits of the exact conditionals, as a network gives them; the cache holds the tokens of finished blocks.

    The mask token has the largest logit of all, which the loop must not mind.
    """
    size, length = canvas_BxS.shape[1], stored_BxL.shape[1]
    if previous_BxS is not None:
        more = jax.lax.dynamic_update_slice_in_dim(stored_BxL, previous_BxS, jnp.maximum(start - size, 0), axis=1)
        stored_BxL = jnp.where(previous_real, more, stored_BxL)
    known_BxL = jax.lax.dynamic_update_slice_in_dim(stored_BxL, canvas_BxS, start, axis=1)
    if length != LENGTH:  # no table of this length: all tokens alike
        return jnp.zeros((*positions_BxP.shape, KINDS)) @ jnp.eye(KINDS, KINDS + 1), stored_BxL
    place_L = 4 ** jnp.arange(LENGTH)[::-1]
    columns = start + positions_BxP
    others = (known_BxL @ place_L)[:, None] - jnp.take_along_axis(known_BxL * place_L, columns, axis=1)
    table = jnp.log(jnp.asarray(KNOWN.reshape(-1), jnp.float32))
    logits = table[others[..., None] + jnp.arange(KINDS) * place_L[columns][..., None]]
    return jnp.pad(logits, ((0, 0), (0, 0), (0, 1)), constant_values=9.0), stored_BxL


def settings(steps=4, temperature=1.0, end_id=-1, size=SIZE):
    return Settings(size, steps, temperature, None, None, MASK, end_id)


def row_keys(batch, seed=0):
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(batch))


def nothing_stored(batch, length):
    return jnp.full((batch, length), MASK)


def plain_sample(keys_B, tokens_BxL, prompt_length_B, *, sampler="first_hitting", setting=settings()):
    return generate(denoise, STEPS[sampler], setting, keys_B, tokens_BxL, prompt_length_B, 0,
                    nothing_stored(*tokens_BxL.shape))


sample = jax.jit(plain_sample, static_argnames=("sampler", "setting"), compiler_options=QUICK)


@functools.partial(jax.jit, static_argnames=("sampler", "setting"), compiler_options=QUICK)
def _many(prompts_BxL, prompt_length_B, *, sampler, setting):
    keys = jax.vmap(lambda seed: row_keys(5, seed))(jnp.arange(RUNS))
    one = functools.partial(plain_sample, sampler=sampler, setting=setting)
    return jax.vmap(one, in_axes=(0, None, None))(keys, prompts_BxL, prompt_length_B)


def many(sampler, setting=settings(), prompts_BxL=np.zeros((5, LENGTH), int), prompt_length_B=(0,) * 5):
    """Batches of 5 rows with keys of their own: tokens `[RUNS, 5, L]`, nfe `[RUNS, 5]`."""
    result = _many(prompts_BxL, jnp.array(prompt_length_B), sampler=sampler, setting=setting)
    return np.asarray(result.tokens), np.asarray(result.nfe)


def law(orders):
    """Probability of every outcome if each block is revealed in a random one of `orders` (a time for each position).

    Tokens revealed at the same time are drawn independently given all that is known before.
    """
    result = np.ones_like(JOINT)
    for outcome in itertools.product(range(KINDS), repeat=LENGTH):
        for block in range(0, LENGTH, SIZE):
            chance = 0.0
            for times in orders:
                parts = []
                for i, time in enumerate(times):
                    known = [outcome[j] if j < block or (j < block + SIZE and times[j - block] < time) else MASK
                             for j in range(LENGTH)]
                    asked = known.copy()
                    asked[block + i] = outcome[block + i]
                    parts.append(KNOWN[tuple(asked)] / KNOWN[tuple(known)])
                chance += np.prod(parts) / len(orders)
            result[outcome] *= chance
    return result


def pvalue(tokens_NxL, expected):
    """Chi-square of outcomes against probabilities."""
    seen = np.bincount(np.ravel_multi_index(tokens_NxL.T, expected.shape), minlength=expected.size)
    return stats.chisquare(seen, len(tokens_NxL) * expected.reshape(-1)).pvalue


def test_first_hitting_is_exact():
    tokens, nfe = many("first_hitting")
    assert pvalue(tokens.reshape(-1, LENGTH), JOINT) > PVALUE
    for row in range(5):
        first_block = JOINT.sum((3, 4, 5))
        assert pvalue(tokens[:, row, :SIZE], first_block) > PVALUE
    # Rows of one batch are independent: the first blocks of rows 0 and 1 against the product.
    pairs = np.concatenate([tokens[:, 0, :2], tokens[:, 1, :2]], axis=1)
    two = JOINT.sum((2, 3, 4, 5))
    assert pvalue(pairs, np.multiply.outer(two, two)) > PVALUE
    np.testing.assert_array_equal(nfe, LENGTH)


def test_ancestral_with_many_steps_follows_the_joint():
    tokens, _ = many("ancestral", settings(steps=32))
    assert pvalue(tokens.reshape(-1, LENGTH), JOINT) > PVALUE


def test_ancestral_with_two_steps_follows_its_own_law():
    assert np.allclose(law(list(itertools.permutations(range(SIZE)))), JOINT)  # one by one: exact, in any order
    expected = law(list(itertools.product(range(2), repeat=SIZE)))
    tokens, nfe = many("ancestral", settings(steps=2))
    tokens = tokens.reshape(-1, LENGTH)
    assert tokens.max() < MASK
    assert pvalue(tokens, expected) > PVALUE > pvalue(tokens, JOINT)
    # A block costs one call if all three times agree (1/4), else two.
    assert stats.chisquare(np.bincount(nfe.reshape(-1), minlength=5)[2:],
                           nfe.size * np.array([1, 6, 9]) / 16).pvalue > PVALUE


def test_prompts_are_kept_and_continued():
    """Rows with different prompts, in the middle of a block and past it, in one batch."""
    lengths = [0, 2, 3, 4, 5]
    prompts = np.tile([1, 2, 0, 2, 1, 0], (5, 1))
    tokens, nfe = many("first_hitting", prompts_BxL=prompts, prompt_length_B=lengths)
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(tokens[:, row, :length], np.tile(prompts[row, :length], (RUNS, 1)))
        np.testing.assert_array_equal(nfe[:, row], LENGTH - length)
        rest = JOINT[tuple(prompts[row, :length])]
        assert pvalue(tokens[:, row, length:], rest / rest.sum()) > PVALUE


def test_temperature_zero_takes_the_most_probable():
    """With one ancestral step a block: the largest marginals given the blocks before."""
    result = sample(row_keys(5), jnp.zeros((5, LENGTH), int), jnp.zeros(5, int), sampler="ancestral",
                    setting=settings(steps=1, temperature=0.0))
    known = [MASK] * LENGTH
    for block in range(0, LENGTH, SIZE):
        known[block:block + SIZE] = [int(KNOWN[(*known[:i], slice(0, KINDS), *known[i + 1:])].argmax())
                                     for i in range(block, block + SIZE)]
    np.testing.assert_array_equal(result.tokens, [known] * 5)


@pytest.mark.parametrize("sampler", STEPS)
def test_rows_do_not_depend_on_companions(sampler):
    lengths, prompts = np.array([0, 1, 4, 2, 3]), np.tile([1, 0, 2, 0, 1, 1], (5, 1))
    run = functools.partial(sample, sampler=sampler, setting=settings(end_id=2))
    first = run(row_keys(5), prompts, lengths)
    order = np.array([3, 0, 4, 2, 1])
    moved = run(row_keys(5)[order], prompts[order], lengths[order])
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[order], y), first, moved)
    for row in range(5):
        others = np.arange(5) != row
        keys = jnp.where(others, row_keys(5, seed=1), row_keys(5))
        changed = run(keys, np.where(others[:, None], 2, prompts), np.where(others, 5, lengths))
        jax.tree.map(lambda x, y, row=row: np.testing.assert_array_equal(x[row], y[row]), first, changed)


def test_an_end_token_stops_its_row_only():
    """A row of 4 blocks: after the block with its first end token nothing is written; an end in the prompt is text."""
    batch, length, size = 40, 8, 2
    prompts = jnp.full((batch, length), 2)
    result = sample(row_keys(batch), prompts, jnp.ones(batch, int), setting=settings(end_id=2, size=size))
    tokens, nfe, ended = (np.asarray(x) for x in result)
    assert 0 < ended.sum() < batch
    for row in range(batch):
        ends = np.flatnonzero(tokens[row, 1:] == 2) + 1
        assert ended[row] == (len(ends) > 0)
        written = size * (ends[0] // size + 1) if len(ends) else length
        assert (tokens[row, :written] < MASK).all() and (tokens[row, written:] == MASK).all()
        assert nfe[row] == written - 1
    assert len(set(nfe)) == 4


class Recorder:
    """The toy denoiser, noting what it is asked while the compiled loop runs."""

    def __init__(self):
        self.stored, self.levels, self.calls = [], [], []

    def __call__(self, canvas, start, previous, previous_real, positions, level, cache):
        if previous is not None:
            jax.debug.callback(self.note_stored, start - canvas.shape[1], previous, previous_real, ordered=True)
        jax.debug.callback(self.note_call, start, level, ordered=True)
        return denoise(canvas, start, previous, previous_real, positions, level, cache)

    def note_stored(self, start, tokens, real):
        if real:
            self.stored.append((int(start), np.asarray(tokens)))

    def note_call(self, start, level):
        self.calls.append(int(start))
        self.levels.append(np.asarray(level))


def record(sampler, prompt_length, first_block, setting, length=8):
    recorder, batch = Recorder(), len(prompt_length)

    def run():
        return generate(recorder, STEPS[sampler], setting, row_keys(batch), jnp.ones((batch, length), int),
                        jnp.array(prompt_length), first_block, nothing_stored(batch, length))
    result = jax.jit(run, compiler_options=QUICK)()
    jax.effects_barrier()
    return recorder, jax.tree.map(np.asarray, result)


@pytest.mark.parametrize("first_block, prompt_length", [(0, [0, 1, 5]), (2, [4, 5, 7])])
def test_every_finished_block_is_stored_once_in_order(first_block, prompt_length):
    recorder, result = record("first_hitting", prompt_length, first_block, settings(size=2))
    starts = [start for start, _ in recorder.stored]
    assert starts == list(range(2 * max(first_block - 1, 0), 6, 2))  # the last block is read by nobody
    for start, tokens in recorder.stored:
        np.testing.assert_array_equal(tokens, result.tokens[:, start:start + 2])
    assert recorder.calls == sorted(recorder.calls)


def test_first_hitting_asks_once_a_token():
    recorder, result = record("first_hitting", [0, 0, 0], 0, settings(size=4))
    assert recorder.calls == [0] * 4 + [4] * 4
    np.testing.assert_array_equal(result.nfe, [8] * 3)
    levels = np.array(recorder.levels).reshape(2, 4, 3)
    assert (np.diff(levels, axis=1) < 0).all() and (0 < levels).all() and (levels < 1).all()
    assert len(np.unique(levels)) == levels.size  # every row and block has its own clock


def test_ancestral_asks_on_its_grid_only_what_reveals():
    """A step that reveals nothing asks nothing, but for the first of a block, which stores the block before it."""
    recorder, result = record("ancestral", [0], 0, settings(steps=16, size=2))
    assert [start for start, _ in recorder.stored] == [0, 2, 4]
    levels, calls = np.concatenate(recorder.levels), np.array(recorder.calls)
    np.testing.assert_allclose(levels * 16, np.round(levels * 16), atol=1e-5)
    for start in (0, 2, 4, 6):
        inside = levels[calls == start]
        assert inside[0] == 1 and (np.diff(inside) < 0).all() and len(inside) <= 3
    assert 4 <= int(result.nfe[0]) <= len(calls) <= int(result.nfe[0]) + 4


def test_nothing_is_asked_once_all_rows_ended():
    recorder, result = record("first_hitting", [0, 0, 0], 0, settings(size=2, end_id=0), length=40)
    last = max(recorder.calls)
    assert result.ended.all() and last < 38
    assert (result.tokens[:, last:last + 2] == 0).any()  # the last row ended in the last block asked about
    assert (result.tokens[:, last + 2:] == MASK).all()

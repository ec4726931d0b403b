"""Whether greedy decoding writes a continuation, against the texts that it writes."""

import numpy as np
import pytest
from grids import some
from scipy.special import log_softmax
from toy_lm import CONTEXT, END, LETTERS, MASK, make_ids, make_lm, masked

from bd3lm_jax.diffusion import AR
from bd3lm_jax.likelihood import conditional

OPTIONS = {"estimator": "exact_count", "draws": 1, "seed": 0, "greedy": True, "batch": 16}
GREEDY = {"sampler": "confidence", "temperature": 0.0}


def greedy(lm, pairs):
    return [found.greedy for found in conditional.score(lm, *zip(*pairs), **OPTIONS)]


def written(lm, prompts, count, **options):
    """What greedy decoding writes in `count` places: pairs of a prompt and a text."""
    samples = [lm.generate([prompt], length=len(prompt) + count, **options)[0] for prompt in prompts]
    return [(prompt, sample.tokens) for prompt, sample in zip(prompts, samples) if sample.tokens]


def changed(pairs):
    """The same pairs with one token changed, each time another one."""
    draw = np.random.default_rng(0)
    for prompt, text in pairs:
        at = draw.integers(len(text))
        yield prompt, [(token + 1 + draw.integers(MASK - 2)) % MASK if i == at else token
                       for i, token in enumerate(text)]


@pytest.mark.parametrize("count", some([1, 2, 3, 4, pytest.param(5, marks=pytest.mark.ci_slow), 7], 3))
def test_texts_of_a_block_model_at_every_length(count):
    """Also where they end inside a block: the rest of it is written as well, and its tokens may come first."""
    lm, prompts = make_lm(masked(4)), [make_ids(n % 9, seed=n).tolist() for n in range(32)]
    pairs = written(lm, prompts, count, **GREEDY)
    assert len(pairs) == 32 and greedy(lm, pairs) == [True] * 32
    assert greedy(lm, list(changed(pairs))) == [False] * 32


def test_it_is_decoding_by_hand():
    """The two-stream pass, whole blocks, the most confident position of the block first."""
    lm = make_lm(masked(4))
    for seed in range(8):
        prompt = make_ids(6, seed=seed)
        text = np.concatenate([prompt, np.full(CONTEXT - 6, MASK)]).astype(np.int32)
        for end in (8, 12):
            while (left := np.flatnonzero(text[:end] == MASK)).size:
                found = log_softmax(np.asarray(lm.logits(text[None], text[None])[0], np.float64)[:, :MASK], -1)
                place = left[np.argmax(found[left].max(-1))]
                text[place] = found[place].argmax()
        assert greedy(lm, [(prompt, text[6:6 + count]) for count in range(1, 7)]) == [True] * 6


@pytest.mark.parametrize("any_length", [False, True])
@pytest.mark.parametrize("count", some([1, 3, 8], 1))
def test_networks_of_one_block_a_row(any_length, count):
    """A run writes a whole row, whatever is cut off later; a published network as many places as the text has."""
    lm = make_lm(masked(CONTEXT))
    lm = type(lm)(lm.config, lm.params, lm.tokenizer, lm.model, CONTEXT, any_length=any_length)
    prompts = [make_ids(2 + n % 7, seed=n).tolist() for n in range(12)]
    pairs = written(lm, prompts, count, **GREEDY)
    assert len(pairs) == 12 and greedy(lm, pairs) == [True] * 12
    assert greedy(lm, list(changed(pairs))) == [False] * 12


@pytest.mark.ci_slow
def test_a_network_that_sees_the_noise_level():
    lm, prompts = make_lm(masked(4), time_conditioning=True), [make_ids(n % 6, seed=n).tolist() for n in range(12)]
    pairs = [pair for count in (1, 2, 6) for pair in written(lm, prompts, count, **GREEDY)]
    assert greedy(lm, pairs) == [True] * len(pairs)
    assert greedy(lm, list(changed(pairs))) == [False] * len(pairs)


@pytest.mark.parametrize("objective", some([AR(bos=True), masked(1)], 0))
def test_exact_models(objective):
    lm, prompts = make_lm(objective, tokenizer=LETTERS), [make_ids(1 + n % 6, seed=n).tolist() for n in range(12)]
    pairs = [pair for count in (1, 3, 6) for pair in written(lm, prompts, count, temperature=0.0)]
    assert greedy(lm, pairs) == [True] * len(pairs)
    assert greedy(lm, list(changed(pairs))) == [False] * len(pairs)


@pytest.mark.ci_slow
def test_of_equal_tokens_the_first_is_greedy():
    """An output layer without weights: all tokens are alike, and decoding writes the first."""
    lm = make_lm(AR(bos=True), tokenizer=LETTERS)
    linear = {name: x * 0 for name, x in lm.params["head"]["linear"].items()}
    params = lm.params | {"head": lm.params["head"] | {"linear": linear}}
    lm = type(lm)(lm.config, params, LETTERS, lm.model, CONTEXT)
    assert lm.generate([[5]], length=3, temperature=0.0)[0].tokens == [0, 0]
    assert greedy(lm, [([5], [0, 0]), ([5], [0, 1]), ([5], [END, 0])]) == [True, False, False]

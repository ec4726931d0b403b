"""`LM.generate` against a plain loop that keeps nothing, and what it promises about batches, prompts and errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import some
from toy_lm import CONTEXT, END, LETTERS, MASK, make_ids, make_lm, masked

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import AR
from bd3lm_jax.generation.sampling.filters import Filters, filter_logits, sample_categorical
from bd3lm_jax.generation.sampling.steps import SAMPLERS, Row
from bd3lm_jax.models import forward, trunk
from bd3lm_jax.models.forward import DEFAULT_EXECUTION


@functools.partial(jax.jit, static_argnames=("model", "objective"))
def whole_row_logits(model, params, objective, xt_1xL, level):
    """What the network says at every position of a canvas after a clean prefix, computed from scratch."""
    position, segment = forward.single_document_rows(xt_1xL)
    if objective.causal:
        ids = jnp.pad(xt_1xL, ((0, 0), (1, 0)), constant_values=END)[:, :-1]
        seen = segment if objective.bos else (position > 0).astype(jnp.int32)
        h = forward.one_stream(model, params, ids, position, seen, rule="causal", block_size=1,
                               execution=DEFAULT_EXECUTION)
        return trunk.logits(model, params, h)[0]
    sigma = None
    if model.config.time_conditioning:
        sigma = jnp.full((1, 1, xt_1xL.shape[1] // objective.block_size), -jnp.log1p(-jnp.minimum(level, 1 - 1e-6)))
    h = forward.two_stream(model, params, xt_1xL[:, None], xt_1xL, position, segment, block_size=objective.block_size,
                           sigma_BxMxn=sigma, execution=DEFAULT_EXECUTION)
    return trunk.logits(model, params, h, sigma)[0, 0]


@functools.partial(jax.jit, static_argnames=("sampler", "steps"))
def plan(key, masked_S, written_S, level, index, sampler, steps):
    row = Row(masked_S, written_S, jnp.ones(masked_S.shape), level, index)
    return SAMPLERS[sampler].plan(key, row, steps, SAMPLERS[sampler].threshold)


@functools.partial(jax.jit, static_argnames="temperature")
def propose(key, logits_SxV, temperature):
    keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(jnp.arange(len(logits_SxV)))
    return sample_categorical(keys, filter_logits(logits_SxV.at[:, MASK].set(-jnp.inf), Filters(temperature)))


def uncached(lm, prompt, row, *, length, sampler, temperature, seed, steps=0):
    """Request `row` by a plain loop: new tokens, why it ended, network calls."""
    size, calls, end = lm.config.block_size, 0, False
    canvas = np.full(-(-length // size) * size, MASK)
    canvas[:len(prompt)] = prompt
    key = jax.random.fold_in(jax.random.key(seed), row)
    for block in range(len(prompt) // size, len(canvas) // size):
        inside, level, index = slice(block * size, (block + 1) * size), 1.0, 0
        new = np.arange(inside.start, inside.stop) >= len(prompt)
        while not end and (canvas[inside] == MASK).any():
            plan_key, draw_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, block), index))
            masked = canvas[inside] == MASK
            planned = plan(plan_key, masked, new & ~masked, level, index, sampler, steps)
            if planned.reveal.any():
                calls += 1
                logits = whole_row_logits(lm.model, lm.params, lm.config.diffusion, canvas[None], planned.level)
                drawn = propose(draw_key, logits[inside], temperature)
                canvas[inside] = np.where(planned.reveal, drawn, canvas[inside])
            level, index = planned.next_level, index + 1
        end = end or END in canvas[max(inside.start, len(prompt)):min(inside.stop, length)]
    new = canvas[len(prompt):length].tolist()
    return (new[:new.index(END)], "end", calls) if END in new else (new, "length", calls)


RAGGED = [make_ids(n, seed=n).tolist() for n in (2, 9, 14)]


@pytest.mark.parametrize("objective, time_conditioning, sampler, temperature, prompts", some([
    (masked(4), True, "first_hitting", 1.0, RAGGED), (masked(4), False, "first_hitting", 0.0, RAGGED[1:]),
    (masked(4), True, "ancestral", 1.0, RAGGED[1:]), (AR(bos=True), False, "first_hitting", 1.0, RAGGED),
    (AR(bos=False), False, "first_hitting", 1.0, RAGGED[1:]),
    (AR(bos=False), False, "first_hitting", 0.0, RAGGED)], 0, 3))
def test_generation_equals_a_loop_without_cache(objective, time_conditioning, sampler, temperature, prompts):
    """Prompts that end inside a block, inside the prefilled part and past it; a length that cuts the last block."""
    lm = make_lm(objective, time_conditioning, LETTERS)
    options = {"length": 19, "sampler": sampler, "temperature": temperature, "seed": 3}
    if sampler == "ancestral":
        options["steps"] = 9
    for row, (sample, prompt) in enumerate(zip(lm.generate(prompts, **options), prompts, strict=True)):
        assert (sample.tokens, sample.stop, sample.nfe) == uncached(lm, prompt, row, **options)


@pytest.mark.parametrize("objective", some([masked(4), AR(bos=True)], 0))
def test_requests_do_not_depend_on_the_batch(objective):
    lm = make_lm(objective, tokenizer=LETTERS)
    eight = lm.generate(num=8, length=12, seed=5)
    assert lm.generate(num=1, length=12, seed=5) == eight[:1]
    assert len({tuple(sample.tokens) for sample in eight}) == 8
    assert lm.generate(num=1, length=12, seed=6) != eight[:1]
    prompted = lm.generate([[], *RAGGED[:1] * 6, RAGGED[1]], length=12, seed=5)  # other companions, other prompts
    assert prompted[0] == eight[0]
    assert prompted[1:3] == lm.generate([RAGGED[1], *RAGGED[:1] * 2, *RAGGED[1:2] * 5], length=12, seed=5)[1:3]


@pytest.mark.ci_slow
def test_prompt_lengths_of_a_bucket_share_one_program():
    lm = make_lm(masked(2), tokenizer=LETTERS)
    lm.generate([make_ids(5).tolist()], length=CONTEXT)
    start, run = lm._programs["start"]._cache_size(), lm._programs["run"]._cache_size()
    for length in (8, 11, 17, 20):
        lm.generate([make_ids(length).tolist()], length=CONTEXT - length % 3, seed=length)
    assert lm._programs["run"]._cache_size() == run
    assert lm._programs["start"]._cache_size() == start


@pytest.mark.ci_slow
def test_samples():
    lm = make_lm(tokenizer=LETTERS)
    samples = lm.generate(["abcde", "k"], num=20, length=10)
    assert {sample.stop for sample in samples} == {"end", "length"}
    for sample, new in zip(samples, [5] * 20 + [9] * 20, strict=True):
        assert END not in sample.tokens and MASK not in sample.tokens
        assert sample.text == LETTERS.decode(sample.tokens)
        assert (len(sample.tokens) == new) == (sample.stop == "length")
    without = make_lm().generate(length=10)[0]
    assert without.text is None and len(without.tokens) == 10 and without.stop == "length"
    assert lm.generate(["abcde", "k"], num=20, length=10) == samples
    assert lm.generate([[0, 1, 2, 3, 4], [10]], num=20, length=10) == samples


@pytest.mark.parametrize("options, message", [
    ({"prompts": [[0] * 10]}, "the prompt has 10 tokens, which leaves none of length 10 to write: shorten the prompt"),
    ({"prompts": [[1, MASK]]}, "the prompt holds the mask token 12"),
    ({"prompts": [[1, 99]]}, "a prompt holds token ids from 1 to 99, expected integers 0 to 12"),
    ({"prompts": [[1, -1]]}, "a prompt holds token ids from -1 to 1"),
    ({"prompts": [[2**40]]}, f"token ids from {2**40} to {2**40}"),
    ({"prompts": [[1.5]]}, r"a prompt is \[1.5\], expected a text or a list of token ids"),
    ({"prompts": ["abc"]}, "this checkpoint has no tokenizer: give prompts as lists of token ids"),
    ({"prompts": "abc"}, "prompts are 'abc', expected a list of one or more texts"),
    ({"prompts": []}, r"prompts are \[\], expected a list of one or more"),
    ({"prompts": [1, 2]}, "a prompt is 1, expected a text or a list of token ids"),
    ({"num": 0}, "num is 0, expected at least 1"),
    ({"length": 0}, "length is 0, expected 1 to 24"),
    ({"length": 25}, "length is 25, expected 1 to 24, the tokens the model was trained on"),
    ({"sampler": "first_hiting"}, "unknown sampler 'first_hiting': did you mean 'first_hitting'?"),
    ({"top_p": 0}, "top_p is 0, expected in"),
    ({"top_p": 1.1}, "top_p is 1.1, expected in"),
    ({"top_k": 0}, "top_k is 0, expected at least 1"),
    ({"temperature": -1}, "temperature is -1, expected at least 0"),
])
def test_bad_requests(options, message):
    with pytest.raises(UserError, match=message) as error:
        make_lm().generate(**{"length": 10, **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options, message", [
    ({"prompts": [[1]], "sampler": "ancestral"}, "sampler 'ancestral' is for masked diffusion"),
    ({}, "this autoregressive model has no beginning token: give it a prompt"),
    ({"prompts": [[1], []]}, "no beginning token"),
])
def test_bad_requests_to_an_autoregressive_model(options, message):
    with pytest.raises(UserError, match=message):
        make_lm(AR(bos=False)).generate(length=10, **options)

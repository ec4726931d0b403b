"""Bidirectional models that write a window at a time, as LLaDA's own `generate` does, against a plain loop."""

import functools

import numpy as np
import pytest
from grids import some
from scipy.special import log_softmax
from toy_lm import CONTEXT, END, LETTERS, MASK, make_lm, masked

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.generation import stream
from bd3lm_jax.generation.options import make_options

NO_END = {"forbidden": [END]}


@functools.cache
def published(time_conditioning=False):
    """A model that was trained on rows of many lengths, as published ones are."""
    lm = make_lm(masked(CONTEXT), time_conditioning, LETTERS)
    return type(lm)(lm.config, lm.params, lm.tokenizer, lm.model, CONTEXT, any_length=True)


def llada(lm, prompt, length, window, steps):
    """LLaDA's `generate` (arXiv 2502.09992, low-confidence remasking, temperature 0): prompt and masks are the canvas,
    windows begin where the prompt ends, and each step of a window keeps its part of the most confident tokens."""
    canvas = np.array([*prompt, *[MASK] * (length - len(prompt))], np.int32)
    for start in range(len(prompt), length, window):
        end = min(start + window, length)
        for step in range(steps):
            left = np.flatnonzero(canvas[start:end] == MASK) + start
            if not left.size:
                break
            found = np.asarray(lm.logits(canvas[None])[0], np.float64)
            found[:, [MASK, END]] = -np.inf
            found = log_softmax(found, -1)
            order = left[np.argsort(-found[left].max(-1), kind="stable")]
            for place in order[:-(-len(left) // (steps - step))]:
                canvas[place] = found[place].argmax()
    return canvas[len(prompt):].tolist()


@pytest.mark.parametrize("length, window, steps", some([(24, 8, 8), (18, 6, 6), (18, 6, 2), (17, 5, 5), (20, 16, 4),
                                                   (9, 16, 9), (13, 1, 1)], 0))
def test_texts_are_those_of_a_plain_loop(length, window, steps):
    prompts = [[], [1, 2, 0], [4, 5, 6, 7, 8, 9, 10]]
    options = {"length": length, "sampler": "confidence", "temperature": 0.0, "steps": steps, **NO_END}
    found = published().generate(prompts, block_size=window, **options)
    assert [sample.tokens for sample in found] == [llada(published(), prompt, length, window, steps)
                                                   for prompt in prompts]


@pytest.mark.ci_slow
def test_a_threshold_stays_within_its_window():
    """All at once in a window: as many calls as windows."""
    found = published().generate([[], [1, 2, 0]], length=18, block_size=6, sampler="threshold", threshold=0.0,
                                 temperature=0.0, **NO_END)
    assert [sample.nfe for sample in found] == [3, 3]
    assert [sample.tokens for sample in found] == [llada(published(), prompt, 18, 6, 1) for prompt in ([], [1, 2, 0])]


@pytest.mark.ci_slow
@pytest.mark.parametrize("kind", ["prefix", "dual"])
@pytest.mark.parametrize("length, window", [(18, 6), (17, 5), (24, 9)])
def test_an_approximate_cache_that_is_exact(kind, length, window):
    """One call a window sees everything as it is: the texts of the plain loop, windows from the end of each prompt."""
    prompts = [[], [1, 2, 0], [4, 5, 6, 7, 8, 9, 10]]
    options = {"length": length, "block_size": window, "sampler": "threshold", "threshold": 0.0, "temperature": 0.0,
               "approximate_cache": kind, **NO_END}
    found = published().generate(prompts, **options)
    assert [sample.tokens for sample in found] == [llada(published(), prompt, length, window, 1) for prompt in prompts]
    assert [published().generate([prompt], **options)[0] for prompt in prompts] == found


@pytest.mark.ci_slow
@pytest.mark.parametrize("options", [{"guidance": 2.0}, {"repetition_penalty": 1.5}, {"time": True}])
def test_what_goes_with_both(options):
    """With as many windows as calls the cache changes nothing, whatever else is asked for."""
    lm, options = published(options.get("time", False)), {k: v for k, v in options.items() if k != "time"}
    options |= {"length": 18, "block_size": 5, "sampler": "threshold", "threshold": 0.0, "temperature": 0.0, **NO_END}
    exact = [sample.tokens for sample in lm.generate([[1, 2, 0], [4]], **options)]
    assert [sample.tokens for sample in lm.generate([[1, 2, 0], [4]], approximate_cache="dual", **options)] == exact


@pytest.mark.parametrize("kind", ["", "dual"])
def test_watched_texts_are_the_same(kind):
    lm, prompts = published(), [[1, 2, 0], [4, 5, 6, 7, 8, 9, 10]]
    options = {"block_size": 5, "approximate_cache": kind, "sampler": "confidence", "seed": 4, **NO_END}
    canvas = lm.at_length(17)
    events = list(stream.stream(canvas, prompts, 1, 17, make_options(**options)))
    watched = sorted((event for event in events if event.sample), key=lambda event: event.number)
    assert [event.sample for event in watched] == lm.generate(prompts, length=17, **options)
    for number, prompt in enumerate(prompts):
        own = [event for event in events if event.number == number]
        revealed = [place for event in own for place in event.revealed]
        assert sorted(revealed) == list(range(len(prompt), 17))
        first = own[0].canvas
        assert first == [*prompt, *[MASK] * (17 - len(prompt))]


def test_what_is_impossible():
    with pytest.raises(UserError, match=f"block_size is {CONTEXT + 1}, expected 1 to {CONTEXT}"):
        published().generate(length=18, block_size=CONTEXT + 1)
    with pytest.raises(UserError, match="leave block_size out"):
        published().generate(length=18, block_size=6, sampler="remdm_cap")

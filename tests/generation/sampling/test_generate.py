"""The block loop on a toy whose every conditional is known: decoding by plain loops, rows, stops."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import some
from toy_blocks import (
    JOINT,
    KINDS,
    LENGTH,
    MASK,
    PVALUE,
    QUICK,
    SIZE,
    ask,
    begin,
    conditional,
    denoise,
    make_request,
    many,
    pvalue,
    row_keys,
    sample,
    settings,
)

from bd3lm_jax.generation.sampling import SAMPLERS, STOPS, run_blocks
from bd3lm_jax.generation.sampling.generate import Frame, close_block, open_block, step_block

RUNS = 2000


def test_prompts_are_kept_and_continued():
    """Rows with different prompts, in the middle of a block and past it, in one batch."""
    lengths, prompt = [0, 2, 3, 4, 5], (1, 2, 0, 2, 1, 0)
    tokens, nfe = many("first_hitting", settings(), RUNS, lengths, prompt)
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(tokens[:, row, :length], np.tile(prompt[:length], (RUNS, 1)))
        np.testing.assert_array_equal(nfe[:, row], LENGTH - length)
        rest = JOINT[prompt[:length]]
        assert pvalue(tokens[:, row, length:], rest / rest.sum()) > PVALUE


def certainty(chances):
    """What the orders go by, of one position's probabilities."""
    first, second, *_ = sorted(chances, reverse=True)
    return {"confidence": first, "margin": first - second, "entropy": np.sum(chances * np.log(chances))}


def shown_by(sampler, chances, index, steps, threshold):
    """Which of the masked positions (by place among them) the papers' words reveal."""
    count = len(chances)
    if sampler in ("confidence", "margin", "entropy"):  # equal shares of what is left, the best first
        order = sorted(range(count), key=lambda i: -certainty(chances[i])[sampler])
        return order[:-(-count // (steps - index))]
    order = sorted(range(count), key=lambda i: -max(chances[i]))
    if sampler == "threshold":
        return [order[0], *(i for i in order[1:] if max(chances[i]) >= threshold)]
    if sampler == "factor":
        n = 1
        while n < count and max(chances[order[n]]) >= 1 - threshold / (n + 2):
            n += 1
        return order[:n]
    entropy = [-certainty(p)["entropy"] for p in chances]
    order = sorted(range(count), key=lambda i: entropy[i])
    fitting = [n for n in range(1, count + 1) if sum(entropy[i] for i in order[:n]) - entropy[order[n - 1]] < threshold]
    return order[:max(fitting, default=1)]


@pytest.mark.parametrize("prompt", some([0, 2], 1))
@pytest.mark.parametrize("sampler, threshold", [("confidence", 0.0), ("margin", 0.0), ("entropy", 0.0),
                                                ("threshold", 0.45), ("factor", 1.8), ("entropy_bound", 1.0)])
def test_choices_by_what_the_network_says(sampler, threshold, prompt):
    """At temperature 0, against a loop that reads the papers' words."""
    steps, prompts = 2, np.array(list(itertools.product(range(KINDS), repeat=2)))
    tokens = np.zeros((len(prompts), LENGTH), int)
    tokens[:, :2] = prompts
    found, _, nfe = sample(make_request(row_keys(len(prompts)), LENGTH, prompt, threshold=threshold), tokens,
                           sampler=sampler, setting=settings(steps=steps, temperature=0.0))
    for row, start in enumerate(prompts[:, :prompt]):
        canvas, calls = (*start, *(MASK,) * (LENGTH - prompt)), 0
        for first in range(0, LENGTH, SIZE):
            index = 0
            while masked := [i for i in range(first, first + SIZE) if canvas[i] == MASK]:
                chances = [conditional(canvas, i) for i in masked]
                shown = shown_by(sampler, chances, index, steps, threshold)
                new = {masked[i]: int(chances[i].argmax()) for i in shown}
                canvas = tuple(new.get(i, k) for i, k in enumerate(canvas))
                index, calls = index + 1, calls + 1
        assert (tuple(found[row].tolist()), int(nfe[row])) == (canvas, calls)


def test_windows_inside_a_block_are_written_from_left_to_right():
    """At temperature 0 with one step a window of 2: the largest marginals given the windows before."""
    found, _, nfe = sample(make_request(row_keys(2), LENGTH), np.zeros((2, LENGTH), int), sampler="ancestral",
                           setting=settings(steps=1, temperature=0.0, size=LENGTH, window=2))
    canvas = (MASK,) * LENGTH
    for first in range(0, LENGTH, 2):
        new = [int(conditional(canvas, i).argmax()) for i in (first, first + 1)]
        canvas = (*canvas[:first], *new, *canvas[first + 2:])
    np.testing.assert_array_equal(found, [canvas] * 2)
    np.testing.assert_array_equal(nfe, 3)


STRONG = {"threshold": 0.5, "factor": 1.8, "entropy_bound": 1.0, "remdm_cap": 0.9, "remdm_rescale": 0.9,
          "remdm_confidence": 0.9, "remdm_loop": 0.9}  # thresholds at which the toy does more than one thing
RAGGED = np.array([0, 1, 4, 2, 3])
TEXTS = np.tile([1, 0, 2, 0, 1, 1], (5, 1))




@functools.cache
def five_rows(sampler, threshold):
    request = make_request(row_keys(5), LENGTH, RAGGED, threshold=threshold)
    return sample(request, TEXTS, sampler=sampler, setting=settings(steps=8, end_id=2))


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.ci_slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rows_do_not_depend_on_companions(sampler):
    run = functools.partial(sample, sampler=sampler, setting=settings(steps=8, end_id=2))
    threshold, order = STRONG.get(sampler, 0.0), np.array([3, 0, 4, 2, 1])
    first = five_rows(sampler, threshold)
    moved = run(make_request(row_keys(5)[order], LENGTH, RAGGED[order], threshold=threshold), TEXTS[order])
    assert_equal([x[order] for x in first], list(moved))
    for row in range(5):
        others = np.arange(5) != row
        keys = row_keys(10)[np.where(others, np.arange(5, 10), np.arange(5))]
        request = make_request(keys, LENGTH, np.where(others, 5, RAGGED), np.where(others, 0, LENGTH),
                               threshold=threshold)  # companions that want nothing
        changed = run(request, np.where(others[:, None], 2, TEXTS))
        assert_equal([x[row] for x in changed], [x[row] for x in first])


@pytest.mark.parametrize("sampler", some(["first_hitting", "random_order", "remdm_cap"], 0))
def test_rows_alone_are_the_same(sampler):
    threshold = STRONG.get(sampler, 0.0)
    for row in range(5):
        request = make_request(row_keys(5)[row:row + 1], LENGTH, RAGGED[row:row + 1], threshold=threshold)
        alone = sample(request, TEXTS[:1], sampler=sampler, setting=settings(steps=8, end_id=2))
        assert_equal([x[0] for x in alone], [x[row] for x in five_rows(sampler, threshold)])


@pytest.mark.parametrize("sampler", some(["remdm_cap", "remdm_rescale", "remdm_confidence"], 0))
def test_remdm_that_never_masks_again_is_ancestral(sampler):
    assert_equal(five_rows(sampler, 0.0), five_rows("ancestral", 0.0))
    assert (five_rows(sampler, STRONG[sampler])[0] != five_rows("ancestral", 0.0)[0]).any()


@pytest.mark.ci_slow
@pytest.mark.parametrize("sampler", ["first_hitting", "ancestral"])
def test_slices_and_steps_by_hand_are_one_go(sampler):
    context, request = ask(sampler, settings(end_id=2)), make_request(row_keys(5), LENGTH, RAGGED)
    start, run = (jax.jit(functools.partial(part, context), compiler_options=QUICK) for part in (begin, run_blocks))
    opened, stepped, closed = (
        jax.jit(lambda request, progress, *state, part=part: part(Frame(context, request, progress), *state),
                compiler_options=QUICK) for part in (open_block, step_block, close_block))
    first = start(request, TEXTS)
    whole = run(request, first, 2)
    assert_equal(run(request, run(request, run(request, first, 0), 1), 2), whole)
    by_hand = first
    while by_hand.block < 2 and not Frame(context, request, by_hand).done.all():
        block, cache = opened(request, by_hand)
        while np.asarray(block.masked).any():
            block = stepped(request, by_hand, block, cache)
        by_hand = closed(request, by_hand, block, cache)
    assert_equal(by_hand, whole)


class Recorder:
    """The toy denoiser, noting what it is asked while the compiled loop runs."""

    def __init__(self):
        self.stored, self.levels, self.calls = [], [], []

    def __call__(self, canvas, block, previous, positions, level, cache):
        if previous is not None:
            jax.debug.callback(self.note_stored, (block - 1) * canvas.shape[1], *previous, ordered=True)
        jax.debug.callback(self.note_call, block * canvas.shape[1], level, ordered=True)
        return denoise(canvas, block, previous, positions, level, cache)

    def note_stored(self, start, tokens, real):
        assert (np.asarray(real) == (start >= 0)).all()
        if start >= 0:
            self.stored.append((int(start), np.asarray(tokens)))

    def note_call(self, start, level):
        self.calls.append(int(start))
        self.levels.append(np.asarray(level))


@pytest.mark.parametrize("sampler, steps, positions", some([
    ("first_hitting", 4, 1), ("random_order", 4, 1), ("random_order", 2, 2), ("random_order", 1, 4),
    ("confidence", 2, 4), ("ancestral", 4, 4)], 0))
def test_the_head_runs_on_what_may_be_revealed(sampler, steps, positions):
    asked_for = []

    def network(canvas, block, previous, positions, level, cache):
        asked_for.append(positions.shape)
        return denoise(canvas, block, previous, positions, level, cache)
    context, request = ask(sampler, settings(steps=steps, size=4), network), make_request(row_keys(3), 8, [0, 1, 5])
    jax.eval_shape(lambda: run_blocks(context, request, begin(context, request, jnp.ones((3, 8), int)), 2))
    assert set(asked_for) == {(3, positions)}


def record(sampler, prompt_length, first_block, setting, row_length=8):
    recorder, batch = Recorder(), len(prompt_length)
    context, request = ask(sampler, setting, recorder), make_request(row_keys(batch), row_length, prompt_length)

    def run():
        progress = begin(context, request, jnp.ones((batch, row_length), int), first_block)
        return run_blocks(context, request, progress, row_length // setting.block_size)
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


@pytest.mark.ci_slow
def test_nothing_is_asked_once_all_rows_stopped():
    recorder, result = record("first_hitting", [0, 0, 0], 0, settings(size=2, end_id=0), row_length=40)
    last = max(recorder.calls)
    assert (result.stopped == STOPS.index("end")).all() and last < 38
    assert (result.tokens[:, last:last + 2] == 0).any()  # the last row ended in the last block asked about
    assert (result.tokens[:, last + 2:] == MASK).all()

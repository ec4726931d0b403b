"""Options, stops, long texts and caches of `LM.generate`, against what can be said without its loop."""

import functools

import jax
import numpy as np
import pytest
from grids import some
from toy_lm import CONTEXT, END, LETTERS, MASK, make_ids, make_lm, masked

import bd3lm_jax
from bd3lm_jax.diffusion import AR
from bd3lm_jax.generation import batch, generation
from bd3lm_jax.generation import plan as plans
from bd3lm_jax.generation.options import Options, make_options
from bd3lm_jax.generation.prompts import BUCKET, Rows, prompt_rows
from bd3lm_jax.generation.sampling import SAMPLERS, STOPS, Filters, Settings
from bd3lm_jax.generation.sampling import generate as loop
from bd3lm_jax.models import forward, trunk

NO_END = {"forbidden": [END]}


def with_context(lm, context):
    return bd3lm_jax.LM(lm.config, lm.params, lm.tokenizer, lm.model, context)


def test_every_option_reaches_the_loop():
    options = make_options(sampler="ancestral", temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, repetition_penalty=1.2,
                           forbidden=[4], steps=12, threshold=0.3, min_entropy=2.0, min_length=5, cache_dtype="int8",
                           guidance=1.5, seed=3)
    lm = make_lm(tokenizer=LETTERS)
    plan = plans.make_plan(lm, options, BUCKET)
    assert plan.settings == Settings(4, 4, 12, Filters(0.5, 7, 0.9, 0.1, 1.2), MASK, END, 2.0)
    assert (plan.transition, plan.cache_dtype, plan.guided) == (SAMPLERS["ancestral"], "int8", True)
    rows = prompt_rows(lm, [np.array([1, 2]), np.array([5])], 9, options)
    request = plans.make_request(lm, options, rows, 0)
    np.testing.assert_array_equal(np.flatnonzero(request.forbidden), [4, MASK])
    assert request.threshold == np.float32(0.3)
    np.testing.assert_array_equal(request.given.sum(1), [2, 1])
    np.testing.assert_array_equal(request.length, 9)
    np.testing.assert_array_equal(request.earliest_end, [7, 6])
    assert rows.tokens.shape == (2, BUCKET)


@pytest.mark.parametrize("sampler, steps, threshold", [("first_hitting", 4, 0.0), ("ancestral", 1000, 0.0),
                                                       ("threshold", 4, 0.9), ("iterative", 10, 0.0)])
def test_what_is_usual_of_a_sampler(sampler, steps, threshold):
    lm, options = make_lm(), Options(sampler=sampler)
    assert plans.make_plan(lm, options, BUCKET).settings.steps == steps
    rows = prompt_rows(lm, [np.array([1])], 9, options)
    assert plans.make_request(lm, options, rows, 0).threshold == np.float32(threshold)


@pytest.mark.parametrize("objective", some([masked(4), AR(bos=True)], 0))
def test_no_stack_of_layers_enters_the_loop(objective):
    """A layer cut out of its stack inside the loop would be copied in every call, half of a call's time."""
    lm, options = make_lm(objective), Options()
    job = batch.BatchLoop(lm, options, prompt_rows(lm, [np.array([1])], 9, options))
    program = jax.make_jaxpr(functools.partial(batch.run_rows, lm, job.plan))(lm.params, job.request, 0.0,
                                                                             job.progress, 2)
    outer, = (equation for equation in program.eqns if equation.primitive.name == "while")
    into = [x.aval.shape for x in outer.invars]
    for name in ("qkv", "out", "mlp_in", "mlp_out"):
        count, *layer = lm.params["blocks"][name]["kernel"].shape
        assert (count, *layer) not in into and into.count(tuple(layer)) == count


@functools.partial(jax.jit, static_argnames="model")
def causal_logits(model, params, ids):
    h = forward.one_stream(model, params, ids, *forward.single_document_rows(ids), rule="causal", block_size=1,
                           execution=forward.DEFAULT_EXECUTION)
    return trunk.logits(model, params, h)


@pytest.mark.parametrize("window", some([False, True], 1))
def test_a_row_that_fills_its_bucket_keeps_its_beginning(window):
    """The most probable last token, by a pass over the whole row: it still sees the first one."""
    lm = with_context(make_lm(AR(bos=True), tokenizer=LETTERS), BUCKET)
    prompts = np.random.default_rng(6).integers(4, 12, size=(48, BUCKET - 1))
    samples = lm.generate(prompts.tolist(), length=BUCKET, temperature=0.0, window=window, **NO_END)
    inputs = np.pad(prompts, ((0, 0), (1, 0)), constant_values=END)
    logits = np.array(causal_logits(lm.model, lm.params, inputs))[:, -1]
    logits[:, [MASK, END]] = -np.inf
    assert [sample.tokens for sample in samples] == logits.argmax(-1)[:, None].tolist()


def test_stop_strings():
    """Texts are those without stop strings, cut before the first one; also one that lies in two blocks or stretches."""
    lm, options = make_lm(tokenizer=LETTERS), {"num": 24, "length": CONTEXT, "seed": 1, **NO_END}
    whole = [sample.text for sample in lm.generate(**options)]
    stop = [whole[0][2:6], whole[1][6:9], whole[2][9:12]]  # the first two over the ends of blocks
    samples = lm.generate(**options, stop=stop)
    expected = [min([text.index(s) for s in stop if s in text], default=None) for text in whole]
    assert [sample.text for sample in samples] == [text[:cut] for text, cut in zip(whole, expected)]
    assert [sample.stop for sample in samples] == ["length" if cut is None else "string" for cut in expected]
    assert [len(sample.tokens) for sample in samples] == [len(sample.text) for sample in samples]
    assert 2 < sum(cut is None for cut in expected) < 22


@pytest.mark.ci_slow
def test_a_stop_string_saves_the_rest(monkeypatch):
    monkeypatch.setattr(batch, "CHECK_EVERY", 8)
    lm = make_lm(tokenizer=LETTERS)
    text = lm.generate(length=CONTEXT, **NO_END)[0].text
    sample, = lm.generate(length=CONTEXT, stop=[text[1]], **NO_END)
    assert (sample.stop, sample.text) == ("string", text[:text.index(text[1])]) and sample.nfe == 8


@pytest.mark.ci_slow
def test_a_stop_string_behind_the_wanted_length_is_none():
    lm = make_lm(tokenizer=LETTERS)
    whole, cut = (lm.generate(num=8, length=length, **NO_END) for length in (12, 10))
    stop = [sample.text[9:] for sample in whole]
    for sample, plain in zip(lm.generate(num=8, length=10, stop=stop, **NO_END), cut, strict=True):
        assert sample == plain or (sample.stop == "string" and sample.text != plain.text)


class Pairs:
    """A tokenizer whose tokens are two letters each."""

    mask_id, end_id = MASK, END

    def encode(self, text):
        return LETTERS.encode(text[::2])

    def decode(self, ids):
        return "".join(2 * LETTERS.decode([i]) for i in ids)


def test_a_stop_string_inside_a_token():
    """The text is cut inside, the tokens are those that lie wholly before."""
    lm = make_lm(tokenizer=Pairs())
    cut = generation.postprocess(lm, make_options(stop=["ab"]), [2, 0, 1, 0], 4, "length")
    assert cut == generation.Sample("cca", [2], 4, "string")
    both = generation.postprocess(lm, make_options(stop=["bb", "ca"]), [2, 0, 1, END], 4, "end")
    assert both == generation.Sample("c", [], 4, "string")


@pytest.mark.ci_slow
def test_ends_and_lengths():
    """10 tokens in blocks of 4: an end in the last two places of the last block ends nothing."""
    lm, options = make_lm(tokenizer=LETTERS), {"num": 40, "length": 10}
    samples = lm.generate(**options)
    assert {sample.stop for sample in samples} == {"end", "length"}
    assert all((len(sample.tokens) == 10) == (sample.stop == "length") for sample in samples)
    later = lm.generate(**options, min_length=6)
    assert all(len(sample.tokens) >= 6 for sample in later) and {sample.stop for sample in later} == {"end", "length"}
    assert any(sample.stop == "end" and len(sample.tokens) < 6 for sample in samples)
    without = lm.generate(**options, forbidden=[END, 0, 1])
    assert all(sample.stop == "length" and not {0, 1, END} & set(sample.tokens) for sample in without)


@pytest.mark.ci_slow
def test_short_texts_do_not_mind_the_window():
    lm = make_lm(tokenizer=LETTERS)
    options = {"num": 4, "length": CONTEXT, "seed": 2, **NO_END}
    assert lm.generate(**options, window=True) == lm.generate(**options)


@pytest.mark.ci_slow
@pytest.mark.parametrize("objective, prompt", [(masked(4), 70), (AR(bos=True), 70)])
def test_texts_longer_than_the_context(objective, prompt):
    """What is longer than the window allows is the same text further on; prompts may be longer than the window."""
    lm, prompt = make_lm(objective, tokenizer=LETTERS), make_ids(prompt).tolist()
    shorter, longer = (lm.generate([prompt] * 2, length=length, window=True, **NO_END)[1] for length in (101, 150))
    assert len(longer.tokens) == 150 - len(prompt) and longer.stop == "length"
    assert longer.tokens[:101 - len(prompt)] == shorter.tokens and MASK not in longer.tokens
    assert longer.nfe >= len(longer.tokens)


class Turns:
    """In place of the loop: notes what is given in each turn and writes the position in the row, modulo 11."""

    def __init__(self, stop=None):
        self.calls, self.at, self.stop = [], 0, stop

    def __call__(self, lm, options, rows: Rows, turn):
        size = rows.tokens.shape[1]
        self.calls.append(Rows(*map(np.copy, rows)))  # what is known grows afterwards
        at = turn * (size // 2)
        wanted = ~rows.given & (np.arange(size) < rows.length[:, None])
        tokens = np.where(rows.given, rows.tokens, (at + np.arange(size)) % 11)
        stopped = np.where(wanted.any(1), np.where((self.stop == turn), STOPS.index("entropy"), 0), 0)
        return tokens, stopped, wanted.sum(1)


def slide(monkeypatch, prompts, length, turns):
    monkeypatch.setattr(generation, "_write_rows", turns)
    lm = make_lm(masked(CONTEXT), tokenizer=LETTERS)
    ids = [(np.arange(count) % 11).tolist() for count in prompts]
    return lm.generate(ids, length=length, window=True)


@pytest.mark.parametrize("length", [24, 25, 36, 60, 67])
def test_the_canvas_slides_by_half(monkeypatch, length):
    """Every position is written once, in the first turn that holds it, with all before it in the canvas given."""
    monkeypatch.setattr(LETTERS, "end_id", -1, raising=False)
    monkeypatch.setattr(type(LETTERS), "end_id", -1)
    prompts, turns = [1, 7, 12, 23], Turns()
    samples = slide(monkeypatch, prompts, length, turns)
    for prompt, sample in zip(prompts, samples):
        assert sample.tokens == [i % 11 for i in range(prompt, length)]
        assert (sample.nfe, sample.stop) == (length - prompt, "length")
    assert len(turns.calls) == 1 + max(0, -(-(length - CONTEXT) // 12))
    for turn, rows in enumerate(turns.calls):
        assert rows.tokens.shape == (4, CONTEXT)
        place = turn * 12 + np.arange(CONTEXT)
        for i, prompt in enumerate(prompts):
            if rows.length[i]:
                known = place < max(prompt, 12 + turn * 12 if turn else 0)
                np.testing.assert_array_equal(rows.given[i], known)
                np.testing.assert_array_equal(rows.tokens[i][known], place[known] % 11)
                assert rows.length[i] == length - turn * 12


def test_a_row_that_stopped_is_left_alone_when_the_canvas_slides(monkeypatch):
    """Its text ends where its canvas ended."""
    monkeypatch.setattr(type(LETTERS), "end_id", -1)
    turns = Turns(stop=1)
    sample, = slide(monkeypatch, [5], 80, turns)
    assert sample.tokens == [i % 11 for i in range(5, 36)] and sample.stop == "entropy"
    assert len([rows for rows in turns.calls if rows.length[0] > 0]) == 2


@pytest.mark.ci_slow
def test_a_bidirectional_model_writes_long_texts():
    lm = make_lm(masked(CONTEXT), tokenizer=LETTERS)
    options = {"length": 41, "window": True, "sampler": "ancestral", "steps": 3, **NO_END}
    prompts = [make_ids(5).tolist(), make_ids(30).tolist()]
    both = lm.generate(prompts, **options)
    assert [len(sample.tokens) for sample in both] == [36, 11]
    assert all(sample.stop == "length" and MASK not in sample.tokens for sample in both)
    assert lm.generate(prompts[:1], **options) == both[:1]
    first = lm.generate(prompts[:1], **{**options, "length": CONTEXT})
    assert both[0].tokens[:CONTEXT - 5] == first[0].tokens


@pytest.mark.ci_slow
def test_a_text_without_entropy_is_given_up(monkeypatch):
    """Also when the canvas slides: nothing is behind the last token that was written."""
    monkeypatch.setattr(loop, "ENTROPY_TOKENS", 16)
    never = list(range(1, 12))
    block = make_lm(tokenizer=LETTERS)
    block = with_context(block, 64)  # a model of its own, compiled with the smaller number
    sample, = block.generate(length=40, forbidden=never, min_entropy=1.0)
    assert (sample.stop, sample.tokens, sample.nfe) == ("entropy", [0] * 16, 16)
    assert block.generate(length=12, forbidden=never, min_entropy=1.0)[0].stop == "length"
    sliding = with_context(make_lm(masked(CONTEXT), tokenizer=LETTERS), CONTEXT)
    sample, = sliding.generate(length=60, forbidden=never, min_entropy=1.0, window=True, sampler="ancestral", steps=2)
    assert (sample.stop, sample.tokens) == ("entropy", [0] * CONTEXT)


@pytest.mark.ci_slow
def test_a_small_cache_writes_almost_the_same():
    lm = make_lm(tokenizer=LETTERS)
    options = {"num": 8, "length": CONTEXT, **NO_END}
    exact, rounded = lm.generate(**options), lm.generate(**options, cache_dtype="int8")
    assert np.mean([np.equal(a.tokens, b.tokens).mean() for a, b in zip(exact, rounded)]) > 0.7


@pytest.mark.ci_slow
def test_guidance_asks_twice():
    """2 and 8 places in the last blocks; the text becomes another one."""
    lm = make_lm(tokenizer=LETTERS)
    options = {"prompts": ["abcabc"], "num": 8, "length": 14, **NO_END}
    plain, guided = lm.generate(**options), lm.generate(**options, guidance=3.0)
    assert {sample.nfe for sample in plain} == {10} and {sample.nfe for sample in guided} == {20}
    assert [sample.tokens for sample in plain] != [sample.tokens for sample in guided]


@pytest.mark.ci_slow
def test_more_rows_than_a_batch(monkeypatch):
    lm = make_lm(tokenizer=LETTERS)
    together = lm.generate(num=5, length=8)
    monkeypatch.setattr(generation, "ROWS", 2)
    assert lm.generate(num=5, length=8) == together


@pytest.mark.ci_slow
def test_a_bidirectional_model_writes_short_texts_in_stretches():
    """Half a canvas at a time, and the same text in other company."""
    lm = make_lm(masked(CONTEXT), tokenizer=LETTERS)
    options = {"length": 18, "sampler": "confidence", "steps": 6, "block_size": 12, "seed": 4, **NO_END}
    alone, = lm.generate(["abcd"], **options)
    assert len(alone.tokens) == 14 and MASK not in alone.tokens and alone.nfe == 12
    assert lm.generate(["abcd", "a", "abcdabcdabcdabcd"], **options)[0] == alone

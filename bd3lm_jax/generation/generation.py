"""Writing texts with a language model: batches of rows, the compiled loop over each, stops; `sampling/` does the
drawing."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax.core import jax_settings
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data.texts import decode_continuation
from bd3lm_jax.generation.approximate_cache import ApproximateDenoiser
from bd3lm_jax.generation.compatibility import ALL_SAMPLERS
from bd3lm_jax.generation.constraints import automaton
from bd3lm_jax.generation.denoise import (
    AutoSizeDenoiser,
    BlockDenoiser,
    CausalDenoiser,
    GuidedDenoiser,
    ShiftedDenoiser,
)
from bd3lm_jax.generation.options import Options, check_options
from bd3lm_jax.generation.prompts import BUCKET, Rows, align_to_windows, encode_prompts, prompt_rows
from bd3lm_jax.generation.sampling import (
    STOPS,
    DenoiserContext,
    Progress,
    Request,
    Settings,
    auto_size,
    run_blocks,
    simplex,
    start,
)
from bd3lm_jax.generation.sampling.constraint import Constraint, best_block, sample_block
from bd3lm_jax.models.trunk import unstack_layers
from bd3lm_jax.scoring import target_shift

ROWS = 64  # rows a batch at most; fewer are padded to a power of two
CHECK_EVERY = 32  # tokens between two looks for stop strings


class Sample(NamedTuple):
    """text and tokens are the new ones, without prompt, end token and stop string; stop: why it ended, "end" (end
    token), "length", "string" or "entropy". nfe: network calls."""

    text: str | None
    tokens: list[int]
    nfe: int
    stop: str


def generate(lm, prompts: Sequence | None, num: int, length: int, options: Options) -> list[Sample]:
    """`num` texts of each prompt, `length` tokens with the prompt; see `LM.generate`."""
    check_options(lm, options)
    prompts = encode_prompts(lm, prompts, num, length, options.window)
    rows = prompt_rows(lm, prompts, length, options)
    starts = [len(prompt) for prompt in prompts]
    tokens, stopped, nfe = fill_rows(lm, options, rows)
    return [postprocess(lm, options, row[begin:length], int(calls), STOPS[code], row[:begin])
            for row, begin, calls, code in zip(tokens, starts, nfe, stopped)]


def fill_rows(lm, options: Options, rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fill what is not given -> tokens `[B, L]`, stopped `[B]` (an index of STOPS), nfe `[B]`, in batches."""
    parts = [_write_batch(lm, options, Rows(*(x[first:first + ROWS] for x in rows)))
             for first in range(0, len(rows.tokens), ROWS)]
    tokens, stopped, nfe = (np.concatenate(part) for part in zip(*parts))
    return tokens, stopped, nfe * (2 if options.guidance else 1)


def _write_batch(lm, options: Options, rows: Rows):
    count = len(rows.tokens)
    padding = (1 << (count - 1).bit_length()) - count
    rows = Rows(*(np.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)) for x in rows))  # spare rows want 0 tokens
    if lm.is_bidirectional and rows.tokens.shape[1] > lm.config.block_size:
        if options.constraint is not None:
            raise UserError(f"a constraint works within {lm.config.block_size} tokens, all that this model sees")
        result = _sliding_window(lm, options, rows)
    else:
        result = _write_rows(lm, options, rows, 0)
    return tuple(x[:count] for x in result)


def _write_rows(lm, options: Options, rows: Rows, window_index: int):
    """One pass of the loop over the blocks of the rows; between stretches of blocks a look for stop strings (blocks of
    chosen sizes: `postprocess` alone looks for them)."""
    places = rows.tokens.shape[1]
    rows, lead_B = align_to_windows(rows, options)
    job = begin(lm, options, rows, window_index)
    size = job.plan.settings.block_size
    progress, blocks = job.progress, rows.tokens.shape[1] // size
    if job.plan.sizes is not None:
        progress = job.run(progress, rows.tokens.shape[1] // job.plan.sizes.sizes[0])
        progress = progress._replace(tokens=progress.tokens[:, :rows.tokens.shape[1]])
    elif not options.stop:
        progress = job.run(progress, blocks)
    else:
        for until in range(job.first_block, blocks + CHECK_EVERY, max(1, CHECK_EVERY // size)):
            progress = job.run(progress, min(until, blocks))
            progress = _stop_at_strings(lm, options, rows, progress, size)
    tokens = np.take_along_axis(np.asarray(progress.tokens), lead_B[:, None] + np.arange(places), axis=1)
    return tokens, np.asarray(progress.stopped), np.asarray(progress.nfe)


def _stop_at_strings(lm, options: Options, rows: Rows, progress: Progress, size: int) -> Progress:
    """Rows whose new text holds a stop string in finished blocks of `size` write no more; `postprocess` cuts them."""
    tokens, stopped = np.asarray(progress.tokens), np.array(progress.stopped)
    for i in np.flatnonzero((stopped == 0) & (rows.length > 0)):
        first = int(np.argmin(rows.given[i]))
        new = tokens[i, first:min(rows.length[i], int(progress.block) * size)]
        text = decode_continuation(lm.tokenizer, tokens[i, :first], new[new != lm.special.mask])
        if any(string in text for string in options.stop):
            stopped[i] = STOPS.index("end")
    return progress._replace(stopped=jnp.asarray(stopped))


def _sliding_window(lm, options: Options, rows: Rows):
    """A bidirectional model beyond its length: the canvas moves by half, given what was written in the other half."""
    size, stride = lm.config.block_size, lm.config.block_size // 2
    padding = ((0, 0), (0, size))  # so that the last canvas is whole
    given = np.pad(rows.given, padding)
    tokens = np.where(given, np.pad(rows.tokens, padding), lm.special.mask)
    stopped, nfe = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), np.int32)
    for window_index, at in enumerate(range(0, max(int(rows.length.max()) - stride, 1), stride)):
        canvas = np.s_[:, at:at + size]
        length = np.where(stopped > 0, 0, np.maximum(rows.length - at, 0)).astype(np.int32)
        is_writing = (~given[canvas] & (np.arange(size) < length[:, None])).any(1)
        part = Rows(tokens[canvas], given[canvas], length * is_writing, rows.earliest_end - at, rows.number)
        written, part_stopped, part_nfe = _write_rows(lm, options, part, window_index)
        tokens[canvas] = np.where(is_writing[:, None], written, tokens[canvas])
        given[canvas] |= is_writing[:, None]
        stopped, nfe = np.where(is_writing, part_stopped, stopped), nfe + part_nfe
    return tokens[:, :-size], stopped, nfe


class BatchLoop(NamedTuple):
    """One batch in the loop. `run(progress, until)` writes blocks up to index `until`; `progress` is given away."""

    progress: Progress
    run: Callable
    request: Request
    plan: "Plan"
    first_block: int


class Plan(NamedTuple):
    """What a compiled program depends on besides shapes."""

    sampler: str
    settings: Settings
    slots: int
    cache_dtype: str
    approximate_cache: str
    guided: bool
    levels: simplex.Simplex | None = None
    sizes: auto_size.Sizes | None = None


def begin(lm, options: Options, rows: Rows, window_index: int) -> BatchLoop:
    """The rows ready for the loop, prompts in the cache. turn: of a sliding canvas, keys its noise."""
    plan = make_plan(lm, options, rows.tokens.shape[1])
    size = plan.settings.block_size
    to_fill = ~rows.given & (np.arange(rows.given.shape[1]) < rows.length[:, None])
    first_block = int(np.argmax(to_fill.any(0))) // size
    if plan.sizes is None:
        stored = make_denoiser(lm, plan).num_prefilled(first_block)
    else:
        stored = int(np.cumprod(rows.given, axis=1).sum(1).max())
    origin = -(-max(stored - plan.slots, 0) // size) * size
    prefill = min(plan.slots, -(-stored // BUCKET) * BUCKET)
    request = make_request(lm, options, rows, window_index)
    scalars = (np.int32(first_block), np.int32(stored), np.int32(origin), np.float32(options.guidance))
    programs = lm.__dict__.setdefault("_programs", {})  # jitted once, compiled once per plan and shapes
    if not programs:
        programs["start"] = jax.jit(functools.partial(_start, lm), static_argnums=(0, 1))
        programs["run"] = jax.jit(functools.partial(_run, lm), static_argnums=0, donate_argnums=4)
    progress = programs["start"](plan, prefill, lm.params, request, rows.tokens, *scalars)
    run = functools.partial(programs["run"], plan, lm.params, request, scalars[-1])
    return BatchLoop(progress, lambda progress, until: run(progress, np.int32(until)), request, plan, first_block)


def make_plan(lm, options: Options, row_length: int) -> Plan:
    """Static choices; a sliding window keeps as much context as the model was trained with."""
    sampler, size, sizes = ALL_SAMPLERS[options.sampler], lm.config.block_size, None
    if options.block_size == auto_size.AUTO:
        sizes = auto_size.Sizes(lm.config.trained_block_sizes, options.block_confidence)
        size = sizes.sizes[-1]
    window = size if sizes else min(options.block_size or size, size)
    draw_all = None
    if options.constraint is not None:
        draw_all = sample_block if options.temperature else best_block
    settings = Settings(block_size=window if options.approximate_cache else size, window=window,
                        steps=options.steps or sampler.steps or window, filters=options.filters,
                        mask_id=lm.special.mask, end_id=lm.special.end,
                        min_entropy=options.min_entropy, draw_all=draw_all)
    beginning = lm.config.diffusion.causal and lm.config.diffusion.bos  # takes a slot of its own
    ring = max((lm.context // size - 1) * size, size) + beginning
    slots = min(row_length, ring) if options.window else row_length + (size if sizes else 0)
    levels = simplex.levels(lm.config.diffusion, settings.steps) if options.sampler == simplex.NAME else None
    return Plan(options.sampler, settings, slots, options.cache_dtype, options.approximate_cache,
                bool(options.guidance), levels, sizes)


def make_denoiser(lm, plan: Plan):
    objective = lm.config.diffusion
    if objective.causal:
        return CausalDenoiser(lm.model, plan.slots, plan.cache_dtype, objective.bos, lm.special.end)
    form = target_shift.target_shift_of(lm.config.model)
    if form and (plan.approximate_cache or plan.sizes):
        what = "approximate_cache" if plan.approximate_cache else f"block_size='{auto_size.AUTO}'"
        raise UserError(f"{what} is not there for networks with model.target_shift='{form}': leave it out")
    if plan.sizes is not None:
        return AutoSizeDenoiser(lm.model, plan.settings.block_size, plan.slots, plan.cache_dtype, objective.sigma_max)
    if plan.approximate_cache:
        return ApproximateDenoiser(lm.model, plan.settings.window, plan.slots, plan.approximate_cache,
                                   plan.settings.mask_id, plan.cache_dtype, objective.sigma_max)
    denoiser = BlockDenoiser(lm.model, plan.settings.block_size, plan.slots, plan.cache_dtype, objective.sigma_max)
    return ShiftedDenoiser(denoiser, form, lm.special.end) if form else denoiser


def make_request(lm, options: Options, rows: Rows, window_index: int) -> Request:
    forbidden = np.zeros(lm.config.model.vocab_size, bool)
    forbidden[[i for i in (lm.special.mask, *options.forbidden) if i >= 0]] = True  # -1: no such token
    threshold = ALL_SAMPLERS[options.sampler].threshold if options.threshold is None else options.threshold
    key = jax.random.fold_in(jax_settings.key(options.seed),
                             window_index) if window_index else jax_settings.key(options.seed)
    keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(jnp.asarray(rows.number))
    constraint = None
    if options.constraint is not None:
        available = [length - given[:length].sum() for length, given in zip(rows.length, rows.given) if length]
        constraint = Constraint(automaton.build(options.constraint, lm.tokenizer, len(forbidden), available,
                                                options.forbidden))
    return Request(keys, rows.given, rows.length, rows.earliest_end, forbidden, np.float32(threshold), constraint)


def make_denoiser_context(lm, plan: Plan, params, request: Request, guidance) -> DenoiserContext:
    """The network as the loop asks it."""
    denoise = functools.partial(make_denoiser(lm, plan), unstack_layers(lm.model, params))
    if plan.guided:
        denoise = GuidedDenoiser(denoise, guidance, request.given, plan.settings.mask_id)
    return DenoiserContext(denoise, ALL_SAMPLERS[plan.sampler], plan.settings)


def _start(lm, plan: Plan, prefill: int, params, request: Request, tokens_BxL, first_block, stored, origin, guidance):
    denoiser = make_denoiser(lm, plan)
    ids = jnp.where(request.given, tokens_BxL, plan.settings.mask_id)
    if plan.sizes is not None:
        beginning = jnp.cumprod(request.given, axis=1)[:, :prefill] > 0
        return auto_size.first(request, tokens_BxL, plan.settings,
                               denoiser.prefill(params, ids[:, :prefill], beginning))
    if lm.config.diffusion.causal and lm.config.diffusion.bos:
        ids = jnp.pad(ids, ((0, 0), (1, 0)), constant_values=lm.special.end)
    ids = jax.lax.dynamic_slice_in_dim(ids, origin, prefill, axis=1)
    real = jnp.broadcast_to(origin + jnp.arange(prefill) < stored, ids.shape)
    if plan.guided:
        ids, real = jnp.concatenate([ids, ids]), jnp.concatenate([real, jnp.zeros_like(real)])
    cache = denoiser.prefill(params, ids, real, origin)
    return start(make_denoiser_context(lm, plan, params, request, guidance), request, tokens_BxL, first_block, cache)


def _run(lm, plan: Plan, params, request: Request, guidance, progress: Progress, until) -> Progress:
    denoiser_context = make_denoiser_context(lm, plan, params, request, guidance)
    if plan.sizes is not None:
        return auto_size.run_blocks(plan.sizes, auto_size.AutoSizeContext(*denoiser_context), request, progress, until)
    if plan.levels is not None:
        return simplex.run_blocks(plan.levels, denoiser_context, request, progress, until)
    return run_blocks(denoiser_context, request, progress, until)


def postprocess(lm, options: Options, new, nfe: int, stop: str, before=()) -> Sample:
    """The sample of the new tokens `[n]` behind the tokens `before`: cut at an end token or stop string, and where
    nothing was written."""
    new = np.asarray(new)
    stop = "length" if stop == "end" else stop  # an end token behind the last wanted place ends nothing
    ends = np.flatnonzero((new == lm.special.end) | (new == lm.special.mask))
    if len(ends):
        stop = "end" if new[ends[0]] == lm.special.end else stop
        new = new[:ends[0]]
    text = None if lm.tokenizer is None else decode_continuation(lm.tokenizer, before, new)
    places = [text.index(string) for string in options.stop if string in text]
    if places:
        text, stop = text[:min(places)], "string"
        while len(decode_continuation(lm.tokenizer, before, new)) > len(text):
            new = new[:-1]
    return Sample(text, new.tolist(), nfe, stop)

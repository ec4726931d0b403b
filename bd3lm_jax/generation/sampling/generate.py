"""The one sampling loop: blocks left to right, reveal steps inside, an exact cache across; compiled as a whole.

It knows the network only as
    denoise(canvas_BxS, block, finished, positions_BxP, level_B, cache) -> logits_BxPxV, cache
(finished: the block just before, whose keys and values this call stores; None when they are stored already), so that a
test can pass a table of probabilities. Rows do not influence each other: randomness is keyed by (seed, request, block,
call, position), and every row has its own clock and stop.

`run_blocks` is the loop. Who wants to look inside a block drives the same three functions from outside: `open_block`,
`reveal`, `close_block`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bd3lm_jax.core.ranking import fast_argmax
from bd3lm_jax.generation.sampling.filters import Filters, apply_repetition_penalty, filter_logits, sample_categorical
from bd3lm_jax.generation.sampling.steps import Plan, Row, Sampler, TokenStats

STOPS = ("length", "end", "entropy")  # by the code in `Progress.stopped`; 0 also means: still writing
INITIAL_CANVAS = 2**32 - 1  # in the place of a step's number: keys a canvas of letters before the first one
ENTROPY_TOKENS = 256  # the entropy test looks at so many last tokens (BD3-LM section 5.3)


class Settings(NamedTuple):
    """Static settings of a compiled sampler.

    window: tokens are revealed in stretches of so many positions, left to right from the end of what is given at the
    beginning of the block; the last one may be shorter. steps:
    grid of a window, for samplers that have one. min_entropy: nats below which a text is given up, or None. end_id: -1
    if there is none. draw_all: what draws a whole block jointly (see `sampling/constraint.py`), or None: every token
    on its own.
    """

    block_size: int
    window: int
    steps: int
    filters: Filters
    mask_id: int
    end_id: int
    min_entropy: float | None = None
    draw_all: Callable | None = None


class Request(NamedTuple):
    """What the rows of one batch ask for.

    keys: a typed key a row. given `[B, L]` bool: tokens that stay as they are. length `[B]`: tokens wanted, given ones
    included. earliest_end `[B]`: no end token before this position. forbidden `[V]` bool: tokens never drawn.
    threshold: the sampler's number. constraint: for `Settings.draw_all`.
    """

    keys: jax.Array
    given: jax.Array
    length: jax.Array
    earliest_end: jax.Array
    forbidden: jax.Array
    threshold: jax.Array | float
    constraint: Any = None


class Progress(NamedTuple):
    """block: the next to be written. tokens `[B, L]`, masks where nothing is written yet. stopped int32 `[B]`: 0, or
    why the row is done (an index of STOPS). nfe int32 `[B]`: network calls that wrote something in the row. state:
    that of the constraint."""

    block: jax.Array
    tokens: jax.Array
    stopped: jax.Array
    nfe: jax.Array
    cache: Any
    state: Any = None


class PreviousBlock(NamedTuple):
    """The block before, `[B, S]` ids, and which of its tokens are real (none before the first block)."""

    ids: jax.Array
    real: jax.Array


class Block(NamedTuple):
    """A block being written: canvas and masked `[B, S]`; confidence `[B, S]` of its tokens when they were drawn; level
    and index `[B]` of the row's clock in its window; calls: steps since the block was opened; open `[B]` bool: rows
    that write in this block."""

    canvas: jax.Array
    masked: jax.Array
    open: jax.Array
    confidence: jax.Array
    level: jax.Array
    index: jax.Array
    nfe: jax.Array
    calls: jax.Array


class DenoiserContext(NamedTuple):
    """How a loop asks its network: the pieces that stay the same."""

    denoise: Callable
    sampler: Sampler
    settings: Settings


def start(context: DenoiserContext, request: Request, tokens_BxL, first_block, cache) -> Progress:
    """Before anything is written. L is a multiple of the block size. first_block: the first that is not wholly given
    in every row; the blocks before its predecessor must be in the cache already."""
    batch = tokens_BxL.shape[0]
    zeros = jnp.zeros(batch, jnp.int32)
    state = None if request.constraint is None else request.constraint.start(batch)
    tokens = jnp.where(request.given, tokens_BxL, context.settings.mask_id)
    return Progress(jnp.asarray(first_block, jnp.int32), tokens, zeros, zeros, cache, state)


def run_blocks(context: DenoiserContext, request: Request, progress: Progress, until) -> Progress:
    """Write blocks up to the index `until`, or until every row has stopped. One program, nothing on the host."""
    sampler, size = context.sampler, context.settings.block_size

    has_fixed_calls = not (sampler.may_skip_forward or sampler.can_remask or sampler.posterior
                           or sampler.predicts_scores)  # S calls a block at most

    def body(progress: Progress) -> Progress:
        keys = None
        # those of all calls at once: on a CPU deriving a key takes long, deriving many hardly longer
        if has_fixed_calls:
            keys = jax.vmap(lambda calls: _call_keys(request, progress, calls))(jnp.arange(size))
        block, cache = open_block(context, request, progress, keys)
        if size > 1 or not has_fixed_calls:  # else the opening call revealed the whole block
            block = jax.lax.while_loop(lambda block: writing(sampler, context.settings, block).any(),
                                       lambda block: reveal(context, request, progress, block, cache, keys), block)
        return close_block(context, request, progress, block, cache)

    return jax.lax.while_loop(lambda p: (p.block < until) & ~done(context, request, p).all(), body, progress)


def done(context: DenoiserContext, request: Request, progress: Progress):
    """Rows that have nothing left to write, bool `[B]`."""
    return (progress.stopped > 0) | (progress.block * context.settings.block_size >= request.length)


def open_block(context: DenoiserContext, request: Request, progress: Progress, keys=None) -> tuple[Block, Any]:
    """The next block after its first step, whose network call stores the block before; and the cache. keys: of the
    block's calls, where they are derived already."""
    settings, at = context.settings, progress.block
    given = _block_slice(settings, request.given, at)
    masked = ~given & ~done(context, request, progress)[:, None]
    zeros = jnp.zeros_like(progress.nfe)
    canvas = _block_slice(settings, progress.tokens, at)
    if context.sampler.posterior is not None:
        canvas = jnp.where(masked, _random_tokens(request, at, canvas.shape[1]), canvas)
    block = Block(canvas, masked, masked.any(-1), jnp.ones(masked.shape),
                  jnp.ones(zeros.shape), zeros, progress.nfe, jnp.zeros((), jnp.int32))
    before = _block_slice(settings, progress.tokens, jnp.maximum(at - 1, 0))
    previous = PreviousBlock(before, jnp.broadcast_to(at > 0, before.shape))
    return _step(context, request, progress, block, previous, progress.cache, keys)


def writing(sampler: Sampler, settings: Settings, block: Block):
    """Rows whose block is not finished, bool `[B]`: a mask is left, or steps of a sampler that may mask again."""
    left = block.masked.any(-1)
    return left | (block.open & (block.index < settings.steps)) if sampler.can_remask else left


def reveal(context: DenoiserContext, request: Request, progress: Progress, block: Block, cache, keys=None) -> Block:
    """One more step of every row. keys as in `open_block`."""
    return _step(context, request, progress, block, None, cache, keys)[0]


def close_block(context: DenoiserContext, request: Request, progress: Progress, block: Block, cache) -> Progress:
    """The finished block put in its place; rows that meet a stop are done."""
    settings, at = context.settings, progress.block
    new = ~_block_slice(settings, request.given, at) & ~done(context, request, progress)[:, None]
    stopped = jnp.where(((block.canvas == settings.end_id) & new).any(-1), STOPS.index("end"), progress.stopped)
    canvas = jnp.where(done(context, request, progress)[:, None], _block_slice(settings, progress.tokens, at),
                       block.canvas)
    tokens = jax.lax.dynamic_update_slice_in_dim(progress.tokens, canvas, at * settings.block_size, axis=1)
    if settings.min_entropy is not None and tokens.shape[1] >= ENTROPY_TOKENS:
        low = _low_entropy(settings, tokens, (at + 1) * settings.block_size) & new.any(-1)
        stopped = jnp.where((stopped == 0) & low, STOPS.index("entropy"), stopped)
    state = progress.state
    if request.constraint is not None:
        state = request.constraint.advance(state, canvas, new)
    return Progress(at + 1, tokens, stopped, block.nfe, cache, state)


def _call_keys(request: Request, progress: Progress, calls):
    """Keys of one call, `[2, B]`: for the plan, for the tokens."""
    return jax.vmap(lambda key: jax.random.split(jax.random.fold_in(jax.random.fold_in(key, progress.block), calls)),
                    out_axes=1)(request.keys)


def _step(context: DenoiserContext, request: Request, progress: Progress, block: Block, previous, cache, keys_Sx2xB):
    """One step of every row -> block, cache. `previous` as the network takes it. keys: of each call, or None."""
    settings, sampler = context.settings, context.sampler
    keys = _call_keys(request, progress, block.calls) if keys_Sx2xB is None else keys_Sx2xB[block.calls]
    plan_keys, draw_keys = keys
    given = _block_slice(settings, request.given, progress.block)
    window = _window(settings, block.masked, given)
    written = (window & ~block.masked & ~given
               & writing(sampler, settings, block)[:, None])
    rows = Row(window & block.masked, written, block.confidence, block.level, block.index)
    plan = jax.vmap(lambda key, row: sampler.plan(key, row, settings.steps, request.threshold))(plan_keys, rows)
    positions_BxP = _positions(context, plan.reveal, window)
    whole = settings.window == settings.block_size
    level = plan.level if whole else jnp.mean(block.masked, axis=1, dtype=jnp.float32)

    def ask(cache):
        logits, cache = context.denoise(block.canvas, progress.block, previous, positions_BxP, level, cache)
        return _draw(context, request, progress, block, draw_keys, plan, positions_BxP, logits), cache

    if previous is None and sampler.may_skip_forward:  # a step that reveals nothing needs no network
        no_stats = TokenStats(*[jnp.zeros(positions_BxP.shape)] * (5 if sampler.predicts_scores else 3))
        drawn, stats = jax.lax.cond(plan.reveal.any(), lambda: ask(cache)[0],
                                    lambda: (jnp.zeros_like(positions_BxP), no_stats))
    else:
        (drawn, stats), cache = ask(cache)
    places = jnp.arange(positions_BxP.shape[0])[:, None], positions_BxP
    stats = jax.tree.map(lambda x: jnp.zeros(block.canvas.shape).at[places].set(x), stats)
    revealed = plan.reveal
    if sampler.choose is not None:
        revealed = jax.vmap(lambda row, planned, stats: sampler.choose(row, planned, stats, settings.steps,
                                                                       request.threshold))(rows, plan.reveal, stats)
    canvas = jnp.where(revealed, block.canvas.at[places].set(drawn), block.canvas)
    masked = (block.masked & ~revealed) | plan.remask
    same_window = (_window(settings, masked, given) == window).all(-1)  # a new window starts its clock anew
    if sampler.posterior is None:
        canvas = jnp.where(plan.remask, settings.mask_id, canvas)
    return Block(canvas, masked, block.open,
                 jnp.where(revealed, stats.confidence, block.confidence), jnp.where(same_window, plan.next_level, 1.0),
                 jnp.where(same_window, block.index + 1, 0), block.nfe + plan.reveal.any(-1), block.calls + 1), cache


def _draw(context: DenoiserContext, request: Request, progress: Progress, block: Block, keys_B, plan: Plan,
          positions_BxP,
          logits_BxPxV):
    """A token for every asked position, its noise keyed by the position, and what the network said of it."""
    settings = context.settings
    vocab = jnp.arange(logits_BxPxV.shape[-1])
    at = progress.block * settings.block_size + positions_BxP
    too_early = (at < request.earliest_end[:, None])[..., None] & (vocab == settings.end_id)
    excluded = request.forbidden | too_early
    current_tokens = jnp.take_along_axis(block.canvas, positions_BxP, axis=1)
    logits = filter_input = logits_BxPxV.astype(jnp.float32)
    if context.sampler.log_distributions is not None:  # what filters go by, and what remains of it is drawn from
        one_row = jax.vmap(context.sampler.log_distributions, (0, 0, None, None))
        filter_input, logits = jax.vmap(one_row, (0, 0, None, 0))(logits, current_tokens, ~request.forbidden,
                                                                  plan.level)
    logits, filter_input = (jnp.where(excluded, -jnp.inf, x) for x in (logits, filter_input))
    log_total = jax.nn.logsumexp(logits, axis=-1) - jnp.log(vocab.shape[0] - 1)
    if settings.filters.repetition_penalty != 1:
        present = _tokens_present(context, request, progress, block, vocab)[:, None]
        logits, filter_input = (apply_repetition_penalty(x, present, settings.filters.repetition_penalty)
                                for x in (logits, filter_input))
    flat = logits.reshape(-1, logits.shape[-1])
    filtered = filter_logits(filter_input.reshape(flat.shape), settings.filters).reshape(logits.shape)
    if context.sampler.log_distributions is not None:
        left = jnp.where(filtered == -jnp.inf, -jnp.inf, logits / (settings.filters.temperature or 1.0))
        filtered = jnp.where((left == -jnp.inf).all(-1, keepdims=True), filtered, left)
    if context.sampler.posterior is not None:
        one_row = jax.vmap(context.sampler.posterior, (0, 0, None, None, None))
        filtered = jax.vmap(one_row, (0, 0, None, 0, 0))(filtered, current_tokens, ~request.forbidden, plan.level,
                                                         plan.next_level)
    keys = jax.vmap(lambda key, at: jax.vmap(lambda p: jax.random.fold_in(key, p))(at))(keys_B, positions_BxP)
    if settings.draw_all is None:
        drawn = sample_categorical(keys.reshape(-1), filtered.reshape(flat.shape)).reshape(positions_BxP.shape)
    else:
        block_inputs = (block.canvas, block.masked, _block_slice(settings, request.given, progress.block),
                        request.length - (progress.block + 1) * settings.block_size)
        drawn = settings.draw_all(request.constraint, progress.state, keys, filtered, logits, *block_inputs)
        if context.sampler.choose is not None:
            logits = request.constraint.marginals(progress.state, logits, *block_inputs)
    stats = _token_stats(logits, drawn, context.sampler.choose is not None)
    if context.sampler.predicts_scores:
        uniform = jax.vmap(jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1))))(keys)
        stats = stats._replace(log_total=log_total, uniform=uniform)
    return drawn, stats


def _random_tokens(request: Request, block, size: int):
    """What a canvas of letters shows before anything is known `[B, S]`."""
    def row(key):
        key = jax.random.fold_in(jax.random.fold_in(key, block), INITIAL_CANVAS)
        keys = jax.vmap(lambda p: jax.random.fold_in(key, p))(jnp.arange(size))
        return sample_categorical(keys, jnp.where(request.forbidden, -jnp.inf, jnp.zeros((size, 1))))
    return jax.vmap(row)(request.keys)


def _token_stats(logits_BxPxV, drawn_BxP, everything: bool) -> TokenStats:
    log_p = jax.nn.log_softmax(logits_BxPxV, axis=-1)
    confidence = jnp.exp(jnp.take_along_axis(log_p, drawn_BxP[..., None], axis=-1)[..., 0])
    if not everything:
        return TokenStats(confidence, confidence, confidence)
    p = jnp.exp(log_p)
    best = fast_argmax(p)[..., None]
    second = jnp.max(jnp.where(jnp.arange(p.shape[-1]) == best, 0.0, p), axis=-1)
    entropy = -jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1)
    return TokenStats(confidence, jnp.max(p, axis=-1) - second, entropy)


def _tokens_present(context: DenoiserContext, request: Request, progress: Progress, block: Block, vocab_V):
    """Which tokens the row holds so far, bool `[B, V]`."""
    tokens = jax.lax.dynamic_update_slice_in_dim(progress.tokens, block.canvas,
                                                 progress.block * context.settings.block_size, axis=1)
    tokens = jnp.where(tokens < 0, context.settings.mask_id, tokens)  # places that are none
    rows = jnp.arange(tokens.shape[0])[:, None]
    return jnp.zeros((tokens.shape[0], vocab_V.shape[0]), bool).at[rows, tokens].set(True)


def _window(settings: Settings, masked_BxS, given_BxS):
    """The stretch of positions, bool `[B, S]`, that holds the first mask."""
    if settings.window == settings.block_size:
        return jnp.ones(masked_BxS.shape, bool)
    start = jnp.cumprod(given_BxS, axis=1).sum(axis=1, keepdims=True)
    first = jnp.argmax(masked_BxS, axis=1, keepdims=True)
    return (jnp.arange(settings.block_size) - start) // settings.window == (first - start) // settings.window


def _positions(context: DenoiserContext, reveal_BxS, window_BxS):
    """What the network's head is asked for, `[B, P]`, each position once: those that the plan reveals where it is
    known to be few (filled up with others), else the window, or the whole block."""
    settings = context.settings
    most = min(context.sampler.most(settings.window, settings.steps), settings.window)
    if settings.draw_all is not None:
        return jnp.broadcast_to(jnp.arange(settings.block_size), reveal_BxS.shape)
    if most == 1:
        return jnp.argmax(reveal_BxS, axis=1)[:, None]
    if most < settings.window:
        return jax.lax.top_k(reveal_BxS.astype(jnp.int32), most)[1]
    first = jnp.minimum(jnp.argmax(window_BxS, axis=1), settings.block_size - settings.window)
    return first[:, None] + jnp.arange(settings.window)


def _block_slice(settings: Settings, x_BxL, block):
    return jax.lax.dynamic_slice_in_dim(x_BxL, block * settings.block_size, settings.block_size, axis=1)


def _low_entropy(settings: Settings, tokens_BxL, end):
    """Whether the last tokens before `end` repeat too much, bool `[B]`; False where there are too few."""
    last = jax.lax.dynamic_slice_in_dim(tokens_BxL, jnp.maximum(end - ENTROPY_TOKENS, 0), ENTROPY_TOKENS, axis=1)
    frequency = jnp.mean(last[:, :, None] == last[:, None], axis=-1, dtype=jnp.float32)
    return (-jnp.mean(jnp.log(frequency), axis=-1) < settings.min_entropy) & (end >= ENTROPY_TOKENS)

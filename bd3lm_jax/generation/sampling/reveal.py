"""Revealing tokens: the transition of masked (and uniform-state) diffusion. Each step plans which positions of a block
become tokens, which become masks again, and at which noise level the network is asked; then it draws.

A `Sampler` is a plan, made before the network runs, and possibly a choice among the planned positions, made from what
the network says. Both are pure functions of one row; `steps.py` has them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.ranking import fast_argmax
from bd3lm_jax.generation.compatibility import changed
from bd3lm_jax.generation.sampling.constraint import make_block_state
from bd3lm_jax.generation.sampling.draw import is_excluded, position_keys, tokens_present
from bd3lm_jax.generation.sampling.filters import apply_repetition_penalty, filter_logits, sample_categorical
from bd3lm_jax.generation.sampling.generate import Block, Frame, PreviousBlock, Settings

INITIAL_CANVAS = 2**32 - 1  # in the place of a step's number: keys a canvas of letters before the first one


class Row(NamedTuple):
    """One row's block before a step.

    masked `[S]` bool: may become tokens now. written `[S]` bool: tokens that this sampler wrote. confidence `[S]`:
    probability of each written token when it was drawn. level: mask probability after the step before. index: steps
    taken so far.
    """

    masked: jax.Array
    written: jax.Array
    confidence: jax.Array
    level: jax.Array
    index: jax.Array


class Plan(NamedTuple):
    """reveal `[S]` bool: positions that become tokens (written ones are redrawn). remask `[S]` bool: positions that are
    masks afterwards. level: mask probability that the network is told, that of the row's clock or, without a clock, the
    part of the window that is masked (`steps.all_masked`). next_level: what the row's clock shows after the step."""

    reveal: jax.Array
    remask: jax.Array
    level: jax.Array
    next_level: jax.Array


class TokenStats(NamedTuple):
    """What the network said of each position `[S]`: probability of the token that was drawn, difference between the
    two likeliest tokens' probabilities, entropy in nats. Of its own law: before temperature and filters. Only for
    samplers that need log scores: log of the total of the tokens' scores times expm1(sigma) (0 for probabilities), and
    a random number in [0, 1) for a choice."""

    confidence: jax.Array
    margin: jax.Array
    entropy: jax.Array
    log_total: Any = None
    uniform: Any = None


class Planner(Protocol):
    """`plan(key, row, steps, threshold) -> Plan`; steps: length of the grid a window, static."""

    def __call__(self, key, row: Row, steps: int, threshold) -> Plan: ...


class Chooser(Protocol):
    """`choose(row, planned [S] bool, stats, steps, threshold) -> reveal [S] bool`, a part of what was planned."""

    def __call__(self, row: Row, planned, stats: TokenStats, steps: int, threshold) -> jax.Array: ...


def one_position(window: int, steps: int) -> int:
    """The most that a step reveals: one position."""
    return 1


def equal_part(window: int, steps: int) -> int:
    """The most that a step reveals: positions over steps, rounded up."""
    return -(-window // steps)


def whole_window(window: int, steps: int) -> int:
    """The most that a step reveals: every position."""
    return window


class Call(NamedTuple):
    """One planned network call: rows and plan (of all rows), the window `[B, S]` bool, the positions `[B, P]` that the
    head is asked for, keys `[B]` of the tokens."""

    rows: Row
    plan: Plan
    window: jax.Array
    positions: jax.Array
    keys: jax.Array


class Sampler(NamedTuple):
    """A transition (see `generate.py`).

    choose: None reveals all that is planned. most(window, steps): positions that a plan reveals at most, for which
    the network's head runs. may_skip_forward: a step may reveal nothing, and then asks nothing. can_remask: written
    tokens may change until the last of `steps`. steps: what is usual, 0: one a position of the window. threshold: what
    is usual. predicts_scores: needs a network that gives log scores. log_distributions: None, or what makes
    log-distributions of them, see `steps.log_probs_from_scores`. posterior: None for samplers that write in the place
    of masks; else the canvas shows letters only, random ones at first, planned positions that are masked again keep
    theirs, and `posterior(logits [V], letter, allowed [V], level, next level)` gives the log-distribution of the next
    one."""

    plan: Planner
    choose: Chooser | None = None
    most: Callable[[int, int], int] = whole_window
    may_skip_forward: bool = False
    can_remask: bool = False
    steps: int = 0
    threshold: float = 0.0
    predicts_scores: bool = False
    posterior: Callable | None = None
    log_distributions: Callable | None = None

    def transition(self, objective: Any, steps: int) -> "Sampler":
        """What the loop takes."""
        return self

    def max_calls(self, settings: Settings) -> int | None:
        variable = self.may_skip_forward or self.can_remask or self.posterior or self.predicts_scores
        return None if variable else settings.block_size

    def start(self, frame: Frame, block: Block) -> Block:
        if self.posterior is None:
            return block
        return block._replace(canvas=jnp.where(block.masked, _random_tokens(frame, block), block.canvas))

    def is_unfinished(self, settings: Settings, block: Block) -> jax.Array:
        """A mask is left, or steps of a sampler that may mask again."""
        left = block.masked.any(-1)
        return left | (block.open & (block.index < settings.steps)) if self.can_remask else left

    def step(self, frame: Frame, block: Block, previous: PreviousBlock | None, cache) -> tuple[Block, Any]:
        settings, call = frame.settings, _plan_call(self, frame, block)
        whole = settings.window == settings.block_size
        level = call.plan.level if whole else jnp.mean(block.masked, axis=1, dtype=jnp.float32)

        def ask(cache):
            logits, cache = frame.context.denoise(block.canvas, frame.progress.block, previous, call.positions, level,
                                                  cache)
            return _draw(self, frame, block, call, logits), cache

        if previous is None and self.may_skip_forward:  # a step that reveals nothing needs no network
            no_stats = TokenStats(*[jnp.zeros(call.positions.shape)] * (5 if self.predicts_scores else 3))
            drawn, stats = jax.lax.cond(call.plan.reveal.any(), lambda: ask(cache)[0],
                                        lambda: (jnp.zeros_like(call.positions), no_stats))
        else:
            (drawn, stats), cache = ask(cache)
        return _reveal(self, frame, block, call, drawn, stats), cache

    def check(self, lm: Any, options: Any) -> None:
        """UserError unless networks of this objective say what the sampler asks, and for options that do not go with
        it."""
        objective, name = lm.config.diffusion, options.sampler
        if objective.causal and name != "first_hitting":
            raise UserError(f"sampler '{name}' is for masked diffusion: an autoregressive model uses first_hitting")
        if self.predicts_scores and not objective.predicts_scores:
            use = objective.sampler if objective.can_resample_tokens else "ancestral"
            raise UserError(f"sampler '{name}' needs the log scores of an SEDD model, this one is of kind "
                            f"'{objective.kind}': use {use}")
        can_resample_tokens = self.posterior is not None
        if can_resample_tokens != objective.can_resample_tokens:
            does, use = (("redraws letters", "ancestral") if can_resample_tokens
                         else ("reveals masks", objective.sampler))
            raise UserError(f"sampler '{name}' {does}, which a model of kind '{objective.kind}' never sees: use {use}")
        if can_resample_tokens and self.predicts_scores != objective.predicts_scores:
            raise UserError(f"sampler '{name}' reads probabilities, and a model of kind '{objective.kind}' gives log "
                            f"scores: use {objective.sampler}")
        if can_resample_tokens and changed(options, ("constraint", "guidance", "block_size")):
            raise UserError(f"sampler '{name}' redraws the whole block without masks: leave constraint, guidance and "
                            "block_size out")


def _plan_call(sampler: Sampler, frame: Frame, block: Block) -> Call:
    settings, given = frame.settings, frame.given
    plan_keys, draw_keys = frame.call_keys(block.calls)
    window = _window(settings, block.masked, given)
    written = window & ~block.masked & ~given & sampler.is_unfinished(settings, block)[:, None]
    rows = Row(window & block.masked, written, block.confidence, block.level, block.index)
    plan = jax.vmap(lambda key, row: sampler.plan(key, row, settings.steps, frame.request.threshold))(plan_keys, rows)
    return Call(rows, plan, window, _positions(sampler, settings, plan.reveal, window), draw_keys)


def _reveal(sampler: Sampler, frame: Frame, block: Block, call: Call, drawn_BxP, stats: TokenStats) -> Block:
    """The block with what is chosen of the drawn tokens, and with its masks."""
    settings, plan, window = frame.settings, call.plan, call.window
    places = jnp.arange(call.positions.shape[0])[:, None], call.positions
    stats = jax.tree.map(lambda x: jnp.zeros(block.canvas.shape).at[places].set(x), stats)
    revealed, choose = plan.reveal, sampler.choose
    if choose is not None:
        revealed = jax.vmap(lambda row, planned, stats: choose(
            row, planned, stats, settings.steps, frame.request.threshold))(call.rows, plan.reveal, stats)
    canvas = jnp.where(revealed, block.canvas.at[places].set(drawn_BxP), block.canvas)
    masked = (block.masked & ~revealed) | plan.remask
    if sampler.posterior is None:
        canvas = jnp.where(plan.remask, settings.mask_id, canvas)
    same_window = (_window(settings, masked, frame.given) == window).all(-1)  # a new window starts its clock anew
    return Block(canvas, masked, block.open,
                 jnp.where(revealed, stats.confidence, block.confidence), jnp.where(same_window, plan.next_level, 1.0),
                 jnp.where(same_window, block.index + 1, 0), block.nfe + plan.reveal.any(-1), block.calls + 1)


def _draw(sampler: Sampler, frame: Frame, block: Block, call: Call, logits_BxPxV):
    """A token for every asked position, its noise keyed by the position, and what the network said of it."""
    settings, request = frame.settings, frame.request
    logits, filtered, log_total = _distributions(sampler, frame, block, call, logits_BxPxV)
    keys = position_keys(call.keys, call.positions)
    if settings.draw_all is None:
        flat = filtered.reshape(-1, filtered.shape[-1])
        drawn = sample_categorical(keys.reshape(-1), flat).reshape(call.positions.shape)
    else:
        remaining = request.length - (frame.progress.block + 1) * settings.block_size
        block_state = make_block_state(frame.progress.state, block.canvas, block.masked, frame.given, remaining)
        drawn = settings.draw_all(request.constraint, keys, filtered, logits, block_state)
        if sampler.choose is not None:
            logits = request.constraint.marginals(logits, block_state)
    stats = _token_stats(logits, drawn, sampler.choose is not None)
    if sampler.predicts_scores:
        uniform = jax.vmap(jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1))))(keys)
        stats = stats._replace(log_total=log_total, uniform=uniform)
    return drawn, stats


def _distributions(sampler: Sampler, frame: Frame, block: Block, call: Call, logits_BxPxV):
    """Logits of what the network says and of what is drawn from, `[B, P, V]`, and `TokenStats.log_total`."""
    filters, vocab_size = frame.settings.filters, logits_BxPxV.shape[-1]
    excluded = is_excluded(frame, call.positions, vocab_size)
    current_tokens = jnp.take_along_axis(block.canvas, call.positions, axis=1)
    allowed, plan = ~frame.request.forbidden, call.plan
    logits = filter_input = logits_BxPxV.astype(jnp.float32)
    if sampler.log_distributions is not None:  # what filters go by, and what remains of it is drawn from
        one_row = jax.vmap(sampler.log_distributions, (0, 0, None, None))
        filter_input, logits = jax.vmap(one_row, (0, 0, None, 0))(logits, current_tokens, allowed, plan.level)
    logits, filter_input = (jnp.where(excluded, -jnp.inf, x) for x in (logits, filter_input))
    log_total = jax.nn.logsumexp(logits, axis=-1) - jnp.log(vocab_size - 1)
    if filters.repetition_penalty != 1:
        present = tokens_present(frame, block, vocab_size)[:, None]
        logits, filter_input = (apply_repetition_penalty(x, present, filters.repetition_penalty)
                                for x in (logits, filter_input))
    filtered = filter_logits(filter_input.reshape(-1, vocab_size), filters).reshape(logits.shape)
    if sampler.log_distributions is not None:
        left = jnp.where(filtered == -jnp.inf, -jnp.inf, logits / (filters.temperature or 1.0))
        filtered = jnp.where((left == -jnp.inf).all(-1, keepdims=True), filtered, left)
    if sampler.posterior is not None:
        one_row = jax.vmap(sampler.posterior, (0, 0, None, None, None))
        filtered = jax.vmap(one_row, (0, 0, None, 0, 0))(filtered, current_tokens, allowed, plan.level, plan.next_level)
    return logits, filtered, log_total


def _random_tokens(frame: Frame, block: Block):
    """What a canvas of letters shows before anything is known `[B, S]`."""
    places_S = jnp.arange(block.canvas.shape[1])
    allowed = jnp.where(frame.request.forbidden, -jnp.inf, jnp.zeros((len(places_S), 1)))

    def row(key):
        key = jax.random.fold_in(jax.random.fold_in(key, frame.progress.block), INITIAL_CANVAS)
        return sample_categorical(jax.vmap(lambda p: jax.random.fold_in(key, p))(places_S), allowed)

    return jax.vmap(row)(frame.request.keys)


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


def _window(settings: Settings, masked_BxS, given_BxS):
    """The stretch of positions, bool `[B, S]`, that holds the first mask."""
    if settings.window == settings.block_size:
        return jnp.ones(masked_BxS.shape, bool)
    start = jnp.cumprod(given_BxS, axis=1).sum(axis=1, keepdims=True)
    first = jnp.argmax(masked_BxS, axis=1, keepdims=True)
    return (jnp.arange(settings.block_size) - start) // settings.window == (first - start) // settings.window


def _positions(sampler: Sampler, settings: Settings, reveal_BxS, window_BxS):
    """What the network's head is asked for, `[B, P]`, each position once: those that the plan reveals where it is
    known to be few (filled up with others), else the window, or the whole block."""
    most = min(sampler.most(settings.window, settings.steps), settings.window)
    if settings.draw_all is not None:
        return jnp.broadcast_to(jnp.arange(settings.block_size), reveal_BxS.shape)
    if most == 1:
        return jnp.argmax(reveal_BxS, axis=1)[:, None]
    if most < settings.window:
        return jax.lax.top_k(reveal_BxS.astype(jnp.int32), most)[1]
    first = jnp.minimum(jnp.argmax(window_BxS, axis=1), settings.block_size - settings.window)
    return first[:, None] + jnp.arange(settings.window)

"""A whole block drawn under a constraint: exact, for any order in which its positions are revealed.

Given the probabilities p_i of the positions, which the network takes as independent, a canvas x is drawn from
    p(x) ~ prod_i p_i(x_i) * 1[fixed positions keep their token] * 1[an accepted text can still be completed]
by messages from right to left, one weight for each state of the automaton, then a draw from left to right: the
forward-backward algorithm of hidden Markov models (Rabiner, Proceedings of the IEEE 77, 1989). A sampler may reveal any
of the drawn positions and drop the others: an accepted completion remains.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.generation.compatibility import refuse
from bd3lm_jax.generation.constraints.automaton import Automaton
from bd3lm_jax.generation.constraints.dfa import START
from bd3lm_jax.generation.sampling.filters import sample_categorical


class Constraint(NamedTuple):
    """An automaton (of `automaton.build`) as `generate.py` takes it; its draws are those of `draw_all`."""

    automaton: Automaton

    def start(self, batch: int) -> jax.Array:
        return jnp.full(batch, START)

    def advance(self, state_B, canvas_BxS, new_BxS) -> jax.Array:
        return advance(self.automaton, state_B, canvas_BxS, ~new_BxS)

    def marginals(self, logits_BxSxV, block_state: "BlockState") -> jax.Array:
        """What the network says once the constraint is known, for steps that choose by confidence, `[B, S, V]`."""
        return constrained_marginals(logits_BxSxV, block_state, self.automaton)

    def sample(self, keys_BxS, filtered_BxSxV, logits_BxSxV, block_state: "BlockState") -> jax.Array:
        """`Settings.draw_all` at a temperature above 0: canvases `[B, S]`."""
        return draw_constrained(keys_BxS, filtered_BxSxV, logits_BxSxV, block_state, self.automaton, greedy=False)[0]

    def best(self, keys_BxS, filtered_BxSxV, logits_BxSxV, block_state: "BlockState") -> jax.Array:
        """`Settings.draw_all` at temperature 0: the most probable accepted canvases `[B, S]`."""
        return draw_constrained(keys_BxS, filtered_BxSxV, logits_BxSxV, block_state, self.automaton, greedy=True)[0]


def check(lm: Any, options: Any) -> None:
    """UserError for a constraint that the model or other options do not go with."""
    if options.constraint is None:
        return
    if lm.tokenizer is None:
        raise UserError("a constraint needs a tokenizer, and this checkpoint has none")
    refuse(options, ("min_length",), "min_length does not go with a constraint: write the least length into the "
           "constraint, e.g. '.{20,}'")
    refuse(options, ("forced",), "forced tokens do not go with a constraint: write them into the constraint")


class BlockState(NamedTuple):
    """What is known of a block before it is drawn.

    canvas int32 `[B, S]`; fixed bool `[B, S]`: positions that keep their token; outside bool `[B, S]`: positions that
    the constraint does not see and that keep their token too (the prompt, and what lies behind the last token asked
    for). state int32 `[B]`: the automaton's before the block. after int32 `[B]`: how many positions that the constraint
    sees follow the block.
    """

    canvas: jax.Array
    fixed: jax.Array
    outside: jax.Array
    state: jax.Array
    after: jax.Array

    @property
    def not_drawn(self) -> jax.Array:
        """Positions `[B, S]` that are not drawn."""
        return self.fixed | self.outside


def make_block_state(state_B, canvas_BxS, masked_BxS, given_BxS, remaining_B) -> BlockState:
    """remaining: tokens asked for behind the block; negative where the text ends inside it."""
    size = canvas_BxS.shape[1]
    outside_BxS = given_BxS | (jnp.arange(size) >= size + remaining_B[:, None])
    return BlockState(canvas_BxS, ~masked_BxS & ~outside_BxS, outside_BxS, state_B, jnp.maximum(remaining_B, 0))


def draw_constrained(keys_BxS, logp_BxSxV, unfiltered_BxSxV, block_state: BlockState, automaton: Automaton,
                     greedy: bool) -> tuple[jax.Array, jax.Array]:
    """Canvases int32 `[B, S]` of the law above, and the log of the total weight of all accepted ones, `[B]`.

    keys: one a position. logp: log-probabilities or logits, -inf where filters exclude a token. unfiltered: those that
    a row falls back to when its filters leave no accepted canvas; finite for every token that the automaton allows.
    greedy: the most probable accepted canvas by `unfiltered`; keys and logp are not used.

    The total is -inf, and the canvas without meaning, only if `state` cannot be completed in the positions left: never
    while a row is written if the automaton was built for its length and the states come from `advance`.
    """
    automaton = jax.tree.map(jnp.asarray, automaton)
    unfiltered = unfiltered_BxSxV.astype(jnp.float32)

    def messages(logp_BxSxV):
        return _messages(automaton, _class_weights(automaton, logp_BxSxV, block_state, greedy), block_state, greedy)

    def total(message_TxBxQ):
        return jnp.take_along_axis(message_TxBxQ[0], block_state.state[:, None], axis=1)[:, 0]

    logp = unfiltered if greedy else logp_BxSxV.astype(jnp.float32)
    log_weights = messages(logp)
    if not greedy:
        infeasible_B = (total(log_weights) == -jnp.inf) & ~block_state.not_drawn.all(axis=1)
        logp = jnp.where(infeasible_B[:, None, None], unfiltered, logp)
        log_weights = jax.lax.cond(infeasible_B.any(), messages, lambda _: log_weights, logp)

    def step(state_B, position):
        keys_B, logp_BxV, token_B, not_drawn_B, outside_B, ahead_BxQ = position
        ahead_BxC = jnp.take_along_axis(ahead_BxQ, automaton.transitions[state_B], axis=1)
        scores_BxV = logp_BxV + ahead_BxC[:, automaton.token_class]
        drawn_B = jnp.argmax(scores_BxV,
                             axis=-1).astype(jnp.int32) if greedy else sample_categorical(keys_B, scores_BxV)
        token_B = jnp.where(not_drawn_B, token_B, drawn_B)
        return _next_state(automaton, state_B, token_B, outside_B), token_B

    positions = (keys_BxS.T, jnp.swapaxes(logp, 0, 1), block_state.canvas.T, block_state.not_drawn.T,
                 block_state.outside.T, log_weights[1:])
    return jax.lax.scan(step, block_state.state, positions)[1].T, total(log_weights)


def constrained_marginals(logp_BxSxV, block_state: BlockState, automaton: Automaton) -> jax.Array:
    """Log-probabilities `[B, S, V]` of the token at each position under the law above: what p_i becomes once the
    constraint and the fixed positions are known, so that a token that is forced has probability 1.

    For steps that choose positions by confidence. logp as `unfiltered` in `draw_constrained`, and returned as it is at
    positions that are not drawn.
    """
    automaton, logp = jax.tree.map(jnp.asarray, automaton), logp_BxSxV.astype(jnp.float32)
    weights_SxBxC = _class_weights(automaton, logp, block_state, greedy=False)
    message_TxBxQ = _messages(automaton, weights_SxBxC, block_state, greedy=False)
    states = automaton.transitions.shape[0]

    def step(visited_BxQ, position):  # visited: probability of each state before this position
        weight_BxC, outside_B, here_BxQ, ahead_BxQ = position
        scale_BxQ = jnp.where(visited_BxQ > 0, jnp.log(visited_BxQ) - here_BxQ, -jnp.inf)
        gain_BxQxC = scale_BxQ[..., None] + ahead_BxQ[:, automaton.transitions]
        flow_BxQC = jnp.exp(gain_BxQxC + weight_BxC[:, None]).reshape(len(outside_B), -1)
        moved_BxQ = jax.ops.segment_sum(flow_BxQC.T, automaton.transitions.reshape(-1), states).T
        return jnp.where(outside_B[:, None], visited_BxQ, moved_BxQ), jax.nn.logsumexp(gain_BxQxC, axis=1)

    positions = (weights_SxBxC, block_state.outside.T, message_TxBxQ[:-1], message_TxBxQ[1:])
    gain_SxBxC = jax.lax.scan(step, jax.nn.one_hot(block_state.state, states), positions)[1]
    gain_BxSxV = jnp.swapaxes(gain_SxBxC, 0, 1)[..., automaton.token_class]
    return jnp.where(block_state.not_drawn[..., None], logp, logp + gain_BxSxV)


def advance(automaton: Automaton, state_B, tokens_BxS, outside_BxS) -> jax.Array:
    """The states `[B]` behind the tokens of a finished block; positions outside the constraint are skipped."""
    automaton = jax.tree.map(jnp.asarray, automaton)

    def step(state_B, position):
        return _next_state(automaton, state_B, *position), None

    return jax.lax.scan(step, state_B, (tokens_BxS.T, outside_BxS.T))[0]


def _next_state(automaton: Automaton, state_B, token_B, outside_B) -> jax.Array:
    return jnp.where(outside_B, state_B, automaton.transitions[state_B, automaton.token_class[token_B]])


def _class_weights(automaton: Automaton, logp_BxSxV, block_state: BlockState, greedy: bool) -> jax.Array:
    """Log of the summed probability of each class, or of its most probable token, `[S, B, C]`; 0 for the class of a
    fixed token and -inf for all others."""
    classes = automaton.transitions.shape[1]
    logp_VxSxB = jnp.transpose(logp_BxSxV)
    weights_CxSxB = jax.ops.segment_max(logp_VxSxB, automaton.token_class, classes)
    if not greedy:
        shift = jnp.where(weights_CxSxB == -jnp.inf, 0.0, weights_CxSxB)
        relative = jnp.exp(logp_VxSxB - shift[automaton.token_class])
        weights_CxSxB = jnp.log(jax.ops.segment_sum(relative, automaton.token_class, classes)) + shift
    is_own_class = jnp.arange(classes)[:, None, None] == automaton.token_class[block_state.canvas.T]
    return jnp.moveaxis(jnp.where(block_state.fixed.T, jnp.where(is_own_class, 0.0, -jnp.inf), weights_CxSxB), 0, 2)


def _messages(automaton: Automaton, weights_SxBxC, block_state: BlockState, greedy: bool) -> jax.Array:
    """`[S + 1, B, Q]`: entry i is the log weight of all that positions i, i + 1, ... may hold, from each state."""
    collect = jnp.max if greedy else jax.nn.logsumexp

    def step(message_BxQ, position):
        weight_BxC, outside_B = position
        summed_BxQ = collect(weight_BxC[:, None] + message_BxQ[:, automaton.transitions], axis=2)
        message_BxQ = jnp.where(outside_B[:, None], message_BxQ, summed_BxQ)
        return message_BxQ, message_BxQ

    last_BxQ = jnp.where(automaton.reachable[block_state.after], 0.0, -jnp.inf)
    message_SxBxQ = jax.lax.scan(step, last_BxQ, (weights_SxBxC, block_state.outside.T), reverse=True)[1]
    return jnp.concatenate([message_SxBxQ, last_BxQ[None]])

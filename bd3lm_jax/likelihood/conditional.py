"""Likelihood of a continuation given a prompt, and the choice between continuations.

Prompt tokens are never masked and count nothing. Block by block the bound is over the masks of the block's n <= S
continuation tokens (BD3-LM, arXiv 2503.09573, noise level integrated out, see `estimators.py`):

    sum over k = 1..n of E[(1/k) sum over i in M of -log p(x_i | tokens outside M, earlier blocks)],    |M| = k.

Where the last block goes on after the continuation, its other places are masks in every copy, as in generation: what
is bounded is the probability that a text goes on like this, not that it ends there. (`LM.nll` and `eval` score rows
that end with the text.) For autoregression and S = 1 the likelihood is exact.

Masks are a function of seed, prompt (without one: continuation), draw, and place counted from the start of the
continuation: not of batch, padding or order, and the same for all continuations of a prompt.
"""

import dataclasses
import functools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax.checkpoints.published.mapping import check_bos
from bd3lm_jax.core import jax_settings, stats
from bd3lm_jax.core.errors import UserError, lookup
from bd3lm_jax.data.tokenizers import Tokenizer
from bd3lm_jax.diffusion.masked import Masked, Uniforms
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.likelihood import estimators, evaluate
from bd3lm_jax.likelihood import greedy as greedy_decoding
from bd3lm_jax.likelihood.predictions import Predictor, Rows, predictions
from bd3lm_jax.scoring.score import SpecialIds

GOLDEN = 2654435769  # 2^32 times the golden ratio less 1: its multiples spread evenly, however many are taken
LEAST_ROW, LEAST_SCORED = 32, 8  # shapes are powers of two from here on, so that few programs are compiled
NORMALISE = {  # what an option's log-likelihood is divided by, from its tokens and its bytes
    "none": lambda tokens, size: 1,
    "token": lambda tokens, size: tokens,
    "byte": lambda tokens, size: size,
}


class Score(NamedTuple):
    """nats: log-likelihood of a continuation, or a lower bound on it, negative. mc_se: Monte-Carlo standard error of
    nats, 0 where it is exact. greedy: whether `LM.generate` at temperature 0 (sampler "confidence", but for
    autoregression) writes this continuation, None if that was not asked."""

    nats: float
    mc_se: float
    tokens: int
    greedy: bool | None


class Choice(NamedTuple):
    """index: of the option with the highest normalised log-likelihood. scores: of all options, not normalised. margin:
    how far the winner is ahead of the second, normalised. margin_se: its Monte-Carlo standard error, draws paired."""

    index: int
    scores: list[Score]
    margin: float
    margin_se: float


class Request(NamedTuple):
    """Ids of prompt and continuation; requests with the same `noise` share their masks."""

    prompt: np.ndarray
    continuation: np.ndarray
    noise: int

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.continuation)


def score(lm: Any, prompts: Sequence, continuations: Sequence, *, estimator: str, draws: int, seed: int, greedy: bool,
          batch: int, noise: Sequence | None = None) -> list[Score]:
    """Log-likelihood of every continuation given its prompt.

    prompts, continuations: as many of one as of the other, texts or lists of ids; a prompt may be empty. Texts are
    split into tokens by `encode_pair`. estimator: "exact_count"; "exact" (all masks, S <= 8) has no Monte-Carlo error.
    draws: passes of four noised copies, two independent estimates each. greedy: also tell whether greedy decoding (in
    every block the most confident position first, be it behind the continuation) writes the continuation, at the cost
    of up to S more passes (exact models: none). batch: rows a pass. noise: a text or ids for each pair; those with the
    same one share their masks. None: the prompts.

    Raises UserError for an empty continuation, a pair longer than the context, a mask token or an id out of range, and
    an empty prompt for an autoregressive model without beginning token.
    """
    if isinstance(prompts, str) or isinstance(continuations, str) or len(prompts) != len(continuations):
        raise UserError("expected a list of prompts and an equally long list of continuations, got "
                        f"{_described(prompts)} and {_described(continuations)}")
    noise = noise or [prompt if len(prompt) else continuation for prompt, continuation in zip(prompts, continuations)]
    requests = [_request(lm, *pair) for pair in zip(prompts, continuations, noise, strict=True)]
    return [_score(*found) for found in _measure(lm, requests, estimator, draws, seed, greedy, batch)]


def choose(lm: Any, prompt: Any, options: Sequence, *, normalise: str, estimator: str, draws: int, seed: int,
           batch: int) -> Choice:
    """The most likely of two or more continuations of one prompt, all scored on the same masks.

    normalise: divide log-likelihoods by "none", by the number of "token"s, or by UTF-8 "byte"s of the option (the
    usual `acc_norm`). The rest as in `score`.
    """
    if isinstance(options, str) or len(options) < 2:
        raise UserError(f"options are {options!r}, expected a list of two or more")
    divisor = lookup(NORMALISE, normalise, "normalisation")
    requests = [_request(lm, prompt, option, prompt) for option in options]
    found = _measure(lm, requests, estimator, draws, seed, False, batch)
    size = [divisor(len(request.continuation), _bytes(lm.tokenizer, option) if normalise == "byte" else 0)
            for request, option in zip(requests, options)]
    value_OxU = np.stack([-nats_U for _, nats_U, _ in found]) / np.array(size)[:, None]
    best, second = np.argsort(-value_OxU.mean(1), kind="stable")[:2]
    margin_U = value_OxU[best] - value_OxU[second]
    return Choice(int(best), [_score(*x) for x in found], float(margin_U.mean()), _mc_se(margin_U))


def encode_pair(tokenizer: Tokenizer, prompt: str, continuation: str,
                special: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Ids of prompt and continuation, by the convention of lm-evaluation-harness.

    White space at the end of the prompt moves to the continuation, both are encoded as one text, and the first tokens,
    as many as the prompt has by itself, are the prompt's. A token across the border is the continuation's if it would
    have none otherwise. special: names of special tokens are these tokens (chat templates write them).
    """
    stripped = prompt.rstrip()
    encode = tokenizer.encode_special if special else tokenizer.encode
    whole = encode(prompt + continuation)
    start = len(encode(stripped)) if stripped else 0
    if continuation:
        start = min(start, max(len(whole) - 1, 0))
    return whole[:start], whole[start:]


def _request(lm: Any, prompt: Any, continuation: Any, noise: Any) -> Request:
    """Checked ids of a pair of texts or of lists of ids; noise: text or ids whose content the masks are keyed by."""
    objective = lm.config.diffusion
    if not objective.predicts_unseen_tokens:
        raise UserError(f"a model of kind '{objective.kind}' predicts no masked tokens, so that no continuation can be "
                        "scored: use eval")
    if not len(continuation):
        raise UserError("a continuation is empty, expected at least one token to score")
    if not len(prompt):
        prompt = "" if isinstance(continuation, str) else ()
    if isinstance(prompt, str) != isinstance(continuation, str):
        raise UserError("prompt and continuation are a text and a list of ids, expected two of the same kind")
    if isinstance(prompt, str):
        if lm.tokenizer is None:
            raise UserError("this checkpoint has no tokenizer: give prompts and continuations as lists of token ids")
        pair = encode_pair(lm.tokenizer, prompt, continuation)
    else:
        pair = _ids(prompt, lm.config.model.vocab_size), _ids(continuation, lm.config.model.vocab_size)
    request = Request(*pair, zlib.crc32(_content(noise)))
    _check(lm, request)
    return request


def _ids(ids, vocab: int) -> np.ndarray:
    ids = np.asarray(ids) if len(ids) else np.zeros(0, np.int32)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"token ids have shape {ids.shape} and type {ids.dtype}, expected a list of integers")
    if ids.size and (ids.min() < 0 or ids.max() >= vocab):
        bad_id = ids.min() if ids.min() < 0 else ids.max()
        raise UserError(f"token id {bad_id} is out of range, expected 0 to {vocab - 1}")
    return ids.astype(np.int32)


def _check(lm, request: Request) -> None:
    objective, mask = lm.config.diffusion, lm.special.mask
    if not len(request.continuation):
        raise UserError("a continuation has no tokens, expected at least one to score")
    if request.length > lm.context:
        raise UserError(f"prompt and continuation have {len(request.prompt)} + {len(request.continuation)} tokens, "
                        f"expected at most {lm.context}, what the model was trained on: shorten the prompt")
    if (request.prompt == mask).any() or (request.continuation == mask).any():
        raise UserError(f"prompt or continuation hold the mask token {mask}, which is never part of a text")
    check_bos(objective, lm.config.model, lm.special.end)
    if not objective.predicts_first_token and not len(request.prompt):
        raise UserError("this autoregressive model has no beginning token: give it a prompt of at least one token")


def _content(text_or_ids: Any) -> bytes:
    return text_or_ids.encode() if isinstance(text_or_ids, str) else np.asarray(text_or_ids, np.int32).tobytes()


def _bytes(tokenizer: Tokenizer | None, option: Any) -> int:
    if isinstance(option, str):
        return len(option.encode())
    if tokenizer is None:
        raise UserError("this checkpoint has no tokenizer, so that options have no bytes: normalise by \"token\"")
    return max(len(tokenizer.decode(option).encode()), 1)


def _described(text_or_ids: Any) -> str:
    return "a text" if isinstance(text_or_ids, str) else f"{len(text_or_ids)} of them"


def _score(request: Request, nats_U: np.ndarray, greedy: bool | None) -> Score:
    return Score(-float(nats_U.mean()), _mc_se(nats_U), len(request.continuation), greedy)


def _mc_se(estimates_U: np.ndarray) -> float:
    return stats.monte_carlo_se(estimates_U[None]) if len(estimates_U) > 1 else 0.0


# ---- on the device


@dataclasses.dataclass(frozen=True)
class PositionKeyed:
    """`exact_count` (see `estimators.py`) with uniforms that depend on nothing before or after a place.

    Two replicates a draw, each a mask and its complement. The levels of consecutive blocks are multiples of the golden
    ratio from a random start: spread evenly over any number of blocks.
    """

    replicates: ClassVar[int] = 2
    measure: Masked

    def num_passes(self, draws: int) -> int:
        return draws

    def noised(self, key, index, draws: int, tokens_L, segments_L, special: SpecialIds) -> Noised:
        del draws
        length, size = tokens_L.shape[0], self.measure.block_size
        start = jnp.argmax(segments_L != 0)
        place_L = jnp.maximum(jnp.arange(length) - start, 0)
        block_K = jnp.maximum(jnp.arange(length // size) - start // size, 0).astype(jnp.uint32)

        def uniforms(replicate):
            level_key, order_key = jax.random.split(jax.random.fold_in(key, index * self.replicates + replicate))
            level_K = jax.random.bits(level_key, (), jnp.uint32) + block_K * jnp.uint32(GOLDEN)
            order_L = jax.vmap(lambda place: jax.random.uniform(jax.random.fold_in(order_key, place)))(place_L)
            return (level_K >> 8).astype(jnp.float32) * 2.0**-24, order_L

        level_RxK, order_RxL = jax.vmap(uniforms)(jnp.arange(self.replicates))
        noised = self.measure.corrupt_with(Uniforms(level_RxK[None], order_RxL[None], None), tokens_L[None],
                                           segments_L[None], special.mask)
        return jax.tree.map(lambda x: x[0], noised)


def _measure(lm, requests: list[Request], name: str, draws: int, seed: int, greedy: bool,
             batch: int) -> list[tuple[Request, np.ndarray, bool | None]]:
    """Each request with its nats in every independent estimate, float64 `[U]`, and whether it is greedy."""
    evaluate.check_draws(draws)
    if batch < 1:
        raise UserError(f"batch is {batch}, expected at least 1 row a pass")
    estimator = estimators.make(name, lm.config)
    if estimator.replicates > 1:
        if name != "exact_count":
            raise UserError(f"estimator '{name}' does not score continuations: use exact_count or exact")
        estimator = PositionKeyed(dataclasses.replace(Masked.uniform_counts(lm.config.block_size), complement=True))
    key, found = jax_settings.key(seed), {}
    for members, rows, capacity in _batches(lm, requests, batch):
        predictor = Predictor(lm.model, lm.config.diffusion, lm.special, capacity)
        parts = [_score_rows(predictor, estimator, lm.params, key, index, rows)
                 for index in range(estimator.num_passes(draws))]
        nats_PxRxB = np.stack([np.asarray(nats, np.float64) for nats, _ in parts])
        independent = isinstance(estimator, PositionKeyed)
        nats_UxB = nats_PxRxB.reshape(-1, nats_PxRxB.shape[-1]) if independent else nats_PxRxB.mean(0)
        greedy_B = [None] * len(members)
        if estimators.is_exact(lm.config):
            greedy_B = np.asarray(parts[0][1]).tolist()
        elif greedy:
            greedy_B = greedy_decoding.is_greedy_decoded(lm, capacity, rows, [requests[i].length
                                                                              for i in members]).tolist()
        for place, member in enumerate(members):
            found[member] = requests[member], nats_UxB[:, place], greedy_B[place]
    return [found[i] for i in range(len(requests))]


def _batches(lm, requests: list[Request], batch: int) -> Iterator[tuple[list[int], Rows, int]]:
    """Requests of about one length at a time: their indices, rows filled up with the last one, tokens to score."""
    groups: dict[tuple[int, int], list[int]] = {}
    size = lm.config.block_size
    for i, request in enumerate(requests):
        length = -(-min(_power(request.length, LEAST_ROW), lm.context) // size) * size
        groups.setdefault((length, min(_power(len(request.continuation), LEAST_SCORED), length)), []).append(i)
    for (length, capacity), members in groups.items():
        for start in range(0, len(members), batch):
            some = members[start:start + batch]
            filled = some + [some[-1]] * (min(_power(len(some), 1), batch) - len(some))
            yield some, _rows([requests[i] for i in filled], length, size, lm.special.mask), capacity


def _power(count: int, least: int) -> int:
    """The smallest power of two that is at least both."""
    return 1 << (max(count, least) - 1).bit_length()


def _rows(requests: list[Request], length: int, size: int, mask: int) -> Rows:
    tokens = np.full((len(requests), length), max(mask, 0), np.int32)
    segment, scored = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
    for row, request in enumerate(requests):
        tokens[row, :request.length] = np.concatenate([request.prompt, request.continuation])
        segment[row, :-(-request.length // size) * size] = 1
        scored[row, len(request.prompt):request.length] = True
    return Rows(tokens, segment, scored, np.array([request.noise for request in requests], np.uint32))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score_rows(predictor: Predictor, estimator, params, key, index, rows: Rows):
    """Nats `[R, B]` of R replicates in pass `index`, and whether the likeliest tokens are the text's in all copies."""
    def noise(noise_id, tokens_L, segments_L):
        return estimator.noised(jax.random.fold_in(key, noise_id), index, 1, tokens_L, segments_L, predictor.special)

    is_noised = predictor.objective.draws_noise
    segments = jnp.where(rows.scored_BxL, rows.segment_BxL, 0) if is_noised else rows.segment_BxL
    noised = jax.vmap(noise)(rows.noise_B, rows.tokens_BxL, segments)
    predicted = predictions(predictor, params, noised, rows)
    nats_BxM = jnp.where(predicted.weight_BxMxC == 0, 0, predicted.loss_BxMxC * predicted.weight_BxMxC).sum(-1)
    text_BxMxL = jnp.broadcast_to(rows.tokens_BxL[:, None], noised.xt_BxMxL.shape)
    hit_BxMxC = predicted.token_BxMxC == jnp.take_along_axis(text_BxMxL, predicted.index_BxMxC, axis=2)
    hit_B = (hit_BxMxC | (predicted.weight_BxMxC == 0)).all((1, 2))
    return nats_BxM.reshape(len(nats_BxM), estimator.replicates, -1).mean(-1).T, hit_B

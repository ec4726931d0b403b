"""The compiled sampler: an exact cache with the store fused into the next call, against storing apart, no cache, AR.

fused is `LM.generate` with first hitting, S network calls a block; fused_2 reveals two tokens a call, at random
positions; cached stores a finished block by a call of its own; no_cache passes over the whole row in every call;
forward is the bare network of fused, its calls and nothing else; fused_split has a network whose last third of the
layers is its decoder (`model.decoder_layers`); ar_cached is an autoregressive network of the same size.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax import models
from bd3lm_jax.config import LMConfig
from bd3lm_jax.core import jax_settings
from bd3lm_jax.diffusion import AR, Masked
from bd3lm_jax.experiments.bench.runner import Limit, Variant, compare
from bd3lm_jax.generation import plan as plans
from bd3lm_jax.generation.denoise import UncachedDenoiser
from bd3lm_jax.generation.options import Options
from bd3lm_jax.generation.prompts import prompt_rows
from bd3lm_jax.generation.sampling import DenoiserContext, run_blocks, start
from bd3lm_jax.generation.sampling.generate import PreviousBlock
from bd3lm_jax.lm import LM
from bd3lm_jax.models import trunk
from bd3lm_jax.models.dit import DiTConfig
from bd3lm_jax.models.forward import compute_dtype

SMALL = {"num_layers": 6, "hidden_size": 256, "num_heads": 4, "vocab_size": 8192}
PAPER = {"num_layers": 12, "hidden_size": 768, "num_heads": 12, "vocab_size": 50258}
LENGTH = {"cpu": 256}  # of the texts, by backend; elsewhere 1024
SHAPES = {"cpu": ((4, 1), (16, 1), (4, 8), (16, 8))}  # (block size, batch)
ELSEWHERE = tuple((size, batch) for batch in (1, 32, 128) for size in (4, 16))
NOTE = ("Ratios to AR with a cache, one token a call; forward: how much the sampler adds to its network calls. fused_2 "
        "is random_order: orders by confidence run the output layer on all positions of the block.")
AGAINST = ()
LIMITS = (
    Limit("S=16, batch 1,", "fused", "ar_cached", "cpu_ratio", 1 / 0.55),
    Limit("S=4, batch 1,", "fused", "ar_cached", "cpu_ratio", 1 / 0.8),
    Limit("S=4, batch 8,", "fused", "ar_cached", "cpu_ratio", 1 / 0.6),
    Limit("batch 1,", "fused_2", "ar_cached", "cpu_ratio", 1.0),
    Limit("batch 1,", "fused", "no_cache", "cpu_ratio", 1 / 5),
    Limit("batch 8,", "fused", "no_cache", "cpu_ratio", 1 / 10),
    Limit("", "fused", "forward", "cpu_ratio", 1.15),
)
PAIRS = (("fused", "no_cache"), ("fused", "forward"))


def run(rounds: int, against: str) -> list[dict]:
    """Rows of a small network on a CPU, of the paper's elsewhere."""
    del against
    backend = jax.default_backend()
    sizes = SMALL if backend == "cpu" else PAPER
    rows = []
    for size, batch in SHAPES.get(backend, ELSEWHERE):
        rows += run_case(sizes, LENGTH.get(backend, 1024), size, batch, rounds)
    return rows


def run_case(sizes: dict, length: int, size: int, batch: int, rounds: int) -> list[dict]:
    """All variants at one block size and batch."""
    lm, ar = make_lm(sizes, Masked.uniform_counts(size), length), make_lm(sizes, AR(bos=True), length)
    split = make_lm(sizes | {"decoder_layers": max(sizes["num_layers"] // 3, 1)}, Masked.uniform_counts(size), length)
    options = Options()
    case = (f"S={size}, batch {batch}, {length} tokens, {sizes['num_layers']} x {sizes['hidden_size']}, "
            f"V={sizes['vocab_size']}")
    variants = [
        Variant("ar_cached", sampler(ar, options, batch)),
        Variant("fused", sampler(lm, options, batch)),
        Variant("fused_2", sampler(lm, Options(sampler="random_order", steps=max(size // 2, 1)), batch)),
        Variant("fused_split", sampler(split, options, batch)),
        Variant("cached", sampler(lm, options, batch, wrap=separate_store)),
        Variant("no_cache", sampler(lm, options, batch, wrap=uncached)),
        Variant("forward", bare(lm, options, batch)),
    ]
    return compare(case, variants, "ar_cached", rounds, PAIRS)


def make_lm(sizes: dict, objective: Any, length: int) -> LM:
    """A fresh network (all tokens are alike to it) without a tokenizer, so without end token."""
    config = DiTConfig(dropout=0.0, adaln=objective.draws_noise, **sizes)
    model = models.build(config, compute_dtype("auto"))
    params = jax.jit(functools.partial(trunk.init, model))(jax_settings.key(0))
    return LM(LMConfig(config, objective), params, None, model, length)


class Denoising(NamedTuple):
    """How a variant asks: its denoiser with its parameters, and its empty cache."""

    ask: Any
    cache: Any


def sampler(lm: LM, options: Options, batch: int, wrap=None):
    """run() of a variant: `batch` texts of the model's full length from nothing. wrap: another way to ask."""
    rows = prompt_rows(lm, [np.zeros(0, np.int32)] * batch, lm.context, options)
    plan = plans.make_plan(lm, options, rows.tokens.shape[1])
    request = jax.device_put(plans.make_request(lm, options, rows, 0))

    @jax.jit
    def texts(params, tokens, request):
        denoising = (wrap or fused)(lm, plan, trunk.unstack_layers(lm.model, params), batch)
        denoiser_context = DenoiserContext(denoising.ask, plan.transition, plan.settings)
        progress = start(denoiser_context, request, tokens, 0, denoising.cache)
        return run_blocks(denoiser_context, request, progress, tokens.shape[1] // plan.settings.block_size).tokens
    return functools.partial(texts, lm.params, jnp.asarray(rows.tokens), request)


def fused(lm: LM, plan, params, batch: int) -> Denoising:
    """As `LM.generate` does it."""
    denoiser: Any = plans.make_denoiser(lm, plan)  # one whose prefill takes four arguments
    no_tokens = jnp.zeros((batch, 0), jnp.int32)
    return Denoising(functools.partial(denoiser, params), denoiser.prefill(params, no_tokens, no_tokens, 0))


def separate_store(lm: LM, plan, params, batch: int) -> Denoising:
    """A call of its own stores the block before: S + 1 calls a block."""
    ask, cache = fused(lm, plan, params, batch)

    def denoise(canvas, block, previous, positions, level, cache):
        if previous is not None:
            cache = ask(canvas, block, previous, positions[:, :1], level, cache)[1]
        return ask(canvas, block, None, positions, level, cache)[0], cache
    return Denoising(denoise, cache)


def uncached(lm: LM, plan, params, batch: int) -> Denoising:
    """A pass over the whole row in every call."""
    denoiser = UncachedDenoiser(lm.model, plan.settings.block_size, lm.context)
    no_tokens = jnp.zeros((batch, 0), jnp.int32)
    return Denoising(functools.partial(denoiser, params), denoiser.prefill(params, no_tokens, no_tokens, 0))


def bare(lm: LM, options: Options, batch: int):
    """run() of the network calls of `fused` alone: their logits are added up, nothing is drawn."""
    plan = plans.make_plan(lm, options, lm.context)
    size, vocab = plan.settings.block_size, lm.config.model.vocab_size
    blank = jnp.full((batch, size), lm.special.mask, jnp.int32)

    @jax.jit
    def calls(params):
        ask, cache = fused(lm, plan, trunk.unstack_layers(lm.model, params), batch)

        def call(block, previous, i, cache):
            positions = jnp.full((batch, 1), i, jnp.int32)
            canvas = jnp.where(jnp.arange(size) < i, i, blank)  # changes from call to call, as a text does
            return ask(canvas, block, previous, positions, jnp.ones(batch), cache)

        def body(block, carry):
            total, cache = carry
            previous = PreviousBlock(blank, jnp.broadcast_to(block > 0, blank.shape))
            logits, cache = call(block, previous, 0, cache)
            total = jax.lax.fori_loop(1, size, lambda i, total: total + call(block, None, i, cache)[0],
                                      total + logits)
            return total, cache
        return jax.lax.fori_loop(0, lm.context // size, body, (jnp.zeros((batch, 1, vocab)), cache))[0]
    return functools.partial(calls, lm.params)

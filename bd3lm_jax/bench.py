"""Benchmarks that run all sides, interleaved, in one process, and print ratios (times on shared machines mislead)."""

import dataclasses
import importlib.metadata
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax import log, models, optim
from bd3lm_jax.attention.reference import dense_attention
from bd3lm_jax.attention.spec import MaskSpec, Tokens
from bd3lm_jax.config import OptimConfig
from bd3lm_jax.diffusion.ar import AR
from bd3lm_jax.diffusion.masked import Masked, cross_entropy_subs
from bd3lm_jax.errors import UserError, lookup
from bd3lm_jax.models.dit import DiTConfig
from bd3lm_jax.models import trunk
from bd3lm_jax.step import SpecialIds, row_losses
from bd3lm_jax.passes import PLAIN, compute_dtype


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a training step."""

    layers: int
    width: int
    heads: int
    batch: int
    length: int
    block_size: int
    vocab: int

    def __str__(self) -> str:
        return (f"{self.layers} x {self.width}, B={self.batch}, L={self.length}, S={self.block_size}, V={self.vocab}")


STEP_CASES = (Case(layers=6, width=256, heads=4, batch=1, length=512, block_size=16, vocab=8192),)


def bench(name: str, rounds: int) -> dict[str, Any]:
    """Run one benchmark; the result object of the `bench` command, and a table on stderr."""
    if rounds < 1:
        raise UserError(f"rounds is {rounds}, expected at least 1")
    rows = lookup(BENCHES, name, "benchmark")(rounds)
    log.table(f"{name}, median of {rounds} interleaved rounds, on {jax.devices()[0].device_kind}",
              ("case", "variant", "time", "CPU time", "temporary memory", "against", "median ms"),
              [(row["case"], row["variant"], f"{row['time_ratio']:.2f}", f"{row['cpu_ratio']:.2f}",
                f"{row['memory_ratio']:.2f}", row["baseline"], f"{row['median_ms']:.0f}") for row in rows])
    versions = {package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "flax", "optax")}
    return {"bench": name, "device": jax.devices()[0].device_kind, "versions": versions, "rows": rows}


def step_bench(rounds: int) -> list[dict]:
    """Training steps: `ar` and `two_stream` are this library's, `published_structure` is one dense 2L x 2L pass with
    the head on all L noised tokens, as published. Ratios to `ar`."""
    rows = []
    for case in STEP_CASES:
        variants = {"ar": _ours(case, AR(bos=True)), "two_stream": _ours(case, _masked(case)),
                    "published_structure": _published(case)}
        rows += _compare(str(case), variants, "ar", rounds)
    return rows


def _masked(case: Case) -> Masked:
    return Masked.uniform_counts(case.block_size)


def _model(case: Case) -> models.Backbone:
    config = DiTConfig(vocab_size=case.vocab, layers=case.layers, width=case.width, heads=case.heads, mlp_ratio=4,
                       dropout=0.0, adaln=True, cond_dim=128, time_conditioning=False, rope_base=1e4)
    return models.build(config, compute_dtype("auto"))


def _ours(case: Case, objective: Any) -> tuple[Callable, tuple]:
    model, special = _model(case), SpecialIds(case.vocab - 1, 0)

    def loss(params, key, tokens, positions, segments):
        noised = objective.corrupt(key, tokens, segments, views=1, mask_id=special.mask, end_id=special.end)
        losses, index = row_losses(model, params, objective, noised, tokens, positions, segments, special.mask, PLAIN)
        return jnp.sum(jnp.take_along_axis(noised.weight_BxMxL, index, axis=2) * losses) / tokens.size

    return _updating(case, model, loss)


def _published(case: Case) -> tuple[Callable, tuple]:
    model, objective, mask_id = _model(case), _masked(case), case.vocab - 1

    def loss(params, key, tokens, positions, segments):
        noised = objective.corrupt(key, tokens, segments, views=1, mask_id=mask_id, end_id=0)
        block = positions // case.block_size
        spec = MaskSpec(rule="block_causal", block_size=case.block_size, aligned=True, one_document=True, cache=None,
                        noised=Tokens(positions, block, segments, 1), clean=Tokens(positions, block, segments, 0))
        cond = model.condition.apply({"params": params["condition"]}, jnp.zeros((1, 1)))
        rotary = model.rotary(jnp.concatenate([positions, positions], axis=1))
        h = model.embed.apply({"params": params["embed"]}, jnp.concatenate([noised.xt_BxMxL[:, 0], tokens], axis=1))
        (name, module, _), = model.groups

        def layer(h, layer_params):
            variables = {"params": layer_params}
            qkv = module.apply(variables, h, cond, rotary, method=module.pre)
            halves = [jnp.split(x, 2, axis=1) for x in qkv]
            noised_qkv, clean_qkv = tuple(x[0][:, None] for x in halves), tuple(x[1] for x in halves)
            noisy, clean = dense_attention(spec, noised_qkv, clean_qkv, None)
            attended = jnp.concatenate([noisy[:, 0], clean], axis=1)
            return module.apply(variables, h, attended, cond, None, method=module.post)[0], None

        h = jax.lax.scan(layer, h, params[name])[0]
        logits = model.head.apply({"params": params["head"]}, h, cond)[:, :case.length]
        losses = cross_entropy_subs(logits.reshape(-1, case.vocab), tokens.reshape(-1), mask_id)
        return jnp.sum(noised.weight_BxMxL.reshape(-1) * losses) / tokens.size

    return _updating(case, model, loss)


def _updating(case: Case, model: models.Backbone, loss: Callable) -> tuple[Callable, tuple]:
    """The jitted step of a loss with its optimiser, and its first arguments."""
    tx = optim.make_optimizer(OptimConfig(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=1.0,
                                          warmup_steps=0, schedule="constant", final_lr_fraction=0.0,
                                          decay_fraction=0.0, ema=0.0), 1)

    def step(state, key, tokens, positions, segments):
        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params, key, tokens, positions, segments)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (jax.tree.map(jnp.add, params, updates), opt_state), value

    params = jax.jit(lambda: trunk.init(model, jax.random.key(0)))()
    tokens = jax.random.randint(jax.random.key(1), (case.batch, case.length), 0, case.vocab - 1)
    positions = jnp.broadcast_to(jnp.arange(case.length), tokens.shape)
    state = (params, jax.jit(tx.init)(params))
    return jax.jit(step, donate_argnums=0), (state, jax.random.key(2), tokens, positions, jnp.ones_like(tokens))


def _compare(case: str, variants: dict[str, tuple[Callable, tuple]], baseline: str, rounds: int) -> list[dict]:
    """Compile all, run each once, then `rounds` interleaved rounds; a first result is the next first argument."""
    compiled, arguments, memory, wall, cpu = {}, {}, {}, {}, {}
    for name, (function, first) in variants.items():
        compiled[name] = function.lower(*first).compile()
        memory[name] = compiled[name].memory_analysis().temp_size_in_bytes
        arguments[name], wall[name], cpu[name] = first, [], []
    for turn in range(rounds + 1):
        for name, run in compiled.items():
            began, cpu_began = time.perf_counter(), time.process_time()
            state, _ = jax.block_until_ready(run(*arguments[name]))
            arguments[name] = (state, *arguments[name][1:])
            if turn > 0:
                wall[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - cpu_began)

    def ratio(values: dict, name: str) -> float:
        return float(np.median(values[name]) / np.median(values[baseline]))
    return [{"case": case, "variant": name, "baseline": baseline, "time_ratio": ratio(wall, name),
             "cpu_ratio": ratio(cpu, name), "memory_ratio": memory[name] / memory[baseline],
             "median_ms": float(np.median(wall[name])) * 1e3} for name in compiled]


BENCHES = {"step": step_bench}

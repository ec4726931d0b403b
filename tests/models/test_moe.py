"""The mixture-of-experts backbone against NumPy, by gradients, with a cache; its balancing loss in a training step."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import llama_oracle
import numpy as np
import optax
import pytest
from grids import some
from llama_oracle import attention, network, rms, swiglu, turned
from toy_runs import END, MASK, quick_jit, toy_config
from toy_runs import network as toy_network
from trunk_passes import run_pass

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.state import TrainState
from bd3lm_jax.diffusion import Masked
from bd3lm_jax.models import build, forward, moe, trunk
from bd3lm_jax.models.moe import MoEConfig
from bd3lm_jax.models.trunk import Stream
from bd3lm_jax.parallel import sharding
from bd3lm_jax.planning import flops
from bd3lm_jax.scoring.score import SpecialIds, score
from bd3lm_jax.training.step import make_step

TINY = MoEConfig(vocab_size=24, num_layers=3, dense_layers=1, hidden_size=16, num_heads=4, num_kv_heads=2, head_dim=6,
                 rotary_dim=4, intermediate_size=20, num_experts=8, expert_intermediate_size=10,
                 shared_intermediate_size=12, top_k=2, groups=4, top_groups=2, routed_scale=2.5, load_balancing=0.0,
                 dropout=0.0, rope_theta=100.0, norm_eps=1e-5, qk_norm=True, tie_embeddings=False)
LENGTH, BLOCK = 12, 4


def rows(seed=0):
    return np.random.default_rng(seed).integers(0, 24, size=(2, LENGTH))


def chosen(config, p, x):
    """Experts of one token and their weights."""
    score = 1 / (1 + np.exp(-(x @ p["router"]["kernel"])))
    ranked = score + p["router"]["bias"]
    members = np.arange(config.num_experts).reshape(config.groups, -1)
    value = [np.sort(ranked[group])[-2:].sum() for group in members]
    best = members[np.argsort(value)[-config.top_groups:]].ravel()
    choice = best[np.argsort(ranked[best])[-config.top_k:]]
    return choice, config.routed_scale * score[choice] / score[choice].sum(), score


def mixture(config, p, x_TxD):
    out = swiglu(p["shared"], x_TxD)
    for t, x in enumerate(x_TxD):
        for e, weight in zip(*chosen(config, p, x)[:2]):
            out[t] += weight * swiglu(jax.tree.map(lambda w, e=e: w[e], p["experts"]), x[None])[0]
    return out


def numpy_logits(config, params, ids, position, mask, seen=None):
    """float64 [T, V]; `seen` is called with the parameters and the input of every mixture."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    layers = [("blocks0", i) for i in range(config.dense_layers)]
    layers += [("blocks1", i) for i in range(config.num_layers - config.dense_layers)]
    h, share = params["embed"]["embedding"][ids], config.num_heads // config.num_kv_heads
    for group, i in layers:
        p = jax.tree.map(lambda x: x[i], params[group])
        qkv = np.einsum("td,dgse->tgse", rms(h, p["norm1"]["scale"], config.norm_eps), p["grouped_qkv"]["kernel"])
        q, k, v = qkv[:, :, :share].reshape(len(h), config.num_heads, -1), qkv[:, :, share], qkv[:, :, share + 1]
        q, k = (turned(rms(x, p[name]["scale"], config.norm_eps), position, config.rope_theta, config.rotary_dim)
                for x, name in ((q, "q_norm"), (k, "k_norm")))
        h = h + np.einsum("the,hed->td", attention(q, k, v, mask), p["out"]["kernel"])
        x = rms(h, p["norm2"]["scale"], config.norm_eps)
        if seen is not None and group == "blocks1":
            seen(p, x)
        h = h + (swiglu(p["mlp"], x) if group == "blocks0" else mixture(config, p, x))
    h = rms(h, params["head"]["norm"]["scale"], config.norm_eps)
    kernel = params["embed"]["embedding"].T if config.tie_embeddings else params["head"]["linear"]["kernel"]
    return (h @ kernel)[:, :config.vocab_size]


@functools.partial(jax.jit, static_argnames=("model", "execution"))
def two_stream(model, params, xt, x0, execution=trunk.Execution("dense", "scan", "none", False)):
    position, segment = forward.single_document_rows(x0)
    out = forward.two_stream_out(model, params, xt[:, None], x0, position, segment, block_size=BLOCK,
                                 execution=execution)
    return trunk.logits(model, params, out.noised)[:, 0], out.aux


@pytest.mark.parametrize("changes", some([
    {}, {"dense_layers": 0, "num_layers": 1, "tie_embeddings": True}], 0), ids=["groups", "no-dense"])
def test_two_streams_in_numpy(changes):
    config = dataclasses.replace(TINY, **changes)
    model, params = network(config)
    xt, x0 = rows(0), rows(1)
    mask, place = llama_oracle.two_stream_mask(LENGTH, BLOCK)
    expected = [numpy_logits(config, params, np.concatenate([a, b[:-BLOCK]]), place, mask)[:LENGTH]
                for a, b in zip(xt, x0)]
    np.testing.assert_allclose(two_stream(model, params, xt, x0)[0], expected, atol=2e-4)


def test_two_streams_leak_nothing():
    """Which embedding rows move the logits of a block: every token of both streams is its own row. Tokens share tiles
    of an expert, and no more."""
    model, params = network(TINY)
    weight = np.random.default_rng(1).normal(size=24).astype(np.float32)

    def of_blocks(table):
        logits, _ = two_stream(model, {**params, "embed": {"embedding": table}}, np.arange(12)[None],
                               np.arange(12, 24)[None])
        return (logits[0] @ weight).reshape(3, BLOCK).sum(-1)

    seen = np.any(np.asarray(jax.jit(jax.jacrev(of_blocks))(params["embed"]["embedding"])) != 0, axis=-1)
    expected = np.zeros((3, 128), bool)
    for block in range(3):
        expected[block, block * BLOCK:(block + 1) * BLOCK] = True
        expected[block, 12:12 + block * BLOCK] = True
    np.testing.assert_array_equal(seen, expected)


@functools.partial(jax.jit, static_argnames=("model",))
def cached(model, params, noised, clean, cache, write_at):
    return run_pass(model, params, noised, clean, cache=cache, write_at=write_at, block_size=BLOCK,
                    execution=forward.DEFAULT_EXECUTION)


def part(ids, where):
    position = np.broadcast_to(np.arange(LENGTH), ids.shape)[:, where]
    return Stream(ids[:, where], position, position // BLOCK, np.ones_like(position))


def test_cached_blocks_equal_the_two_stream_pass():
    model, params = network(TINY)
    xt, x0 = rows(0), rows(1)
    whole, _ = two_stream(model, params, xt, x0)
    cache, finished = trunk.new_cache(model, params, 2, LENGTH, "compute"), None
    assert {name: len(layers) for name, layers in cache.keys.items()} == {"blocks0": 1, "blocks1": 2}
    for start in range(0, LENGTH, BLOCK):
        where = slice(start, start + BLOCK)
        noised = part(xt, where)
        out = cached(model, params, noised.replace(ids=noised.ids[:, None]), finished, cache, max(0, start - BLOCK))
        cache, finished = out.cache, part(x0, where)
        np.testing.assert_allclose(trunk.logits(model, params, out.noised)[:, 0], whole[:, where], atol=2e-4)


@pytest.mark.ci_slow
def test_balance_of_every_layer_and_stream_in_numpy():
    """The coefficient times the imbalance of the noised rows in all mixtures and of the clean ones in all but the
    last, whose outcome nobody reads."""
    config = dataclasses.replace(TINY, load_balancing=0.3)
    model, params = network(config)
    xt, x0 = rows(0), rows(1)
    mask, place = llama_oracle.two_stream_mask(LENGTH, BLOCK)
    total = []

    def seen(p, x):
        def of(tokens):
            found = [chosen(config, p, x_D) for x_D in tokens]
            f = np.bincount(np.concatenate([choice for choice, _, _ in found]), minlength=8) * 8 / (2 * len(tokens))
            return f @ np.mean([score / score.sum() for _, _, score in found], axis=0) * len(tokens)
        total.extend((of(x[:LENGTH]), of(x[LENGTH:])))

    for a, b in zip(xt, x0):
        numpy_logits(config, params, np.concatenate([a, b[:-BLOCK]]), place, mask, seen)
    total = np.array(total).reshape(2, 2, 2)  # row, layer, stream
    expected = 0.3 * (total.sum() - total[:, 1, 1].sum())
    for execution in (("dense", "scan", "none", False), ("blocked", "unroll", "full", True)):
        execution = trunk.Execution(*execution)
        assert two_stream(model, params, xt, x0, execution)[1] == pytest.approx(expected, rel=1e-4)
    assert two_stream(*network(TINY), xt, x0)[1] == 0


@pytest.mark.ci_slow
def test_padding_does_not_count_in_the_balance():
    model, params = network(dataclasses.replace(TINY, load_balancing=0.3))
    ids = rows()

    @jax.jit
    def aux(ids, segment):
        position = jnp.broadcast_to(jnp.arange(LENGTH), ids.shape)
        return forward.one_stream_out(model, params, ids, position, segment, rule="causal", block_size=1,
                                      execution=forward.DEFAULT_EXECUTION).aux

    padded = np.where(np.arange(LENGTH) < 8, 1, 0) * np.ones_like(ids)
    np.testing.assert_allclose(aux(ids, padded), aux(np.where(padded > 0, ids, 5), padded), rtol=1e-6)
    assert aux(ids, padded) < 0.8 * aux(ids, np.ones_like(ids))


@pytest.mark.ci_slow
def test_the_training_loss_holds_the_balance():
    """A whole step without and with it: the loss a token grows by the balance a token, and so do other gradients."""
    special, ids = SpecialIds(MASK, END), jnp.asarray(rows())
    batch = {"tokens": ids, "segments": jnp.ones_like(ids), "positions": forward.single_document_rows(ids)[0]}
    small = dict(num_layers=1, dense_layers=0, qk_norm=False)
    found = {}
    for balance in (0.0, 0.5):
        model = {"kind": "moe", **dataclasses.asdict(dataclasses.replace(TINY, **small, vocab_size=MASK + 1,
                                                                         load_balancing=balance))}
        config = toy_config(Path("unused"), {"model": model, "data.seq_len": LENGTH, "optim.ema_decay": 0.0})
        backbone, params = toy_network(config)
        tx = optax.sgd(1.0)
        state = TrainState(jnp.int32(0), params, {}, tx.init(params))
        after, metrics = quick_jit(make_step(config, backbone, tx, special))(state, batch)
        moved = {name: float(jnp.abs(after.params["blocks1"]["router"][name] - params["blocks1"]["router"][name]).max())
                 for name in ("kernel", "bias")}
        found[balance] = float(metrics["loss"]), moved
        if balance:
            noise_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 0))[0]
            noised = config.diffusion.corrupt(noise_key, ids, batch["segments"], noise_samples=1, mask_id=MASK,
                                              end_id=END)
            aux = quick_jit(lambda p: score(backbone, p, config.diffusion, noised, {**batch, "tokens": ids},
                                            forward.DEFAULT_EXECUTION).aux)(params)
    assert found[0.5][0] - found[0.0][0] == pytest.approx(float(aux) / ids.size, rel=1e-3) and aux > 0
    assert found[0.5][1]["kernel"] != found[0.0][1]["kernel"] and found[0.5][1]["bias"] == 0


def test_every_leaf_has_a_sharding():
    params = jax.eval_shape(lambda: trunk.init(build(TINY, jnp.float32), jax.random.key(0)))
    specs = sharding.param_specs(params, moe.SHARDING)
    jax.tree.map(lambda leaf, spec: None if len(spec) <= leaf.ndim else pytest.fail(str(spec)), params, specs)
    assert specs["blocks1"]["experts"]["gate"]["kernel"][1] == ("expert", "tensor")
    assert specs["blocks1"]["grouped_qkv"]["kernel"][2] == specs["blocks1"]["out"]["kernel"][1] == "tensor"  # heads


def test_flops_by_hand():
    """Each token goes through its own experts, not through all, and their results are added up."""
    config, objective, length = dataclasses.replace(TINY, vocab_size=128), Masked.uniform_counts(64), 64
    projections = 16 * (4 * 6 + 2 * 2 * 6) + 4 * 6 * 16
    dense, sparse = 3 * 16 * 20, 3 * 16 * (2 * 10 + 12) + 16 * 8 + 2 * 16
    tokens = 2 * length * (3 * projections + dense + 2 * sparse)
    expected = tokens + 4 * 24 * 3 * length * length + 2 * 16 * 128 * flops.scored_positions(objective, 1, length, 1)
    assert flops.forward(config, objective, batch=1, length=length,
                         noise_samples=1) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("change, message", [
    ({"dense_layers": 3}, "model.dense_layers is 3, expected 0 to model.num_layers - 1 = 2"),
    ({"rotary_dim": 8}, "model.rotary_dim is 8, expected an even number up to model.head_dim=6"),
    ({"groups": 3}, "model.groups=3 must divide model.num_experts=8"), ({"groups": 8}, "groups of at least 2"),
    ({"top_groups": 5}, "model.top_groups=5 of 4 groups"), ({"top_k": 5}, "hold 4 experts"),
    ({"load_balancing": -1.0}, "model.load_balancing=-1.0 must be at least 0"),
])
def test_wrong_config(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **change)

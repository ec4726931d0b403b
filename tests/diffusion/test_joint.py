"""Block diffusion and next-token prediction in one pass: who reads whom, the loss by separate passes, both modes."""

import dataclasses
import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_lm import CONTEXT, END, LETTERS, MASK, make_ids, make_lm, masked
from toy_runs import quick_jit, toy_config

import bd3lm_jax
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import Joint
from bd3lm_jax.diffusion.masked import cross_entropy_subs
from bd3lm_jax.generation import batch, plan
from bd3lm_jax.generation.denoise import UncachedDenoiser
from bd3lm_jax.models import build, trunk
from bd3lm_jax.models.forward import DEFAULT_EXECUTION
from bd3lm_jax.scoring.score import score, total_loss

SIZE, WEIGHT = 4, 0.7


def joint(size=SIZE, weight=WEIGHT):
    return Joint(**dataclasses.asdict(masked(size)), ar_weight=weight)


@functools.cache
def joint_lm(shift="", size=SIZE, weight=WEIGHT):
    lm = make_lm(joint(size, weight), tokenizer=LETTERS)
    model = dataclasses.replace(lm.config.model, target_shift=shift)
    config = dataclasses.replace(lm.config, model=model)
    return bd3lm_jax.LM(config, lm.params, LETTERS, build(model, jnp.float32), CONTEXT)


def packed_rows():
    """Rows of 12 tokens: one document, two, and two with padding; documents begin at multiples of the block size."""
    lengths = [[12], [4, 8], [4, 5]]
    position, segment = np.zeros((2, len(lengths), 12), np.int32)
    for row, documents in enumerate(lengths):
        ends = np.cumsum(documents)
        for number, (size, end) in enumerate(zip(documents, ends)):
            position[row, end - size:end], segment[row, end - size:end] = np.arange(size), number + 1
    return {"tokens": jnp.asarray(make_ids(3, 12)), "positions": jnp.asarray(position),
            "segments": jnp.asarray(segment)}


# ---- who reads whom


@functools.partial(jax.jit, static_argnums=(0,))
def _hidden(shift, xt_BxL, rows):
    """Features of the noised and of the clean stream, in the places of the tokens that they predict."""
    lm = joint_lm(shift)
    noised = lm.config.diffusion.corrupt(jax.random.key(0), rows["tokens"], rows["segments"], 1, MASK, END)
    noised = noised.replace(xt_BxMxL=xt_BxL[:, None], capacity=12)
    scored = score(lm.model, lm.params, lm.config.diffusion, noised, rows, DEFAULT_EXECUTION, END)
    return scored.features_BxMxCxD[:, 0], scored.clean.features_BxMxCxD[:, 0]


@pytest.mark.parametrize("shift", ["", "block"])
def test_who_is_seen(shift):
    """By changing one token at a time, in rows of one and of several documents."""
    rows, xt = packed_rows(), make_ids(3, 12, seed=2)
    joint_lm(shift)
    base = [np.asarray(x) for x in _hidden(shift, xt, rows)]
    position, segment = np.asarray(rows["positions"]), np.asarray(rows["segments"])
    block, place = position // SIZE, np.arange(12)
    for changed in range(12):
        for of_noised in (True, False):
            ids = np.array(xt if of_noised else rows["tokens"])
            ids[:, changed] = (ids[:, changed] + 1) % END
            after = _hidden(shift, ids, rows) if of_noised else _hidden(shift, xt, {**rows, "tokens": jnp.asarray(ids)})
            noised, clean = (np.abs(x - y).max(-1) > 1e-6 for x, y in zip(map(np.asarray, after), base))
            same = (segment == segment[:, [changed]]) & (segment > 0)
            if of_noised:
                expected = same & (block == block[:, [changed]])
                if shift == "block":  # the last token of a block is read by no other
                    expected &= (changed % SIZE < SIZE - 1) & (segment[:, [(changed + 1) % 12]] > 0)
                assert not clean.any()
            else:
                expected = same & (block > block[:, [changed]])
                np.testing.assert_array_equal(clean & (segment > 0), same & (place > changed))
            np.testing.assert_array_equal(noised & (segment > 0), expected, err_msg=f"{changed} {of_noised}")


# ---- the loss


def oracle_mask(segment_L, position_L, size):
    """Who sees whom of noised and then clean tokens of a row, `[2L, 2L]`, pair by pair."""
    length = len(segment_L)
    mask = np.zeros((2 * length, 2 * length), bool)
    for q, k in itertools.product(range(2 * length), repeat=2):
        i, j = q % length, k % length
        if segment_L[i] != segment_L[j] or segment_L[i] == 0:
            continue
        own, before = position_L[i] // size == position_L[j] // size, position_L[j] // size < position_L[i] // size
        if q < length:
            mask[q, k] = own if k < length else before
        else:
            mask[q, k] = k >= length and j <= i
    return mask


def oracle_logits(lm, params, ids_BxN, position_BxN, mask_BxNxN):
    """Logits `[B, N, V]` of tokens under an explicit mask: every layer called by hand."""
    model, ids, position = lm.model, jnp.asarray(ids_BxN), jnp.asarray(position_BxN)
    mask = jnp.asarray(mask_BxNxN)[:, None]
    h = model.embed.apply({"params": params["embed"]}, ids, position)
    cond = model.condition.apply({"params": params["condition"]}, jnp.zeros((1, 1)))
    rotary = model.rotary(position)
    for name, block, count in model.groups:
        for layer in range(count):
            variables = {"params": jax.tree.map(lambda x, layer=layer: x[layer], params[name])}
            q, k, v = block.apply(variables, h, cond, rotary, True, method=block.project_qkv)
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
            weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
            attended = jnp.einsum("bhqk,bkhd->bqhd", jnp.where(mask.any(-1, keepdims=True), weights, 0), v)
            h = block.apply(variables, h, attended, cond, None, method=block.attention_output_and_mlp)[0]
    return trunk.logits(model, params, h)


def next_token_nats(lm, params, tokens_BxL, position_BxL, segment_BxL):
    """-log p(x_i | x_<i) by a causal pass over every document, of the first token by the end token alone: `[B, L]`."""
    place = np.arange(tokens_BxL.shape[1])
    causal = (segment_BxL[:, :, None] == segment_BxL[:, None]) & (place[:, None] >= place)
    logits = oracle_logits(lm, params, tokens_BxL, position_BxL, causal)
    zero = np.zeros((1, 1), int)
    begin = oracle_logits(lm, params, zero + END, zero, np.ones((1, 1, 1), bool))
    logits = jnp.where((position_BxL == 0)[..., None], begin, jnp.roll(logits, 1, axis=1))
    return jax.vmap(cross_entropy_subs, (0, 0, None))(logits, tokens_BxL, MASK)


def by_hand(params, lm, noised, rows):
    """(summed loss of the noised copies, cross-entropy of the next tokens) in nats, row by row by dense oracles."""
    tokens, position, segment = (np.asarray(rows[name]) for name in ("tokens", "positions", "segments"))
    mask = np.array([oracle_mask(*row, SIZE) for row in zip(segment, position)])
    of_noised, real = 0.0, segment > 0
    for copy in range(noised.xt_BxMxL.shape[1]):
        ids = jnp.concatenate([noised.xt_BxMxL[:, copy], tokens], axis=1)
        logits = oracle_logits(lm, params, ids, np.tile(position, 2), mask)[:, :12]
        losses = jax.vmap(cross_entropy_subs, (0, 0, None))(logits, tokens, MASK)
        of_noised += jnp.sum(noised.weight_BxMxL[:, copy] * losses)
    return of_noised, jnp.sum(jnp.where(real, next_token_nats(lm, params, tokens, position, segment), 0))


@pytest.mark.parametrize("weight, noise_samples", [(WEIGHT, 2), pytest.param(0.0, 1, marks=pytest.mark.ci_slow)])
def test_loss_and_gradients_are_those_of_separate_passes(weight, noise_samples):
    """Packed documents; the gradient with weight 0 is that of masked diffusion beside a causal clean stream."""
    lm, rows = joint_lm(weight=weight), packed_rows()
    noised = lm.config.diffusion.corrupt(jax.random.key(3), rows["tokens"], rows["segments"], noise_samples, MASK, END)

    def found(params):
        scored = score(lm.model, params, lm.config.diffusion, noised, rows, DEFAULT_EXECUTION, END)
        return total_loss(lm.model, params, scored, MASK, 0)

    def expected(params):
        of_noised, of_clean = by_hand(params, lm, noised, rows)
        return of_noised + (weight * noise_samples * of_clean if weight else 0)

    (value, grads), (value2, grads2) = (quick_jit(jax.value_and_grad(f))(lm.params) for f in (found, expected))
    np.testing.assert_allclose(value, value2, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(grads2)):
        np.testing.assert_allclose(x, y, atol=2e-4 * max(1.0, float(jnp.abs(y).max())))


@pytest.mark.parametrize("shift", ["", "block"])
def test_next_tokens_in_the_joint_pass_are_those_of_the_autoregressive_mode(shift):
    lm, rows = joint_lm(shift), packed_rows()
    noised = lm.config.diffusion.corrupt(jax.random.key(0), rows["tokens"], rows["segments"], 1, MASK, END)
    scored = score(lm.model, lm.params, lm.config.diffusion, noised, rows, DEFAULT_EXECUTION, END)
    mode = lm.autoregressive
    assert mode.config.diffusion.bos_in_context == (shift == "block")
    alone = mode.config.diffusion.corrupt(None, rows["tokens"], rows["segments"], 1, MASK, END)
    expected = score(mode.model, lm.params, mode.config.diffusion, alone, rows, DEFAULT_EXECUTION, END)
    real = np.asarray(rows["segments"]) > 0
    np.testing.assert_allclose(np.asarray(scored.clean.features_BxMxCxD)[:, 0][real],
                               np.asarray(expected.features_BxMxCxD)[:, 0][real], atol=1e-5)


@pytest.mark.ci_slow
@pytest.mark.parametrize("backend", ["blocked", "splash"])
def test_attention_backends_agree(backend):
    lm, rows = joint_lm(), packed_rows()
    noised = lm.config.diffusion.corrupt(jax.random.key(1), rows["tokens"], rows["segments"], 2, MASK, END)

    def loss(params, backend):
        execution = dataclasses.replace(DEFAULT_EXECUTION, backend=backend)
        scored = score(lm.model, params, lm.config.diffusion, noised, rows, execution, END)
        return total_loss(lm.model, params, scored, MASK, 0)

    expected, found = (jax.jit(jax.grad(loss), static_argnums=1)(lm.params, name) for name in ("dense", backend))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-3), found, expected)


# ---- both likelihoods


@pytest.mark.parametrize("shift", ["", "block"])
def test_autoregressive_likelihoods_of_all_texts_sum_to_one(shift):
    """Every text of two letters of the 12."""
    lm = joint_lm(shift)
    texts = np.array(list(itertools.product(range(MASK), repeat=2)), np.int32)
    nats = lm.nll(texts, estimator="nll").per_token.sum(1)
    assert np.exp(-nats).sum() == pytest.approx(1, abs=1e-5)
    bound = lm.nll(texts[:5], estimator="exact").per_token.sum(1)
    assert np.abs(bound - nats[:5]).min() > 1e-3  # the block mode is another model


def test_exact_likelihood_by_a_plain_causal_pass():
    lm, ids = joint_lm(), make_ids(3, 10)
    position = np.tile(np.arange(10), (3, 1))
    expected = quick_jit(lambda params: next_token_nats(lm, params, ids, position, np.ones_like(ids)))(lm.params)
    found = lm.nll(ids, estimator="nll")
    np.testing.assert_allclose(found.per_token, expected, atol=1e-4)
    scored = lm.score([ids[0, :4]], [ids[0, 4:]], estimator="nll")[0]
    assert scored.nats == pytest.approx(-found.per_token[0, 4:].sum(), abs=1e-4) and scored.mc_se == 0


def test_bound_by_the_dense_oracle():
    """All masks of both blocks of two tokens."""
    lm, ids = joint_lm(size=2), make_ids(1, 4)
    found = float(lm.nll(ids, estimator="exact").per_token.sum())
    cases = list(itertools.product(range(2), ([0], [1], [0, 1])))
    rows = np.tile(ids, (len(cases), 1))
    for row, (block, chosen) in zip(rows, cases):
        row[[2 * block + i for i in chosen]] = MASK
    mask = np.tile(oracle_mask(np.ones(4), np.arange(4), 2), (len(cases), 1, 1))
    read = np.concatenate([rows, np.tile(ids, (len(cases), 1))], axis=1)
    place = np.tile(np.arange(4), (len(cases), 2))
    logits = quick_jit(lambda params: oracle_logits(lm, params, read, place, mask))(lm.params)[:, :4]
    expected = 0.0
    for one, (block, chosen) in zip(logits, cases):
        losses, ways = cross_entropy_subs(one, ids[0], MASK), 2 if len(chosen) == 1 else 1
        expected += sum(float(losses[2 * block + i]) for i in chosen) / (len(chosen) * ways)
    assert found == pytest.approx(expected, rel=1e-5)


# ---- writing


@pytest.mark.ci_slow
@pytest.mark.parametrize("shift", ["", "block"])
def test_autoregressive_texts_are_those_of_a_plain_loop(shift):
    """Greedy, without a cache; from nothing and after ragged prompts, token for token."""
    lm, length = joint_lm(shift), 10
    prompts = [[], make_ids(3, seed=4).tolist(), make_ids(5, seed=5).tolist()]
    texts = lm.generate(None, num=1, length=length, sampler="ar", temperature=0.0, min_length=10)
    texts += lm.generate(prompts[1:], length=length, sampler="ar", temperature=0.0, min_length=10)
    for prompt, text in zip(prompts, texts):
        ids = list(prompt)
        while len(ids) < length:
            read = [END, *ids] if shift or not ids else ids
            row = np.zeros((1, length + 1), np.int32)
            row[0, :len(read)] = read
            logits = np.array(lm.logits(row)[0, len(read) - 1])  # the raw causal pass: what follows is not seen
            logits[[MASK, END]] = -np.inf
            ids.append(int(np.argmax(logits)))
        assert list(text.tokens) == ids[len(prompt):]


class Uncached(UncachedDenoiser):
    """Whole rows in every call, behind a loop that stores nothing before it begins."""

    def num_prefilled(self, first_block):
        return 0


@pytest.mark.ci_slow
@pytest.mark.parametrize("sampler", ["first_hitting", "threshold", "remdm_cap"])
def test_blocks_with_a_cache_are_written_as_by_whole_passes(sampler, monkeypatch):
    """Token for token, several rows with noise."""
    with_cache, without = joint_lm(), bd3lm_jax.LM(joint_lm().config, joint_lm().params, LETTERS, joint_lm().model,
                                                   CONTEXT)
    options = {"num": 3, "length": 20, "sampler": sampler, "seed": 1, "min_length": 20}
    expected = with_cache.generate(**options)
    uncached = Uncached(without.model, SIZE, CONTEXT, without.config.diffusion.attention_rule)
    for module in (plan, batch):
        monkeypatch.setattr(module, "make_denoiser", lambda lm, plan: uncached)
    assert [x.tokens for x in without.generate(**options)] == [x.tokens for x in expected]
    block_causal = uncached._replace(rule="block_causal")  # the other rule is another model
    other = bd3lm_jax.LM(without.config, without.params, LETTERS, without.model, CONTEXT)
    for module in (plan, batch):
        monkeypatch.setattr(module, "make_denoiser", lambda lm, plan: block_causal)
    assert [x.tokens for x in other.generate(**options)] != [x.tokens for x in expected]


# ---- refused


def test_what_does_not_fit_is_refused():
    section = {"kind": "joint", **dataclasses.asdict(joint())}
    with pytest.raises(UserError, match="leaves diffusion.kind='joint' no clean stream: use smaller blocks"):
        toy_config(Path("unused"), {"diffusion": {**section, "block_size": 32}})
    with pytest.raises(UserError, match="ar_weight is -1"):
        joint(weight=-1)
    with pytest.raises(UserError, match="sampler 'ar' is for models that predict the next token"):
        make_lm(masked(4), tokenizer=LETTERS).generate(length=8, sampler="ar")

"""Other ways to compute the two-stream loss of a `dit` network, for comparison: the same numbers at another cost.

Each is `loss(model, params, objective, noised, tokens_BxL, mask_id)`: the sum over all tokens of weight * cross-entropy
in nats, float32 scalar, for one noised copy of rows that hold one document each.
"""

from typing import Any

import jax
import jax.numpy as jnp

from bd3lm_jax.attention import MaskSpec, Tokens, attend
from bd3lm_jax.attention.reference import dense_attention
from bd3lm_jax.diffusion.masked import cross_entropy_subs
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.models import Backbone, trunk
from bd3lm_jax.models.forward import single_document_rows
from bd3lm_jax.scoring.score import LossInputs, loss_positions, total_loss


def two_pass_loss(model: Backbone, params: dict, objective: Any, noised: Noised, tokens_BxL, mask_id: int):
    """The clean stream through all layers, keeping keys and values, then the noised one, which attends to them."""
    num_clean = tokens_BxL.shape[1] - objective.block_size
    spec, cond, (name, layer) = _spec(objective, tokens_BxL, num_clean), _condition(model, params), _layers(model)
    assert spec.noised is not None
    rotary = model.rotary(spec.noised.position)
    clean_rotary, noised_rotary = (jax.tree.map(cut, rotary)
                                   for cut in (lambda x: x[:, :num_clean], lambda x: x[:, None]))

    def clean_layer(h, layer_params):
        q, k, v = layer.apply({"params": layer_params}, h, cond, clean_rotary, True, method=layer.project_qkv)
        attended = attend("auto", spec.replace(noised=None), None, (q, k, v), None)[1]
        return layer.apply({"params": layer_params}, h, attended, cond, None,
                           method=layer.attention_output_and_mlp)[0], (k, v)

    def noised_layer(h, xs):
        layer_params, (k, v) = xs
        qkv = layer.apply({"params": layer_params}, h, cond, noised_rotary, True, method=layer.project_qkv)
        attended = attend("auto", spec, qkv, (None, k, v), None)[0]
        return layer.apply({"params": layer_params}, h, attended, cond, None,
                           method=layer.attention_output_and_mlp)[0], None

    def embedded(ids):
        return model.embed.apply({"params": params["embed"]}, ids)

    last = jax.tree.map(lambda x: x[-1], params[name])
    h, stored = jax.lax.scan(clean_layer, embedded(tokens_BxL[:, :num_clean]),
                             jax.tree.map(lambda x: x[:-1], params[name]))
    kv = layer.apply({"params": last}, h, cond, clean_rotary, False, method=layer.project_qkv)[1:]
    stored = jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), stored, kv)
    h, _ = jax.lax.scan(noised_layer, embedded(noised.xt_BxMxL), (params[name], stored))
    index = loss_positions(noised.weight_BxMxL > 0, noised.capacity)
    target, weight = (jnp.take_along_axis(x, index, axis=2) for x in (tokens_BxL[:, None], noised.weight_BxMxL))
    features = trunk.features(model, params, jnp.take_along_axis(h, index[..., None], axis=2))
    return total_loss(model, params, LossInputs(features, target, weight, index), mask_id, chunk=0)


def published_loss(model: Backbone, params: dict, objective: Any, noised: Noised, tokens_BxL, mask_id: int):
    """One pass over [noised; clean] with a dense 2L x 2L mask, the output layer on all 2L positions."""
    length = tokens_BxL.shape[1]
    spec, cond, (name, layer) = _spec(objective, tokens_BxL, length), _condition(model, params), _layers(model)
    assert spec.noised is not None and spec.clean is not None
    rotary = model.rotary(jnp.concatenate([spec.noised.position, spec.clean.position], axis=1))

    def one_layer(h, layer_params):
        qkv = layer.apply({"params": layer_params}, h, cond, rotary, True, method=layer.project_qkv)
        noised_qkv, clean_qkv = zip(*(jnp.split(x, 2, axis=1) for x in qkv))
        attended: Any = dense_attention(spec, tuple(x[:, None] for x in noised_qkv), clean_qkv, None)
        attended = jnp.concatenate([attended[0][:, 0], attended[1]], axis=1)
        return layer.apply({"params": layer_params}, h, attended, cond, None,
                           method=layer.attention_output_and_mlp)[0], None

    h = model.embed.apply({"params": params["embed"]}, jnp.concatenate([noised.xt_BxMxL[:, 0], tokens_BxL], axis=1))
    h, _ = jax.lax.scan(one_layer, h, params[name])
    logits = trunk.logits(model, params, h)[:, :length]
    losses = cross_entropy_subs(logits.reshape(-1, logits.shape[-1]), tokens_BxL.reshape(-1), mask_id)
    return jnp.sum(noised.weight_BxMxL.reshape(-1) * losses)


def _spec(objective, tokens_BxL, num_clean: int) -> MaskSpec:
    """Both streams, the clean one without what comes after its first `num_clean` tokens."""
    position, segment = single_document_rows(tokens_BxL)
    noised = Tokens(position, position // objective.block_size, segment, 1)
    clean = jax.tree.map(lambda x: x[:, :num_clean], noised.replace(noise_sample=None)).replace(noise_sample=0)
    return MaskSpec(rule="block_causal", block_size=objective.block_size, aligned=True, one_document=True, cache=None,
                    noised=noised, clean=clean)


def _condition(model, params):
    return model.condition.apply({"params": params["condition"]}, jnp.zeros((1, 1)))


def _layers(model) -> tuple[str, Any]:
    """Name and module of its only group of layers. Any: what its methods return has no other type."""
    (name, layer, _), = model.groups
    return name, layer

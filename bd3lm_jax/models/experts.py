"""A mixture of experts: who goes to which expert, and the experts' products.

No token is dropped and none waits for another: the assignments are sorted into tiles of one expert each, and every tile
is a product of its own. Under a mesh each device takes its own experts of the axes "expert" and "tensor". Devices along
"tensor" hold the same rows; those along "expert" hold rows of their own, which all of them see for this while: where a
token goes to as many experts as there are such devices, or more, sending it where it goes would be no less.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from bd3lm_jax.parallel.sharding import BATCH_AXES, EXPERT_AXES, divisible_axes

TILES = 3  # of an expert that a chunk has room for: what it needs when all are chosen alike, and half as many again


class Routing(NamedTuple):
    """Of each token its k experts, int32 `[..., k]`, and their weights; the scores of all experts `[..., E]`, float32.
    """

    choice: jax.Array
    weight: jax.Array
    score: jax.Array


def route(logits, bias_E, *, groups: int, top_groups: int, top_k: int, scale: float) -> Routing:
    """Grouped routing by sigmoid scores (DeepSeek-V3, arXiv 2412.19437, section 2.1.2; LLaDA2).

    A token goes to its best `top_k` experts by score + bias among its best `top_groups` groups, which are ranked by the
    sum of their two best. The bias has no part in the weights: scores normalised over the chosen, times `scale`.

    logits: float32 `[..., E]`. bias_E: moves the choice alone and has no gradient.
    """
    score = jax.nn.sigmoid(logits)
    ranked = jax.lax.stop_gradient(score + bias_E)
    grouped = ranked.reshape(*ranked.shape[:-1], groups, ranked.shape[-1] // groups)
    best_two = jax.lax.top_k(grouped, 2)[0].sum(-1)
    chosen_groups = jax.lax.top_k(best_two, top_groups)[1]
    group_allowed = jax.nn.one_hot(chosen_groups, groups, dtype=jnp.bool_).any(-2)
    choice = jax.lax.top_k(jnp.where(group_allowed[..., None], grouped, -jnp.inf).reshape(ranked.shape), top_k)[1]
    weight = jnp.take_along_axis(score, choice, axis=-1)
    if top_k > 1:
        weight = weight / (weight.sum(-1, keepdims=True) + 1e-20)
    return Routing(choice, weight * scale, score)


def load_balancing_loss(routing: Routing, real) -> jax.Array:
    """How unevenly the tokens of a row load the experts, times its tokens, summed over rows: float32 scalar.

    sum_e f_e P_e over a row, f_e = E / k times the part of its choices that fell on e, P_e the mean share of e in the
    scores; 1 when all are alike (arXiv 2412.19437, eq. 17 to 20). real: bool `[..., T]`, tokens that are not padding.
    """
    experts, k = routing.score.shape[-1], routing.choice.shape[-1]
    tokens = jnp.maximum(real.sum(-1, dtype=jnp.float32), 1)[..., None]
    chosen = jax.nn.one_hot(routing.choice, experts, dtype=jnp.float32).sum(-2)
    share = routing.score / (routing.score.sum(-1, keepdims=True) + 1e-20)
    f, p = (jnp.where(real[..., None], x, 0).sum(-2) / tokens for x in (chosen * experts / k, share))
    return jnp.sum((f * p).sum(-1, keepdims=True) * tokens)


def tile_shape(assignments: int, experts: int) -> tuple[int, int]:
    """Tiles, and slots of a tile, that hold so many assignments however they fall on the experts: at most about half
    as many slots again as assignments."""
    size = max(-(-assignments // (2 * experts)), 1)
    return min(assignments, assignments // size + experts), size


def moe_ffn(x, routing: Routing, gate, up, down) -> jax.Array:
    """Sum over a token's experts of weight * SwiGLU: x `[B, ..., D]` -> `[B, ..., D]`.

    gate, up `[E, D, F]`, down `[E, F, D]`, in the dtype of x. Sums are float32.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.auto_axes:
        return _moe_ffn(x, routing.choice, routing.weight, gate, up, down)
    rows = divisible_axes(mesh, BATCH_AXES, x.shape[0])
    split = divisible_axes(mesh, EXPERT_AXES, gate.shape[0]) or ()
    gathers_tokens = "expert" in split and "expert" in (rows or ()) and mesh.shape["expert"] > 1

    def local(x, choice, weight, gate, up, down):
        if gathers_tokens:
            x, choice, weight = (jax.lax.all_gather(a, "expert", tiled=True) for a in (x, choice, weight))
        first = jax.lax.axis_index(split) * gate.shape[0] if split else 0
        num_shards = math.prod(mesh.shape[axis] for axis in split)
        ffn = _moe_ffn if num_shards == 1 else functools.partial(_moe_ffn_shard, num_shards)
        out = ffn(x, choice - first, weight, gate, up, down)
        if gathers_tokens:
            out = jax.lax.psum_scatter(out, "expert", tiled=True)
        psum_axes = tuple(axis for axis in split if not (gathers_tokens and axis == "expert"))
        return jax.lax.psum(out, psum_axes) if psum_axes else out

    tokens, kernels = P(rows), P(split or None)
    return jax.shard_map(local, in_specs=(tokens,) * 3 + (kernels,) * 3, out_specs=tokens,
                         axis_names=set(mesh.auto_axes), check_vma=False)(x, routing.choice, routing.weight, gate, up,
                                                                          down)


def _moe_ffn(x, choice, weight, gate, up, down):
    """As `moe_ffn` on one device, which has all experts."""
    k, experts, shape = choice.shape[-1], gate.shape[0], x.shape
    tokens = math.prod(shape[:-1])
    x_NxD, weight_NxK = x.reshape(tokens, shape[-1]), weight.reshape(tokens, k)
    tiles, size = tile_shape(choice.size, experts)
    slot_A, expert_t = _slots(choice.reshape(-1), experts, tiles, size)
    # What no assignment fills reads token N, which is not there: zeros.
    token = jnp.full(tiles * size, tokens).at[slot_A].set(jnp.arange(choice.size) // k, mode="drop")
    x_txsxD = x_NxD.at[token].get(mode="fill", fill_value=0).reshape(tiles, size, shape[-1])
    out = _swiglu(x_txsxD, expert_t, gate, up, down).reshape(tiles * size, shape[-1])
    out_NxKxD = out.at[slot_A].get(mode="fill", fill_value=0).reshape(tokens, k, shape[-1])
    return jnp.einsum("nkd,nk->nd", out_NxKxD.astype(jnp.float32), weight_NxK).astype(x.dtype).reshape(shape)


def _moe_ffn_shard(num_shards: int, x, choice, weight, gate, up, down):
    """As `_moe_ffn` on one of so many devices that share the experts; choices outside 0 .. E - 1 are other devices'.

    Every choice may be of these experts, one in `num_shards` is: tiles come in chunks, of which empty ones cost
    nothing. A chunk is computed again for its gradient, so that memory does not grow with the devices.
    """
    k, experts, (*_, width), num_assignments = choice.shape[-1], gate.shape[0], x.shape, choice.size
    x_NxD, weight_A, chunk = x.reshape(-1, width), weight.reshape(-1), TILES * experts
    size = tile_shape(num_assignments, experts * num_shards)[1]
    tiles = -(-(num_assignments // size + experts) // chunk) * chunk
    slot_A, expert_t = _slots(choice.reshape(-1), experts, tiles, size)
    assignments_A = jnp.arange(num_assignments)
    assignment_txs = jnp.full(tiles * size, num_assignments).at[slot_A].set(assignments_A, mode="drop")
    assignment_txs = assignment_txs.reshape(tiles, size)

    @jax.checkpoint
    def chunk_output(x_NxD, weight_A, kernels, assignment_txs, expert_t):
        token_txs = assignment_txs // k  # where nothing is held token N, which is not there
        out = _swiglu(x_NxD.at[token_txs].get(mode="fill", fill_value=0), expert_t, *kernels).astype(jnp.float32)
        out = out * weight_A.at[assignment_txs].get(mode="fill", fill_value=0)[..., None]
        return jnp.zeros(x_NxD.shape, jnp.float32).at[token_txs].add(out, mode="drop")

    def add(total, part):
        arguments = x_NxD, weight_A, (gate, up, down), *part
        return jax.lax.cond((part[0] < num_assignments).any(), lambda: total + chunk_output(*arguments),
                            lambda: total), None

    chunks = assignment_txs.reshape(-1, chunk, size), expert_t.reshape(-1, chunk)
    total, _ = jax.lax.scan(add, jnp.zeros(x_NxD.shape, jnp.float32), chunks)
    return total.astype(x.dtype).reshape(x.shape)


def _swiglu(x_txsxD, expert_t, gate, up, down):
    """Every tile through the expert that it belongs to."""
    inner = jax.nn.silu(_products(x_txsxD, gate[expert_t])) * _products(x_txsxD, up[expert_t])
    return _products(inner, down[expert_t])


def _products(x_txsxD, kernel_txDxF):
    return jnp.einsum("tsd,tdf->tsf", x_txsxD, kernel_txDxF, preferred_element_type=jnp.float32).astype(x_txsxD.dtype)


def _slots(choice_A, experts: int, tiles: int, size: int):
    """Slot of every assignment in tiles of one expert each (tiles * size: no slot), and the expert of every tile."""
    choice_A = jnp.where((choice_A >= 0) & (choice_A < experts), choice_A, experts)
    count_E = jnp.zeros(experts + 1, jnp.int32).at[choice_A].add(1)
    order_A = jnp.argsort(choice_A, stable=True)
    rank_A = jnp.zeros_like(choice_A).at[order_A].set(
        jnp.arange(choice_A.size) - (jnp.cumsum(count_E) - count_E)[choice_A[order_A]])
    last_E = jnp.cumsum(-(-count_E[:-1] // size))
    first_E = jnp.concatenate([jnp.zeros(1, jnp.int32), last_E])  # of nobody: behind all others
    slot_A = first_E[choice_A] * size + rank_A
    expert_t = jnp.searchsorted(last_E, jnp.arange(tiles), side="right", method="compare_all")
    return jnp.where(choice_A < experts, slot_A, tiles * size), jnp.minimum(expert_t, experts - 1)

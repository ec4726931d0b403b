"""Text diffusion on one page: a small network learns to write by filling masks. `python docs/one_page.py [seed]`

Hide some characters of a text, ask a network what they were, train it to be right: this is masked diffusion (MDLM,
arXiv 2406.07524). To write, start from a canvas of masks and fill it in. "->" names the files of the library that do
the same in full. Names end in shapes: B rows, L characters a row, V kinds of them, D features, H heads of C features.
"""
import lzma
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial  # a function together with its weights, which jit accepts as an argument

L, D, HEADS, LAYERS, NEAR = 64, 96, 4, 3, 3
BATCH, STEPS, WARM_UP, RATE = 32, 1200, 20, 5e-3
VOCAB = MASK = 128  # characters are ASCII, 0..127; the mask is one more, and never an answer
norm = jax.nn.standardize  # over the last axis


def read(name):  # -> bd3lm_jax/data/corpora.py, bd3lm_jax/data/tokenizers.py
    path = Path(__file__).parents[1] / f"bd3lm_jax/data/resources/{name}.txt.xz"
    return np.frombuffer(lzma.decompress(path.read_bytes()).decode().encode("ascii", "ignore"), np.uint8).astype(int)


def corrupt(key, x0_BxL):  # -> bd3lm_jax/diffusion/corrupt.py
    """Masks k characters of each row: k is uniform in 1..L, and any k places are equally likely."""
    (rows, length), (count_key, place_key) = x0_BxL.shape, jax.random.split(key)
    level_B = (jax.random.uniform(count_key) + jnp.arange(rows) / rows) % 1  # evenly spaced, so that batches are alike
    rank_BxL = jax.random.uniform(place_key, x0_BxL.shape).argsort().argsort()
    return jnp.where(rank_BxL <= jnp.floor(level_B * length)[:, None], MASK, x0_BxL)


@jax.jit
def bound(predict, key, x0_BxL):  # -> bd3lm_jax/diffusion/masked.py, bd3lm_jax/likelihood/estimators.py
    """What each row costs at most, nats a character: an unbiased estimate of an upper bound on -log p(x0) / L.

    The bound is the integral over t in [0, 1] of 1 / t times the expected cross-entropy of the masked characters, when
    each is masked with probability t. With the integral done, 1 / k is left where k are masked: a sum over k = 1..L of
    *mean* cross-entropies of k masked characters. A uniform k instead of the sum costs a factor L; a row has L of them.
    """
    xt_BxL = corrupt(key, x0_BxL)
    nats_BxL = optax.softmax_cross_entropy_with_integer_labels(predict(xt_BxL), x0_BxL)
    return nats_BxL.mean(axis=1, where=xt_BxL == MASK)


def init(key):  # -> bd3lm_jax/models/dit.py
    def draw(i, *shape):
        return jax.random.normal(jax.random.fold_in(key, i), shape) * shape[-2] ** -0.5
    layers = {"qkv": draw(0, LAYERS, D, 3 * D), "mix": draw(1, LAYERS, D, D),
              "up": draw(2, LAYERS, D, 4 * D), "down": draw(3, LAYERS, 4 * D, D)}
    return {"near": draw(4, 2 * NEAR + 1, VOCAB + 1, D), "layers": layers, "head": draw(5, D, VOCAB)}


def network(params, x_BxL):  # -> bd3lm_jax/models/trunk.py
    """Logits [B, L, V] of a transformer in which every place sees every other. None of them is for the mask."""
    def rotate(x_BxLxHxC):  # by angles that grow with the place: attention then sees distances (RoPE, arXiv 2104.09864)
        a, b = jnp.split(x_BxLxHxC, 2, axis=-1)
        angle = jnp.arange(a.shape[1])[:, None, None] * jnp.geomspace(1, 1e-3, a.shape[-1])
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    def layer(h_BxLxD, w):
        q, k, v = jnp.split((norm(h_BxLxD) @ w["qkv"]).reshape(*x_BxL.shape, HEADS, -1), 3, axis=-1)
        seen = jax.nn.dot_product_attention(rotate(q), rotate(k), v)  # -> bd3lm_jax/attention/spec.py: who sees whom
        h_BxLxD += seen.reshape(h_BxLxD.shape) @ w["mix"]
        return h_BxLxD + jax.nn.gelu(norm(h_BxLxD) @ w["up"]) @ w["down"], None
    # A character alone says little: each place reads its neighbours as well, or training takes far longer.
    around = jax.nn.one_hot(jnp.pad(x_BxL, ((0, 0), (NEAR, NEAR)), constant_values=MASK), VOCAB + 1)
    h_BxLxD = sum(around[:, i:i + x_BxL.shape[1]] @ table_VxD for i, table_VxD in enumerate(params["near"]))
    return norm(jax.lax.scan(layer, h_BxLxD, params["layers"])[0]) @ params["head"]


def train(key, text):  # -> bd3lm_jax/training/train.py, bd3lm_jax/training/optim.py, bd3lm_jax/data/loader.py
    """Weights after STEPS batches of pieces cut anywhere from the text; step i draws from (key, i) alone."""
    rate = optax.warmup_cosine_decay_schedule(0, RATE, WARM_UP, STEPS)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=0.01))
    @jax.jit
    def step(params, state, i):
        place_key, noise_key = jax.random.split(jax.random.fold_in(key, i))
        x0_BxL = text[jax.random.randint(place_key, (BATCH, 1), 0, len(text) - L + 1) + jnp.arange(L)]
        loss, grads = jax.value_and_grad(lambda p: bound(Partial(network, p), noise_key, x0_BxL).mean())(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss
    text, params = jnp.asarray(text), init(jax.random.fold_in(key, STEPS))
    state = optimizer.init(params)
    for i in range(STEPS):
        params, state, loss = step(params, state, i)
        print(f"\rstep {i + 1} of {STEPS}: {loss / np.log(2):.2f} bits a character ", end="", file=sys.stderr)
    return params


@jax.jit
def write(predict, key, canvas_BxL):  # -> bd3lm_jax/generation/sampling/generate.py
    """Fills the masks of a canvas, one a row and call of the network, and leaves the rest. Any masked place is next: so
    do masks vanish if noise is undone in continuous time (first hitting, arXiv 2409.02908). Several at once would be
    drawn as if they did not depend on each other."""
    def step(state):
        (key, place_key, draw_key), x_BxL = jax.random.split(state[0], 3), state[1]
        place_B = jax.random.categorical(place_key, jnp.where(x_BxL == MASK, 0.0, -jnp.inf))
        here_BxL = (jnp.arange(x_BxL.shape[1]) == place_B[:, None]) & (x_BxL == MASK)
        return key, jnp.where(here_BxL, jax.random.categorical(draw_key, predict(x_BxL)), x_BxL)
    return jax.lax.while_loop(lambda state: (state[1] == MASK).any(), step, (key, canvas_BxL))[1]


if __name__ == "__main__":
    text, unseen = read("austen_train"), read("austen_persuasion")  # five novels to learn, a sixth to be measured on
    train_key, test_key, write_key = jax.random.split(jax.random.key(int(sys.argv[1]) if sys.argv[1:] else 0), 3)
    predict = Partial(network, train(train_key, text))
    pieces = unseen[:len(unseen) // (BATCH * L) * BATCH * L].reshape(-1, BATCH, L)  # bd3lm_jax/likelihood/evaluate.py
    nats = np.concatenate([bound(predict, jax.random.fold_in(test_key, i), x) for i, x in enumerate(pieces)])
    bits, error = np.array([nats.mean(), nats.std() / len(nats) ** 0.5]) / np.log(2)
    share_V = (np.bincount(text, minlength=VOCAB) + 1) / (len(text) + VOCAB)
    print(f"\n{bits:.3f} +- {error:.3f} bits a character, at most, on a novel it has not seen (standard error); "
          f"by the frequency of single characters {-np.log2(share_V)[unseen].mean():.3f}")
    canvas = np.full((6, L), MASK)
    canvas[3:, :9] = list(b"Anne was ")
    for row in write(predict, write_key, canvas):
        print(bytes(row.tolist()).decode().replace("\n", " / "))

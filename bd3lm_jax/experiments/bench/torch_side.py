"""PyTorch's side of `--baseline=torch`: its attention paths, and the two-stream network as it was published, eager.

Everything that needs PyTorch is here. It runs on the GPU if PyTorch sees one, else on all CPU cores.
"""

import os

import flax.traverse_util
import numpy as np

# Threads that wait shall sleep: spinning would count as work and slow down what runs beside. Read by the import below.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

from bd3lm_jax.experiments.bench.runner import Variant

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COMPUTE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
torch.set_num_threads(os.cpu_count())  # as many as XLA takes


def attention_variants(q_BxNxHxD: np.ndarray, k_BxNxHxD: np.ndarray, v_BxNxHxD: np.ndarray, d_out_BxNxHxD: np.ndarray,
                       mask_NxN: np.ndarray, length: int, block_size: int, flops: float) -> list[Variant]:
    """Forward and backward of `torch_sdpa` with the boolean mask and, on a GPU, of `torch_flex` with its block mask.

    The first `length` of the N tokens are the noised stream, the others the clean one.
    """
    q, k, v, d_out = (_tensor(x).to(COMPUTE).transpose(1, 2).contiguous().requires_grad_(i < 3)
                      for i, x in enumerate((q_BxNxHxD, k_BxNxHxD, v_BxNxHxD, d_out_BxNxHxD)))
    mask = _tensor(mask_NxN)

    def variant(name, attention, flops):
        return Variant(name, lambda: torch.autograd.grad(attention(q, k, v), (q, k, v), d_out), _wait, flops=flops)

    variants = [variant("torch_sdpa", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), flops)]
    if DEVICE.type == "cuda":
        variants.append(variant("torch_flex", _flex(mask_NxN.shape[0], length, block_size), None))
    return variants


def _flex(tokens: int, length: int, block_size: int):
    from torch.nn.attention import flex_attention as flex  # pyright: ignore[reportMissingImports]

    visible = flex.create_block_mask(two_stream_mask(length, block_size), None, None, tokens, tokens, device=DEVICE)
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=visible)


def two_stream_mask(length: int, block_size: int):
    """FlexAttention's `mask_mod` for `length` noised tokens followed by clean ones (BD3-LM appendix B.6)."""

    def visible(batch, head, q, kv):
        del batch, head
        q_clean, kv_clean = q >= length, kv >= length
        q_block, kv_block = (torch.where(clean, x - length, x) // block_size
                             for x, clean in ((q, q_clean), (kv, kv_clean)))
        own = ~q_clean & ~kv_clean & (q_block == kv_block)
        earlier = ~q_clean & kv_clean & (q_block > kv_block)
        return own | earlier | (q_clean & kv_clean & (q_block >= kv_block))

    return visible


class Published(torch.nn.Module):
    """The two-stream network as published: one pass over [noised; clean] with a boolean 2L x 2L mask, the output layer
    on all 2L positions, the whole matrix of log-probabilities. Weights are those of a `dit` backbone."""

    def __init__(self, params: dict, config, block_size: int, length: int):
        super().__init__()
        self.layers, self.heads = config.num_layers, config.num_heads
        self.vocab, self.length = config.vocab_size, length
        weights = {name: torch.nn.Parameter(_tensor(x)) for name, x in _flat(params)}
        self.weights = torch.nn.ParameterDict(weights)
        index = torch.arange(2 * length, device=DEVICE)
        mask = two_stream_mask(length, block_size)(None, None, index[:, None], index[None])
        size = config.hidden_size // config.num_heads
        angle = (index % length)[:, None] * config.rope_theta ** (-torch.arange(0, size, 2, device=DEVICE) / size)
        self.mask, self.cos, self.sin = mask, angle.cos()[:, None], angle.sin()[:, None]

    def forward(self, xt_BxL, x0_BxL, mask_id: int):
        """log p(x0) of every noised token, `[B, L, V]`."""
        cond = self._condition()
        h = F.embedding(torch.cat([xt_BxL, x0_BxL], 1), self.weights["embed/embedding"])
        for layer in range(self.layers):
            h = self._layer(h, cond, lambda name, layer=layer: self.weights[f"blocks/{layer}/{name}"])
        shift, scale = self._modulation(cond, lambda name: self.weights[f"head/{name}"], 2)
        h = _norm(h, self.weights["head/norm/scale"]) * (1 + scale) + shift
        logits = (h @ self.weights["head/linear/kernel"] + self.weights["head/linear/bias"]).float()
        logits = logits[:, :self.length, :self.vocab]
        is_mask = torch.arange(self.vocab, device=DEVICE) == mask_id
        return logits.masked_fill(is_mask, -1e30).log_softmax(-1)

    def _condition(self):
        w = self.weights
        features = torch.cat([torch.ones(1, 128), torch.zeros(1, 128)], 1).to(DEVICE)  # of the constant level 0
        h = F.silu(features @ w["condition/fc1/kernel"] + w["condition/fc1/bias"])
        return F.silu(h @ w["condition/fc2/kernel"] + w["condition/fc2/bias"])

    def _modulation(self, cond, weight, parts: int):
        kernel = weight("modulation/kernel")
        return (cond @ kernel.flatten(1) + weight("modulation/bias").flatten()).chunk(parts, -1)

    def _layer(self, h, cond, weight):
        shift1, scale1, gate1, shift2, scale2, gate2 = self._modulation(cond, weight, 6)
        x = _norm(h, weight("norm1/scale")) * (1 + scale1) + shift1
        q, k, v = (x @ weight("qkv/kernel").flatten(1)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k, v = (x.transpose(1, 2) for x in (self._rotate(q), self._rotate(k), v))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask).transpose(1, 2).flatten(2)
        h = h + gate1 * (x @ weight("out/kernel").flatten(0, 1))
        x = _norm(h, weight("norm2/scale")) * (1 + scale2) + shift2
        x = F.gelu(x @ weight("mlp_in/kernel") + weight("mlp_in/bias"), approximate="tanh")
        return h + gate2 * (x @ weight("mlp_out/kernel") + weight("mlp_out/bias"))

    def _rotate(self, x):
        first, second = x.chunk(2, -1)
        return torch.cat([first * self.cos - second * self.sin, second * self.cos + first * self.sin], -1).to(x.dtype)


def published_step(params: dict, config, block_size: int, optim, xt_BxL, x0_BxL, weight_BxL, mask_id: int) -> Variant:
    """A training step of `Published` with clipping and AdamW on fixed noise: the variant `torch_published`.

    Its `run` returns the loss before the update: the sum of weight * cross-entropy over the number of tokens.
    """
    network = Published(params, config, block_size, x0_BxL.shape[1]).to(DEVICE)
    adamw = torch.optim.AdamW(network.parameters(), optim.lr, (optim.beta1, optim.beta2), optim.eps, weight_decay=0)
    xt, x0, weight = _tensor(xt_BxL).long(), _tensor(x0_BxL).long(), _tensor(weight_BxL)

    def run():
        with torch.autocast(DEVICE.type, COMPUTE, enabled=COMPUTE != torch.float32):
            log_p = network(xt, x0, mask_id)
        loss = -(weight * log_p.gather(-1, x0[..., None])[..., 0]).sum() / x0.numel()
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), optim.clip_norm)
        adamw.step()
        return loss.detach()

    return Variant("torch_published", run, _wait)


def _norm(x, scale):
    return F.layer_norm(x, x.shape[-1:], scale, eps=1e-5)


def _flat(params: dict):
    """Names and arrays of all leaves, every layer's by itself: "blocks/3/qkv/kernel"."""
    for path, value in flax.traverse_util.flatten_dict(params).items():
        if path[0] == "blocks":
            yield from (("/".join((path[0], str(layer), *path[1:])), x) for layer, x in enumerate(np.asarray(value)))
        else:
            yield "/".join(path), value


def _tensor(array) -> torch.Tensor:
    return torch.tensor(np.asarray(array)).to(DEVICE)


def _wait(_) -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()

"""cuDNN's flash attention as a forward and a backward call.

`jax.nn.dot_product_attention(implementation="cudnn")` runs the same kernels but drops the gradient of the log-sum-exp
and so cannot be one part of a merged attention. Its two primitives are private: all that we know of them is here.
"""

import jax
import jax.numpy as jnp


def missing_primitive_reason() -> str | None:
    """What this jax lacks of the two primitives, in words; None when they are there."""
    try:
        module = _private()
        _ = (module._dot_product_attention_fwd_p_wrapper, module._dot_product_attention_bwd_p_wrapper,
             module.MaskType.CAUSAL, module.MaskType.PADDING, module.AttentionLayout.BTNH)
    except (ImportError, AttributeError) as error:
        return f"jax {jax.__version__} has no cuDNN attention as this library knows it ({error})"
    return None


def _private():
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


def forward(causal: bool, q_BxTxHxD, k_BxPxGxD, v_BxPxGxD, keys_B):
    """Output `[B, T, H, D]` in the dtype of q (bfloat16 or float16) and log-sum-exp float32 `[B, T, H]`.

    causal: query i sees keys 0 .. i; otherwise every query sees the first keys_B (int32, at least 1) keys.
    """
    module = _private()
    operands, settings = _call(module, causal, q_BxTxHxD, k_BxPxGxD, v_BxPxGxD, keys_B)
    out, lse_BxHxT = module._dot_product_attention_fwd_p_wrapper.bind(*operands, is_training=True, **settings)
    return out, lse_BxHxT.swapaxes(1, 2)


def backward(causal: bool, q_BxTxHxD, k_BxPxGxD, v_BxPxGxD, keys_B, lse_BxTxH, out_BxTxHxD, d_out_BxTxHxD):
    """Gradients of q, k, v in their dtypes; out and d_out in the dtype of q, lse float32."""
    module = _private()
    operands, settings = _call(module, causal, q_BxTxHxD, k_BxPxGxD, v_BxPxGxD, keys_B)
    return tuple(module._dot_product_attention_bwd_p_wrapper.bind(
        *operands, lse_BxTxH.swapaxes(1, 2), out_BxTxHxD, d_out_BxTxHxD, **settings))


def _call(module, causal, q, k, v, keys_B):
    """Operands (query, key, value, bias, two lengths, two offsets, two page tables) and settings of both calls."""
    unused = jnp.zeros(0, q.dtype)
    lengths = (unused, unused) if causal else (jnp.full(q.shape[:1], q.shape[1], jnp.int32), keys_B)
    settings = {"scale": q.shape[-1]**-0.5, "seed": 0, "dropout_rate": 0.0, "variadic_args": (False, False),
                "mask_type": module.MaskType.CAUSAL if causal else module.MaskType.PADDING,
                "layout": module.AttentionLayout.BTNH.value, "sliding_window_length": None}
    return (q, k, v, unused, *lengths, *(unused,) * 4), settings

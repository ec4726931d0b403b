"""Golden checkpoints as GGUF files, laid out as llama.cpp's converter does it."""

import json

import pytest
from places import HF
from safetensors.numpy import load_file

gguf = pytest.importorskip("gguf")
PARTS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
         "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
         **{f"self_attn.{x}_proj": f"attn_{'output' if x == 'o' else x}" for x in "qkvo"}}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def permuted(w, heads):
    """As the converter stores queries and keys: from two halves of a head to pairs."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def written(path, name, change=lambda writer: None, quantised=False, theta=None, left_out=()):
    """The golden checkpoint `name` as a GGUF file, without the tensors `left_out`."""
    config = json.loads((HF / name / "config.json").read_text())
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(theta or config["rope_parameters"]["rope_theta"])
    change(writer)
    for name_, x in load_file(HF / name / "model.safetensors").items():
        outer, kind = name_.rsplit(".", 1)
        if outer in left_out:
            continue
        if outer in OUTER:
            to = OUTER[outer]
        else:
            _, _, layer, part = outer.split(".", 3)
            to = f"blk.{layer}.{PARTS[part]}"
            heads = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}.get(part)
            x = permuted(x, config[heads]) if heads and name == "llama" else x
        if quantised and x.ndim == 2:
            raw = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{to}.{kind}", gguf.quants.quantize(x, raw), raw_dtype=raw)
        else:
            writer.add_tensor(f"{to}.{kind}", x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

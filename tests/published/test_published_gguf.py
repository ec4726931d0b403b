"""GGUF files: written here as llama.cpp's converter lays them out, read as the checkpoint they came from."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import bd3lm_jax
from bd3lm_jax.errors import UserError

gguf = pytest.importorskip("gguf")
GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "hf"
PARTS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
         "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
         **{f"self_attn.{x}_proj": f"attn_{'output' if x == 'o' else x}" for x in "qkvo"}}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
WORDS = ["<|endoftext|>", "a", "b", "c", "Ġ", "ab", "Ġa", "1", "2", "Ġab", "12"]
MERGES = ["a b", "Ġ a", "Ġ ab", "1 2"]


def permuted(w, heads):
    """As the converter stores queries and keys: from two halves of a head to pairs."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def written(path, name, change=lambda writer: None, quantised=False):
    """The golden checkpoint `name` as a GGUF file."""
    config = json.loads((GOLDEN / name / "config.json").read_text())
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    change(writer)
    for name_, x in load_file(GOLDEN / name / "model.safetensors").items():
        outer, kind = name_.rsplit(".", 1)
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


def add_tokenizer(writer, model="gpt2", pre="smollm"):
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(WORDS)
    writer.add_token_types([3] + [1] * (len(WORDS) - 1))
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_logits_of_the_checkpoint(tmp_path, name):
    lm, io = bd3lm_jax.load(written(tmp_path / "model.gguf", name)), np.load(GOLDEN / name / "io.npz")
    assert lm.tokenizer is None
    assert np.abs(lm.logits(io["input_ids"]) - io["logits"]).max() <= 5e-5 * np.abs(io["logits"]).max()


def test_quantised(tmp_path):
    """Eight bits a weight: as far off as their rounding, and not at all where nothing is quantised."""
    lm, io = bd3lm_jax.load(written(tmp_path / "model.gguf", "llama", quantised=True)), np.load(
        GOLDEN / "llama" / "io.npz")
    assert 1e-4 < np.abs(lm.logits(io["input_ids"]) - io["logits"]).max() < 0.05 * np.abs(io["logits"]).max()
    exact = load_file(GOLDEN / "llama" / "model.safetensors")["model.norm.weight"]
    np.testing.assert_array_equal(lm.params["head"]["norm"]["scale"], exact)


def test_the_tokenizer(tmp_path):
    lm = bd3lm_jax.load(written(tmp_path / "model.gguf", "llama", add_tokenizer))
    assert lm.tokenizer.encode("ab ab a12").tolist() == [5, 9, 6, 7, 8]  # digits are words of their own
    assert lm.tokenizer.decode([5, 9, 6, 7, 8]) == "ab ab a12"
    assert lm.special.end == 0 and lm.special.mask == len(WORDS)  # an id that no text has
    plain = bd3lm_jax.load(written(tmp_path / "plain.gguf", "llama", lambda w: add_tokenizer(w, pre="gpt-2")))
    assert plain.tokenizer.encode("12").tolist() == [10]


def test_a_tokenizer_of_another_kind_is_left_out(tmp_path, capsys):
    lm = bd3lm_jax.load(written(tmp_path / "model.gguf", "llama", lambda w: add_tokenizer(w, "llama")))
    assert lm.tokenizer is None and "a tokenizer of kind 'llama', 'smollm' is not read" in capsys.readouterr().err


def test_bad_files(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"no such thing")
    with pytest.raises(UserError, match="cannot read .*model.gguf .*expected a GGUF file"):
        bd3lm_jax.load(path)
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="general.architecture is 'mamba', supported: llama, qwen2, qwen3"):
        bd3lm_jax.load(path)
    extra = written(path, "llama", lambda w: w.add_tensor("rope_freqs.weight", np.ones(4, np.float32)))
    with pytest.raises(UserError, match="tensor rope_freqs.weight is not known"):
        bd3lm_jax.load(extra)

"""Keys of config.json that change the computation are read or refused, files under other names are read, quantised
ones are refused by that word."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from places import HF
from safetensors.numpy import load_file, save_file

from bd3lm_jax.checkpoints import hf
from bd3lm_jax.checkpoints.published.tensors import WEIGHTS_FILE
from bd3lm_jax.core.errors import UserError

FAMILIES = [path.name for path in sorted(HF.iterdir())]


def changed(target: Path, name: str, **keys) -> Path:
    """A golden directory with config keys replaced, or taken away where they are ..."""
    shutil.copytree(HF / name, target)
    config = {key: x for key, x in (json.loads((target / "config.json").read_text()) | keys).items() if x is not ...}
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("key, value", [
    ("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0), ("logit_scale", 0.0625),
    ("residual_multiplier", 0.22), ("num_local_experts", 8), ("no_rope_layers", [1, 0]), ("attention_chunk_size", 16),
    ("use_parallel_residual", True), ("text_config", {"hidden_size": 8}), ("query_pre_attn_scalar", 256),
])
def test_a_key_that_changes_the_computation_is_refused_by_its_name(name, key, value, tmp_path):
    with pytest.raises(UserError, match=f"config.json: '{key}' is "):
        hf.from_hf_config(changed(tmp_path / name, name, **{key: value}))


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_that_switch_nothing_on_and_harmless_ones_are_passed_over(name, tmp_path, capsys):
    plain = hf.from_hf_config(HF / name)
    neutral = {"attn_logit_softcapping": None, "logit_scale": 1.0, "alibi_slopes": [], "torch_dtype": "bfloat16",
               "dtype": "bfloat16", "_name_or_path": "x", "quantization_config": None}
    assert hf.from_hf_config(changed(tmp_path / "neutral", name, **neutral)) == plain
    assert "unknown keys" not in capsys.readouterr().err
    assert hf.from_hf_config(changed(tmp_path / "other", name, freckles=3)) == plain
    assert "unknown keys are not read: freckles" in capsys.readouterr().err


LLAMA = {"rope_parameters": ..., "rope_theta": 500000.0}
PER_LAYER = {"full_attention": {"rope_theta": 5e5, "rope_type": "default"},
             "sliding_attention": {"rope_theta": 5e5, "rope_type": "default"}}


@pytest.mark.parametrize("keys", [
    LLAMA, {"rope_theta": 500000.0}, {"rope_parameters": PER_LAYER},
    {"rope_parameters": {"rope_theta": 5e5, "type": "default", "partial_rotary_factor": 1.0}},
    {"rope_parameters": {"full_attention": PER_LAYER["full_attention"], "sliding_attention": {"rope_theta": 1e4}},
     "layer_types": ["full_attention"] * 2},
    {"rope_scaling": {"rope_type": "default"}}, {"partial_rotary_factor": 1.0},
])
def test_one_rope_under_all_its_names(keys, tmp_path):
    assert hf.from_hf_config(changed(tmp_path / "llama", "llama", **keys)) == hf.from_hf_config(HF / "llama")


@pytest.mark.parametrize("name, keys, message", [
    ("llama", {"rope_theta": 1e4}, "'rope_theta' is 10000.0 and rope_parameters says 500000.0"),
    ("llama", {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}}, "'partial_rotary_factor' is 0.5"),
    ("llama", {"partial_rotary_factor": 0.25}, "'partial_rotary_factor' is 0.25"),
    ("llama", {"rope_parameters": PER_LAYER | {"sliding_attention": {"rope_theta": 1e4}}}, "differs between kinds"),
    ("llama", {"rope_parameters": {"rope_theta": 5e5, "rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
    ("llama", {"rope_parameters": {"rope_theta": 5e5, "attention_factor": 0.5}}, "'attention_factor' is 0.5"),
    ("llama", LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear",
                       "factor": 4.0}}, "contradict each other: 'factor' is 4.0 and 2.0"),
    ("llama", {"layer_types": ["linear_attention", "full_attention"]}, "'layer_types' is"),
    ("llama", {"attention_bias": True}, "'attention_bias' is True"),
    ("llada2_moe", {"partial_rotary_factor": 0.25, "rotary_dim": 4}, "'rotary_dim' is 4 and partial_rotary_factor"),
    ("modernbert", {"global_rope_theta": 1e4}, "'global_rope_theta' is 10000.0 and rope_parameters says"),
    ("modernbert", {"rope_parameters": {"full_attention": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0},
                                        "sliding_attention": {"rope_theta": 1e4}}}, "'rope_type' is 'linear'"),
    ("bert", {"position_embedding_type": "relative_key"}, "'position_embedding_type' is 'relative_key'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse_layer_idx' is True"),
    ("llada", {"clip_qkv": 8.0}, "'clip_qkv' is 8.0"),
])
def test_another_rope_window_or_bias_is_refused_by_its_key(name, keys, message, tmp_path):
    with pytest.raises(UserError, match=message):
        hf.from_hf_config(changed(tmp_path / name, name, **keys))


def test_the_part_that_rope_turns_is_read_in_both_places(tmp_path):
    part = {"rope_theta": 6e5, "rope_type": "default", "partial_rotary_factor": 0.5}
    moved = changed(tmp_path / "moved", "llada2_moe", rope_parameters=part, rope_theta=..., partial_rotary_factor=...)
    assert hf.from_hf_config(moved) == hf.from_hf_config(HF / "llada2_moe")
    assert hf.from_hf_config(moved).model.rotary_dim == 4


@pytest.mark.parametrize("key, value", [
    ("quantization_config", {"quant_method": "gptq", "bits": 4}), ("quantization_config", {"quant_method": "awq"}),
    ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    ("quantization_config", {"quant_method": "fp8"}), ("compression_config", {"format": "pack-quantized"}),
])
def test_quantised_checkpoints_are_refused_by_that_word(key, value, tmp_path):
    with pytest.raises(UserError, match=f"this checkpoint is quantised \\('{key}' says '.*'.*: take the release"):
        hf.read_model(changed(tmp_path / "llama", "llama", **{key: value}))


def test_quantised_tensors_without_a_word_in_the_config(tmp_path):
    directory = changed(tmp_path / "llama", "llama")
    tensors = load_file(directory / WEIGHTS_FILE)
    name = "model.layers.0.mlp.up_proj.qweight"
    save_file(tensors | {name: np.zeros((4, 8), np.int32)}, directory / WEIGHTS_FILE)
    with pytest.raises(UserError, match=f"is quantised .tensor {name}"):
        hf.read_model(directory)


def renamed(target: Path, name: str, rename) -> Path:
    directory = changed(target, name)
    tensors = {rename(key): x for key, x in load_file(directory / WEIGHTS_FILE).items()}
    save_file(tensors, directory / WEIGHTS_FILE)
    return directory


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "llada2_moe", "modernbert"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.",
                                    "module.model.", "base_model.model.", "network."])
def test_names_with_what_a_trainer_put_in_front(name, prefix, tmp_path):
    described, params = hf.read_model(renamed(tmp_path / name, name, lambda key: prefix + key))
    plain = hf.read_model(HF / name)
    assert described == plain[0]
    np.testing.assert_array_equal(params["embed"]["embedding"], plain[1]["embed"]["embedding"])


def test_names_without_the_prefix_of_the_whole_model(tmp_path):
    directory = changed(tmp_path / "llama", "llama", tie_word_embeddings=True)
    tensors = load_file(directory / WEIGHTS_FILE)
    tensors = {key.removeprefix("model."): x for key, x in tensors.items() if key != "lm_head.weight"}
    save_file(tensors, directory / WEIGHTS_FILE)
    np.testing.assert_array_equal(hf.read_model(directory)[1]["embed"]["embedding"],
                                  hf.read_model(HF / "llama")[1]["embed"]["embedding"])


def test_weights_under_another_name(tmp_path):
    directory = changed(tmp_path / "llama", "llama")
    (directory / WEIGHTS_FILE).rename(directory / "weights.safetensors")
    assert hf.read_model(directory)[0] == hf.from_hf_config(HF / "llama")
    shutil.copy(directory / "weights.safetensors", directory / "more.safetensors")
    with pytest.raises(UserError, match="several files of weights .more.safetensors, weights.safetensors. and no"):
        hf.read_model(directory)
    names = dict.fromkeys(load_file(directory / "weights.safetensors"), "weights.safetensors")
    (directory / "other.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert hf.read_model(directory)[0] == hf.from_hf_config(HF / "llama")


@pytest.mark.parametrize("file, message", [
    ("adapter_model.safetensors", "holds an adapter alone"),
    ("model-00001-of-00002.safetensors", "weights in parts .* without model.safetensors.index.json"),
])
def test_files_that_are_not_the_weights(file, message, tmp_path):
    directory = changed(tmp_path / "llama", "llama")
    (directory / WEIGHTS_FILE).rename(directory / file)
    with pytest.raises(UserError, match=message):
        hf.read_model(directory)

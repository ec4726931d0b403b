"""Published Llama-shaped checkpoints against the logits of their own implementations, and their layouts both ways."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import some
from places import HF
from safetensors.numpy import load_file, save_file

import bd3lm_jax
from bd3lm_jax.checkpoints import hf
from bd3lm_jax.checkpoints.published import FORMATS, llada, llama
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import AR, SEDD, Masked
from bd3lm_jax.models import build, trunk
from bd3lm_jax.models.llama import LlamaConfig

NAMES = ("llama", "qwen2", "llada", "dream")


def rewritten(directory, name="llama", tensors=lambda tensors: tensors, **config):
    """A copy of a published directory with its tensors passed through a function and config keys replaced."""
    published = json.loads((HF / name / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps({key: x for key, x in published.items() if x is not ...}))
    save_file(tensors(load_file(HF / name / "model.safetensors")), directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_published_implementation(name):
    io = np.load(HF / name / "io.npz")
    lm = bd3lm_jax.load(HF / name)
    found = np.asarray(lm.logits(io["input_ids"]))
    assert np.abs(found - io["logits"]).max() <= 5e-5 * np.abs(io["logits"]).max()
    assert lm.context == 96
    expected = AR(bos=False) if name in ("llama", "qwen2") else Masked.uniform_counts(96)
    assert lm.config.diffusion == expected


@pytest.mark.parametrize("name", some(["llama", "qwen2"], 0))
def test_likelihood_is_that_of_the_published_logits(name):
    """Token i under the logits at i - 1; nothing is said of the first."""
    io, lm = np.load(HF / name / "io.npz"), bd3lm_jax.load(HF / name)
    ids, logits = np.minimum(io["input_ids"], 57)[:, :20], np.asarray(lm.logits(np.minimum(io["input_ids"], 57)))
    log_p = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p[:, :19], ids[:, 1:, None], axis=-1)[..., 0]
    found = lm.nll(ids).per_token
    np.testing.assert_allclose(found[:, 1:], expected, atol=1e-4)
    assert np.all(found[:, 0] == 0)


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_read_once_and_written_bit_for_bit(name):
    described, params = hf.read_model(HF / name)
    form = FORMATS[json.loads((HF / name / "config.json").read_text())["model_type"]]
    shapes = jax.eval_shape(lambda: trunk.init(build(described.model, jnp.float32), jax.random.key(0)))
    jax.tree.map(lambda x, y: np.testing.assert_equal((x.shape, x.dtype), (y.shape, y.dtype)), params, shapes)
    published, written = load_file(HF / name / "model.safetensors"), {}
    for path, leaf in form.layout(described.model).items():
        ours = params
        for key in path.split("."):
            ours = ours[key]
        parts = np.asarray(ours).reshape(-1, *ours.shape[len(leaf.stacked):])
        written |= dict(zip(leaf.sources(), map(leaf.write, parts), strict=True))
    assert written.keys() == published.keys()
    for key, x in published.items():
        np.testing.assert_array_equal(written[key], x)


@pytest.mark.parametrize("name", NAMES)
def test_config_out_and_in_again(name, tmp_path):
    described = hf.read_model(HF / name)[0]
    form = FORMATS[json.loads((HF / name / "config.json").read_text())["model_type"]]
    published = json.loads(json.dumps(form.to_hf_config(described.model, described.objective, described.length)))
    again = FORMATS[published["model_type"]].from_hf_config(tmp_path, published, {})
    assert again == described._replace(mask_id=-1)
    assert "block_size" not in published


def small(**changes):
    values = dict(vocab_size=50, num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8,
                  intermediate_size=64, dropout=0.0,
                  rope_theta=5e5, rope_scaling=(), norm_eps=1e-5, qkv_bias=False, qk_norm=False, tie_embeddings=False)
    return LlamaConfig(**values | changes)


@pytest.mark.parametrize("form, changes, objective, kind", [
    (llama, {}, AR(bos=False), "llama"),
    (llama, {"tie_embeddings": True, "rope_scaling": (8.0, 1.0, 4.0, 64.0)}, AR(bos=False), "llama"),
    (llama, {"rope_scaling": (2.0,)}, Masked.uniform_counts(4), "llama"),
    (llama, {"qk_norm": True, "head_dim": 16}, AR(bos=False), "qwen3"),
    (llama, {"qkv_bias": True}, Masked.uniform_counts(8), "qwen2"),
    (llama, {"qkv_bias": True, "target_shift": "row"}, Masked.uniform_counts(64), "Dream"),
    (llama, {"target_shift": "block"}, Masked.uniform_counts(4), "llama"),
    (llama, {}, dataclasses.replace(Masked.uniform_counts(4), corruption="bernoulli", clip_low=0.3), "llama"),
    (llama, {}, SEDD(block_size=4, corruption="bernoulli", eps=1e-3), "llama"),
    (llama, {}, AR(bos=True), "llama"),
    (llada, {"num_kv_heads": 1, "qkv_bias": True, "tie_embeddings": True}, Masked.uniform_counts(16), "llada"),
])
def test_networks_of_ours_have_a_published_config(form, changes, objective, kind, tmp_path):
    published = json.loads(json.dumps(form.to_hf_config(small(**changes), objective, 64)))
    assert published["model_type"] == kind
    assert form.from_hf_config(tmp_path, published, {}) == (small(**changes), objective, 64, -1)


@pytest.mark.parametrize("form, changes, message", [
    (llama, {"qk_norm": True, "qkv_bias": True}, "no published architecture has both"),
    (llama, {"qkv_bias": True, "head_dim": 16}, "model.head_dim is 16, expected 8"),
    (llada, {"qk_norm": True}, "publish this network as a Llama"),
])
def test_networks_that_nobody_publishes(form, changes, message):
    with pytest.raises(UserError, match=message):
        form.to_hf_config(small(**changes), AR(bos=False), 64)


@pytest.mark.parametrize("config, message", [
    ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu', supported: 'silu'"),
    ({"attention_bias": True}, "'attention_bias' is True, supported: False"),
    ({"rms_norm_eps": ...}, "key 'rms_norm_eps' is missing"),
    ({"num_attention_heads": 5, "head_dim": None}, "hidden_size=32 is no multiple of num_attention_heads=5"),
    ({"num_key_value_heads": 3}, "model.num_kv_heads=3 does not divide model.num_heads=4"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn', supported: default, linear"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "needs the number low_freq_factor, high_freq"),
    ({"num_key_value_heads": 4}, r"misshapen: model.layers.0.self_attn.k_proj.weight \(is \[16, 32\]"),
    ({"tie_word_embeddings": True}, "lm_head.weight differs from model.embed_tokens.weight"),
    ({"block_size": 5}, "block_size is 5, expected a number of tokens that divides the context of 96"),
    ({"diffusion": {"kind": "masked", "block_size": 4}}, "'diffusion' has the keys block_size, expected kind, "),
    ({"diffusion": {"kind": "maskd"}}, "did you mean 'masked'"),
    ({"mask_token_id": "<mask>"}, "'mask_token_id' is '<mask>', expected a token id"),
])
def test_wrong_config(tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        hf.read_model(rewritten(tmp_path, **config))


@pytest.mark.parametrize("config, message", [
    ({"alibi": True}, "'alibi' is True, supported: False"),
    ({"clip_qkv": 8.0}, "'clip_qkv' is 8.0, supported: None"),
    ({"block_type": "sequential"}, "'block_type' is 'sequential', supported: 'llama'"),
    ({"n_heads": 5}, "d_model=32 is no multiple of n_heads=5"),
])
def test_wrong_llada_config(tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        hf.read_model(rewritten(tmp_path, "llada", **config))


def test_tied_head_there_or_not(tmp_path):
    """A tied network is the untied one whose head repeats the embedding."""
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    ids = np.load(HF / "llama" / "io.npz")["input_ids"]
    logits = {}
    for case, tied in (("untied", False), ("repeated", True), ("absent", True)):
        directory = tmp_path / case
        directory.mkdir()
        rewritten(directory, "llama", lambda t: {name: x for name, x in (t | {head: t[embed].copy()}).items()
                                                 if case != "absent" or name != head}, tie_word_embeddings=tied)
        logits[case] = np.asarray(bd3lm_jax.load(directory).logits(ids))
    np.testing.assert_array_equal(logits["repeated"], logits["absent"])
    np.testing.assert_allclose(logits["repeated"], logits["untied"], atol=1e-6)


def test_frequencies_of_rope_may_be_there_and_must_fit(tmp_path):
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    right = (500000.0 ** (-np.arange(4) / 4)).astype(np.float32)
    hf.read_model(rewritten(tmp_path, "llama", lambda t: t | {name: right}))
    with pytest.raises(UserError, match="not that of rope_theta 500000"):
        hf.read_model(rewritten(tmp_path, "llama", lambda t: t | {name: right * 2}))


@pytest.mark.parametrize("name, config, context", [
    ("llama", {"model_type": "mistral", "sliding_window": 32}, 32),
    ("llama", {"model_type": "mistral", "sliding_window": None}, 96),
    ("qwen2", {"sliding_window": 32}, 96),
    ("qwen2", {"sliding_window": 32, "use_sliding_window": True, "layer_types": ...}, 32),
    ("qwen2", {"sliding_window": 32, "use_sliding_window": True}, 96),  # all layer_types are full_attention
    ("qwen2", {"sliding_window": 32, "layer_types": ["full_attention", "sliding_attention"]}, 96),  # switched off
    ("qwen2", {"sliding_window": 32, "use_sliding_window": True,
               "layer_types": ["full_attention", "sliding_attention"]}, 32),
])
def test_a_sliding_window_is_a_shorter_context(name, config, context, tmp_path):
    assert hf.read_model(rewritten(tmp_path, name, **config))[0].length == context


@pytest.mark.ci_slow
def test_qwen3_norms_queries_and_keys(tmp_path):
    """With scale s every query has root mean square s before RoPE, whatever the projection's size."""
    def with_norms(tensors):
        extra = {f"model.layers.{layer}.self_attn.{part}_norm.weight": np.ones(8, np.float32)
                 for layer in range(2) for part in "qk"}
        return tensors | extra
    ids = np.load(HF / "llama" / "io.npz")["input_ids"]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    grown = {f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in range(2) for part in "qk"}
    one = rewritten(tmp_path / "a", "llama", with_norms, model_type="qwen3")
    two = rewritten(tmp_path / "b", "llama", lambda t: {name: 9 * x if name in grown else x
                                                        for name, x in with_norms(t).items()}, model_type="qwen3")
    first, second = (np.asarray(bd3lm_jax.load(directory).logits(ids)) for directory in (one, two))
    np.testing.assert_allclose(first, second, atol=2e-3)
    assert np.abs(first - np.load(HF / "llama" / "io.npz")["logits"]).max() > 0.05


def test_mask_id_is_the_named_one(tmp_path):
    assert hf.read_model(HF / "dream")[0].mask_id == 58
    assert hf.read_model(HF / "llama")[0].mask_id == -1


@pytest.mark.ci_slow
def test_a_row_is_not_padded_to_the_context(tmp_path):
    """The context of 2^20 tokens would need a mask of 2^40 entries."""
    shutil.copytree(HF / "llada", tmp_path / "long")
    lm = bd3lm_jax.load(rewritten(tmp_path / "long", "llada", max_sequence_length=2**20))
    io = np.load(HF / "llada" / "io.npz")
    assert np.abs(lm.logits(io["input_ids"]) - io["logits"]).max() <= 5e-5 * np.abs(io["logits"]).max()
    assert np.isfinite(lm.nll(np.minimum(io["input_ids"], 57), draws=1).mean)


@pytest.mark.ci_slow
def test_a_text_is_written_on_a_canvas_of_its_length(tmp_path):
    """As by the same network whose context is so long, and no place beyond is filled."""
    short = bd3lm_jax.load(rewritten(tmp_path, "llada", max_sequence_length=24))
    whole = bd3lm_jax.load(HF / "llada")
    found, expected = (lm.generate([[3, 4, 5]], length=24, seed=1)[0] for lm in (whole, short))
    assert found.nfe <= 21 and list(found.tokens) == list(expected.tokens)


def test_a_model_that_masks_needs_a_mask(tmp_path):
    lm = bd3lm_jax.load(rewritten(tmp_path, "llada", mask_token_id=...))
    assert lm.logits([[1, 2, 3]]).shape == (1, 3, 59)
    for use in (lambda: lm.nll([[1, 2, 3]]), lambda: lm.generate(length=8)):
        with pytest.raises(UserError, match="nor its tokenizer says which token is the mask"):
            use()

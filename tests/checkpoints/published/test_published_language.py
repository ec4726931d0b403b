"""GPT-2, BERT, RoBERTa and ModernBERT as published: their outputs, their files written back bit for bit, and what is
refused."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from grids import some
from places import HF
from safetensors.numpy import load_file, save_file
from scipy.special import log_softmax

import bd3lm_jax
from bd3lm_jax.checkpoints import hf
from bd3lm_jax.checkpoints.published import FORMATS
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import AR, Masked
from bd3lm_jax.models import build, forward, trunk
from bd3lm_jax.scoring import loss

NAMES = ("gpt2", "bert", "roberta", "modernbert")


@functools.cache
def published(name):
    return bd3lm_jax.load(str(HF / name)), dict(np.load(HF / name / "io.npz"))


@functools.cache
def config_of(name):
    return json.loads((HF / name / "config.json").read_text())


def rewritten(tmp_path, name, tensors=lambda tensors: tensors, **config):
    """A copy of a published directory with its tensors passed through a function and config keys replaced."""
    content = {key: value for key, value in (config_of(name) | config).items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(content))
    save_file(tensors(load_file(HF / name / "model.safetensors")), tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_logits(name):
    lm, io = published(name)
    found = lm.logits(io["input_ids"])
    assert found.dtype == jnp.float32 and found.shape == io["logits"].shape
    assert np.abs(found - io["logits"]).max() < 2e-6 * np.abs(io["logits"]).max()


@pytest.mark.parametrize("name", some(NAMES, 0))
def test_losses_through_features_and_output_layer(name):
    """What training and bounds use, without the matrix of all logits; on tiles where the logits' test was dense."""
    lm, io = published(name)
    ids, targets = io["input_ids"], np.roll(io["input_ids"], 1, axis=1)
    rule = "causal" if name == "gpt2" else "bidirectional"

    @jax.jit
    def losses(params):
        h = forward.one_stream(lm.model, params, ids, *forward.single_document_rows(ids), rule=rule, block_size=1,
                               execution=dataclasses.replace(forward.DEFAULT_EXECUTION, backend="blocked"))
        output = loss.OutputLayer(*trunk.output_layer(lm.model, params)).exclude_tokens(-1, lm.config.model.vocab_size)
        return loss.token_losses(output, trunk.features(lm.model, params, h), targets, 7)

    expected = -np.take_along_axis(log_softmax(io["logits"].astype(np.float64), -1), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(losses(lm.params), expected, atol=5e-5)


@pytest.mark.ci_slow
def test_likelihood_of_gpt2():
    lm, io = published("gpt2")
    mask, ids, logits = lm.special.mask, io["input_ids"], io["logits"].astype(np.float64)
    if mask >= 0:  # a token that is never predicted
        logits[..., mask] = -np.inf
    ids = ids[:, :next((i for i in range(24) if (ids[:, i] == mask).any()), 24)]
    assert ids.shape[1] > 4
    expected = -np.take_along_axis(log_softmax(logits, -1)[:, :ids.shape[1] - 1], ids[:, 1:, None], -1)[..., 0]
    found = lm.nll(ids).per_token
    np.testing.assert_allclose(found[:, 1:], expected, atol=5e-5)
    np.testing.assert_array_equal(found[:, 0], 0)


@pytest.mark.ci_slow
def test_gpt2_writes_what_its_logits_say():
    """Every token written with the cache is the likeliest of the pass over the whole row so far."""
    lm, io = published("gpt2")
    prompt = io["input_ids"][0, :5].tolist()
    row = prompt + list(lm.generate([prompt], length=12, top_k=1)[0].tokens)
    logits = np.array(lm.logits(np.array([row])))[0]
    logits[:, [i for i in (lm.special.mask,) if i >= 0]] = -np.inf
    assert len(row) == 12 and row[5:] == logits[4:-1].argmax(-1).tolist()
    with pytest.raises(UserError, match="has learned 24 positions: it cannot write more, nor with a sliding window"):
        lm.generate([prompt], length=40, window=True)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_have_the_tree_of_init(name):
    described, params = hf.read_model(HF / name)
    expected = jax.eval_shape(lambda key: trunk.init(build(described.model, jnp.float32), key), jax.random.key(0))
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(lambda x, y: np.testing.assert_equal((x.shape, x.dtype), (y.shape, y.dtype)), params, expected)


def written(form, model, params) -> dict[str, np.ndarray]:
    """Tensors under their published names from our parameters."""
    tensors, flat = {}, {".".join(path): np.asarray(x) for path, x in flatten_dict(params).items()}
    for path, leaf in form.layout(model).items():
        parts = flat[path].reshape(-1, *flat[path].shape[len(leaf.stacked):])
        tensors |= {source: leaf.write(part) for source, part in zip(leaf.sources(), parts, strict=True)}
    return tensors


@pytest.mark.parametrize("name", NAMES)
def test_weights_go_back_bit_for_bit(name):
    described, params = hf.read_model(HF / name)
    expected = load_file(HF / name / "model.safetensors")
    found = written(FORMATS[name], described.model, params)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        np.testing.assert_array_equal(found[key], value)


OURS = {"architectures", "model_type", "vocab_size", "tie_word_embeddings"}
ARCHITECTURE = {  # keys of the published config that say what the network computes
    "gpt2": OURS | {"activation_function", "add_cross_attention", "layer_norm_epsilon", "n_embd", "n_head", "n_layer",
                    "n_positions", "resid_pdrop", "scale_attn_by_inverse_layer_idx", "scale_attn_weights"},
    "bert": OURS | {"add_cross_attention", "hidden_act", "hidden_size", "intermediate_size", "is_decoder",
                    "layer_norm_eps", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
                    "pad_token_id", "type_vocab_size", "hidden_dropout_prob"},
    "modernbert": OURS | {"attention_bias", "classifier_activation", "classifier_bias", "decoder_bias", "hidden_size",
                          "hidden_activation", "intermediate_size", "layer_types", "local_attention",
                          "max_position_embeddings", "mlp_bias", "norm_bias", "norm_eps", "num_attention_heads",
                          "num_hidden_layers", "rope_parameters"},
}
ARCHITECTURE["roberta"] = ARCHITECTURE["bert"]


@pytest.mark.parametrize("name", NAMES)
def test_config_goes_back(name):
    described = hf.read_model(HF / name)[0]
    content = json.loads(json.dumps(FORMATS[name].to_hf_config(*described[:3])))
    for key in ARCHITECTURE[name]:
        assert content[key] == config_of(name)[key], key
    assert FORMATS[name].from_hf_config("config.json", content, {}) == described


@pytest.mark.parametrize("name, objective", [
    *((name, Masked.uniform_counts(4)) for name in NAMES), ("gpt2", Masked.uniform_counts(24)),
    ("bert", AR(bos=False)), ("roberta", AR(bos=False)),
])
def test_an_adapted_network_says_what_it_became(name, objective):
    model, _, length, _ = hf.read_model(HF / name)[0]
    found = FORMATS[name].from_hf_config("config.json", FORMATS[name].to_hf_config(model, objective, length), {})
    assert found[:3] == (model, objective, length)


@pytest.mark.parametrize("name, objective, message", [
    ("modernbert", AR(bos=False), "'modernbert' cannot say that the network is autoregressive"),
])
def test_objectives_that_a_config_cannot_say(name, objective, message):
    model, _, length, _ = hf.read_model(HF / name)[0]
    with pytest.raises(UserError, match=message):
        FORMATS[name].to_hf_config(model, objective, length)


def test_objectives():
    assert hf.read_model(HF / "gpt2")[0][1:] == (AR(bos=False), 24, -1)
    for name, context in (("bert", 24), ("roberta", 24), ("modernbert", 96)):
        assert hf.read_model(HF / name)[0][1:] == (Masked.uniform_counts(context), context, -1)


def test_a_named_mask_token(tmp_path):
    assert hf.read_model(rewritten(tmp_path, "bert", mask_token_id=7))[0].mask_id == 7


def test_older_keys_of_modernbert(tmp_path):
    directory = rewritten(tmp_path, "modernbert", layer_types=..., rope_parameters=..., global_attn_every_n_layers=3,
                          global_rope_theta=160000.0, local_rope_theta=10000.0)
    assert hf.read_model(directory)[0] == hf.read_model(HF / "modernbert")[0]


def same_as_golden(tmp_path, name, tensors):
    found = hf.read_model(rewritten(tmp_path, name, tensors))[1]
    jax.tree.map(np.testing.assert_array_equal, found, hf.read_model(HF / name)[1])


def test_gpt2_without_prefix_and_with_what_older_versions_kept(tmp_path):
    def older(tensors):
        mask = np.tril(np.ones((24, 24), np.float32))[None, None]
        kept = {f"h.{i}.attn.bias": mask for i in range(2)} | {f"h.{i}.attn.masked_bias": np.float32(-1e4)
                                                               for i in range(2)}
        plain = {key.removeprefix("transformer."): value for key, value in tensors.items()}
        return plain | {key: np.asarray(value) for key, value in kept.items()} | {
            "lm_head.weight": tensors["transformer.wte.weight"].copy()}
    same_as_golden(tmp_path, "gpt2", older)


def test_bert_with_a_pooler_a_second_table_and_old_names_of_norms(tmp_path):
    def older(tensors):
        tensors = {key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
                   for key, value in tensors.items()}
        return tensors | {
            "bert.pooler.dense.weight": np.ones((32, 32), np.float32),
            "bert.pooler.dense.bias": np.ones(32, np.float32),
            "cls.seq_relationship.weight": np.ones((2, 32), np.float32),
            "cls.seq_relationship.bias": np.ones(2, np.float32),
            "bert.embeddings.position_ids": np.arange(24)[None],
            "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"].copy(),
            "cls.predictions.decoder.bias": tensors["cls.predictions.bias"].copy()}
    same_as_golden(tmp_path, "bert", older)


@pytest.mark.parametrize("name, change, message", [
    ("gpt2", {"lm_head.weight": np.zeros((59, 32), np.float32)}, "lm_head.weight differs from transformer.wte.weight"),
    ("gpt2", {"transformer.h.1.attn.bias": np.ones((1, 1, 24, 24), np.float32)}, "attn.bias is not the causal mask"),
    ("gpt2", {"transformer.h.2.ln_1.weight": np.zeros(32, np.float32)}, "unexpected: transformer.h.2.ln_1.weight"),
    ("roberta", {"lm_head.decoder.bias": np.ones(59, np.float32)}, "lm_head.decoder.bias differs from lm_head.bias"),
    ("bert", {"bert.pooler.dense.bias": np.ones(3, np.float32)}, "misshapen: bert.pooler.dense.bias"),
    ("modernbert", {"decoder.weight": np.zeros((59, 32), np.float32)}, "decoder.weight differs from model.embeddings"),
    ("modernbert", {"model.layers.0.attn_norm.weight": np.ones(32, np.float32)}, "unexpected: model.layers.0"),
])
def test_wrong_tensors(tmp_path, name, change, message):
    with pytest.raises(UserError, match=message):
        hf.read_model(rewritten(tmp_path, name, lambda tensors: tensors | change))


@pytest.mark.parametrize("name, change, message", [
    ("gpt2", {"activation_function": "relu"}, "'activation_function' is 'relu', supported: 'gelu_new' or"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "supported: False"),
    ("gpt2", {"n_inner": 7.5}, "'n_inner' is 7.5, expected int or null"),
    ("gpt2", {"n_embd": ...}, "key 'n_embd' is missing"),
    ("gpt2", {"block_size": 5}, "block_size is 5, expected a number of tokens that divides the context of 24"),
    ("bert", {"position_embedding_type": "relative_key"}, "supported: 'absolute'"),
    ("bert", {"tie_word_embeddings": False}, "supported: True"),
    ("bert", {"mask_token_id": "x"}, "'mask_token_id' is 'x', expected a token id"),
    ("roberta", {"pad_token_id": None}, "'pad_token_id' is None, expected int"),
    ("roberta", {"max_position_embeddings": 2}, "max_position_embeddings=2 leaves no position behind the first 2"),
    ("modernbert", {"norm_bias": True}, "'norm_bias' is True, supported: False"),
    ("modernbert", {"layer_types": ["full_attention"]}, "expected 3 of 'full_attention' and 'sliding_attention'"),
    ("modernbert", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}, "'rope_type' is 'yarn'"),
    ("modernbert", {"layer_types": ...}, "key 'global_attn_every_n_layers' is missing"),
])
def test_wrong_config(tmp_path, name, change, message):
    with pytest.raises(UserError, match=message):
        hf.read_model(rewritten(tmp_path, name, **change))

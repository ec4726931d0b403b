"""Published checkpoints: what is read, and one clear error for every way a file can be wrong."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from places import GOLDEN
from safetensors.numpy import load_file, save_file

import bd3lm_jax
from bd3lm_jax.checkpoints import hf
from bd3lm_jax.checkpoints.published.bd3lm import INV_FREQ
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import AR, SEDD
from bd3lm_jax.models import build, trunk

LAYER = "backbone.blocks.1."


def rewritten(tmp_path, tensors=lambda tensors: tensors, name="bd3lm_block4", **config):
    """A copy of a published directory with its tensors passed through a function and config keys replaced."""
    published = json.loads((GOLDEN / name / "config.json").read_text()) | config
    published = {key: value for key, value in published.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(published))
    save_file(tensors(load_file(GOLDEN / name / "model.safetensors")), tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("name", ["bd3lm_block4", "bd3lm_time_conditioned", "bd3lm_block32_is_mdlm", "ar", "sedd"])
def test_parameters_have_the_tree_of_init(name):
    (config, _, length, mask_id), params = hf.read_model(GOLDEN / name)
    expected = jax.eval_shape(lambda key: trunk.init(build(config, jnp.float32), key), jax.random.key(0))
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(lambda x, y: np.testing.assert_equal((x.shape, x.dtype), (y.shape, y.dtype)), params, expected)
    assert (length, mask_id) == (32, 66)


def test_layouts():
    params = hf.read_model(GOLDEN / "bd3lm_block4")[1]
    published = load_file(GOLDEN / "bd3lm_block4" / "model.safetensors")
    qkv, out = published[LAYER + "attn_qkv.weight"], published[LAYER + "attn_out.weight"]
    modulation = published[LAYER + "adaLN_modulation.weight"]
    blocks = params["blocks"]
    part, head, place, unit = 2, 1, 5, 40  # a value, 16 wide heads of 48
    assert blocks["qkv"]["kernel"][1, unit, part, head, place] == qkv[part * 48 + head * 16 + place, unit]
    assert blocks["out"]["kernel"][1, head, place, unit] == out[unit, head * 16 + place]
    assert blocks["modulation"]["kernel"][1, 3, part, unit] == modulation[part * 48 + unit, 3]
    assert np.all(params["embed"]["embedding"][67:] == 0) and np.all(params["head"]["linear"]["bias"][67:] == 0)


def test_objectives():
    block = hf.read_model(GOLDEN / "bd3lm_time_conditioned")[0].objective
    assert (block.block_size, block.clip_low, block.clip_high) == (8, 0.3, 0.8)
    assert hf.read_model(GOLDEN / "ar")[0].objective == AR(bos=False)
    scores = hf.read_model(GOLDEN / "sedd")[0].objective
    assert scores == SEDD(block_size=32, corruption="bernoulli", eps=1e-3)


@pytest.mark.ci_slow
def test_the_release_of_mdlm(tmp_path):
    """It has the tensors of the BD3-LM release without the limits of the clip, and a shorter config."""
    golden = "bd3lm_block32_is_mdlm"
    kept = ("vocab_size", "model_length", "hidden_dim", "cond_dim", "n_blocks", "n_heads", "dropout",
            "time_conditioning")
    config = json.loads((GOLDEN / golden / "config.json").read_text())
    dropped = dict.fromkeys(config.keys() - set(kept), ...)
    directory = rewritten(tmp_path, lambda t: {name: x for name, x in t.items() if "sampling" not in name}, golden,
                          **dropped | {"model_type": "mdlm"})
    lm, io = bd3lm_jax.load(directory), np.load(GOLDEN / golden / "io.npz")
    assert (lm.config.diffusion.block_size, lm.config.diffusion.clip_high, lm.special.mask) == (32, 1.0, 66)
    np.testing.assert_allclose(lm.logits(io["xt"]), io["logits"], atol=2e-5, rtol=0)


def test_range_from_the_training_epsilon_on_is_unclipped(tmp_path):
    limits = {"sampling_eps_min": np.float32(1e-3), "sampling_eps_max": np.float32(1)}
    directory = rewritten(tmp_path, lambda t: t | {name: np.array(value) for name, value in limits.items()})
    objective = hf.read_model(directory)[0].objective
    assert (objective.clip_low, objective.clip_high) == (0.0, 1.0)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "backbone._orig_mod."])
def test_names_left_by_a_compiler(tmp_path, prefix):
    def renamed(tensors):
        return {name.replace("backbone.", prefix if "backbone" in prefix else prefix + "backbone."): x
                for name, x in tensors.items()}
    expected = hf.read_model(GOLDEN / "bd3lm_block4")[1]
    jax.tree.map(np.testing.assert_array_equal, hf.read_model(rewritten(tmp_path, renamed))[1], expected)


def test_half_precision_weights_become_float32(tmp_path):
    directory = rewritten(tmp_path, lambda t: {name: np.asarray(x, jnp.bfloat16) for name, x in t.items()
                                               if "inv_freq" not in name} | {INV_FREQ: t[INV_FREQ]})
    params, exact = hf.read_model(directory)[1], hf.read_model(GOLDEN / "bd3lm_block4")[1]
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2**-8), params, exact)


def without(name):
    return lambda tensors: {key: x for key, x in tensors.items() if key != name}


@pytest.mark.parametrize("change, message", [
    (without(LAYER + "mlp.0.bias"), f"missing: {LAYER}mlp.0.bias$"),
    (without("sampling_eps_min"), "missing: sampling_eps_min$"),
    (without(INV_FREQ), "missing: backbone.rotary_emb.inv_freq$"),
    (lambda t: t | {"backbone.blocks.2.norm1.weight": t[LAYER + "norm1.weight"]},
     "unexpected: backbone.blocks.2.norm1.weight$"),
    (lambda t: t | {LAYER + "attn_qkv.weight": np.zeros((48, 144), np.float32)},
     r"misshapen: backbone.blocks.1.attn_qkv.weight \(is \[48, 144\], expected \[144, 48\]\)$"),
    (lambda t: without(LAYER + "norm1.weight")(t) | {"other": np.zeros(1)},
     f"missing: {LAYER}norm1.weight; unexpected: other$"),
    (lambda t: t | {"_orig_mod." + LAYER + "norm1.weight": t[LAYER + "norm1.weight"]}, "norm1.weight is there twice"),
    (lambda t: t | {INV_FREQ: t[INV_FREQ] ** 2}, "not that of RoPE base 10000"),
    (lambda t: {}, "missing: .* and 25 more$"),
])
def test_wrong_tensors(tmp_path, change, message):
    with pytest.raises(UserError, match=message) as error:
        hf.read_model(rewritten(tmp_path, change))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("config, message", [
    ({"model_type": "t5"}, "model_type is 't5', supported: bd3lm"),
    ({"model_type": ...}, "model_type is None"),
    ({"algo": "d3pm"}, "algo is 'd3pm', supported: bd3lm, mdlm, ar, sedd"),
    ({"algo": "ar"}, "algo 'ar' does not go with causal=False"),
    ({"hidden_dim": ...}, "key 'hidden_dim' is missing, expected int"),
    ({"n_heads": "3"}, "'n_heads' is '3', expected int"),
    ({"adaln": 1}, "'adaln' is 1, expected bool"),
    ({"block_size": 5}, "block_size=5 must divide model_length=32"),
    ({"n_heads": 5}, "must be a multiple"),
    ({"vocab_size": 68}, "misshapen: .*vocab_embed"),
    ({"n_blocks": 3}, "missing: backbone.blocks.2"),
    ({"adaln": False}, "unexpected: .*adaLN_modulation"),
])
def test_wrong_config(tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        hf.read_model(rewritten(tmp_path, **config))


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="cannot read .*config.json"):
        hf.read_model(tmp_path / "nowhere")
    weights = rewritten(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot read .*model.safetensors"):
        hf.read_model(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="cannot read .*model.safetensors"):
        hf.read_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot read .*config.json"):
        hf.read_model(tmp_path)

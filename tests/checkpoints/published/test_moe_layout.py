"""Published LLaDA2 checkpoints against the logits of their own implementation, and their layout both ways."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from places import HF
from safetensors.numpy import load_file

import bd3lm_jax
from bd3lm_jax.checkpoints import hf
from bd3lm_jax.checkpoints.published import moe
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import Masked
from bd3lm_jax.models import build, trunk

LLADA2 = HF / "llada2_moe"


def rewritten(directory, **config):
    """A published directory with config keys replaced."""
    published = json.loads((LLADA2 / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps({key: x for key, x in published.items() if x is not ...}))
    (directory / "model.safetensors").write_bytes((LLADA2 / "model.safetensors").read_bytes())
    return directory


@pytest.mark.parametrize("block_size, name", [(..., "logits_full"), (4, "logits_block4")])
def test_logits_are_those_of_the_published_implementation(block_size, name, tmp_path):
    io = np.load(LLADA2 / "io.npz")
    lm = bd3lm_jax.load(rewritten(tmp_path, block_size=block_size))
    found = np.asarray(lm.logits(io["input_ids"]))
    assert np.abs(found - io[name]).max() <= 5e-5 * np.abs(io[name]).max()
    assert lm.config.diffusion == Masked.uniform_counts(96 if block_size is ... else 4)


def test_every_tensor_is_read_once_and_written_bit_for_bit():
    described, params = hf.read_model(LLADA2)
    shapes = jax.eval_shape(lambda: trunk.init(build(described.model, jnp.float32), jax.random.key(0)))
    jax.tree.map(lambda x, y: np.testing.assert_equal((x.shape, x.dtype), (y.shape, y.dtype)), params, shapes)
    published, written = load_file(LLADA2 / "model.safetensors"), {}
    for path, leaf in moe.layout(described.model).items():
        ours = params
        for key in path.split("."):
            ours = ours[key]
        parts = np.asarray(ours).reshape(-1, *ours.shape[len(leaf.stacked):])
        written |= dict(zip(leaf.sources(), map(leaf.write, parts), strict=True))
    assert written.keys() == published.keys()
    for key, x in published.items():
        np.testing.assert_array_equal(written[key], x)


def test_where_queries_keys_and_values_lie():
    fused = load_file(LLADA2 / "model.safetensors")["model.layers.2.attention.query_key_value.weight"]
    ours = np.asarray(hf.read_model(LLADA2)[1]["blocks1"]["grouped_qkv"]["kernel"])[1]  # [32, 2 key heads, 4, 8]
    unit, place = 5, 3
    for head in range(4):
        assert ours[unit, head // 2, head % 2, place] == fused[head * 8 + place, unit]
    for pair in range(2):
        assert ours[unit, pair, 2, place] == fused[(4 + pair) * 8 + place, unit]
        assert ours[unit, pair, 3, place] == fused[(6 + pair) * 8 + place, unit]


@pytest.mark.parametrize("objective", [Masked.uniform_counts(96), Masked.uniform_counts(4)], ids=["row", "blocks"])
def test_config_out_and_in_again(objective, tmp_path):
    model = dataclasses.replace(hf.read_model(LLADA2)[0].model, load_balancing=0.01)
    published = json.loads(json.dumps(moe.to_hf_config(model, objective, 96)))
    assert moe.from_hf_config(tmp_path, published, {}) == (model, objective, 96, -1)


@pytest.mark.parametrize("config, message", [
    ({"score_function": "softmax"}, "'score_function' is 'softmax', supported: 'sigmoid'"),
    ({"use_qkv_bias": True}, "'use_qkv_bias' is True, supported: False"),
    ({"num_experts": ...}, "key 'num_experts' is missing"),
    ({"n_group": 3}, "model.groups=3 must divide model.num_experts=8"),
    ({"num_experts": 12}, r"missing: model.layers.1.mlp.experts.10.down_proj.weight.*misshapen: "),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope scaling is not supported"),
    ({"partial_rotary_factor": 0.4}, "model.rotary_dim is 3"),
])
def test_wrong_config(tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        hf.read_model(rewritten(tmp_path, **config))

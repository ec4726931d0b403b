"""A network added from outside the package in one file: it trains on four devices in parts, samples, and is counted."""

import json

import pytest
from toy_runs import run_python, write_text

NETWORK = '''
import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
from jax.sharding import PartitionSpec as P

from bd3lm_jax.models import BACKBONES, Backbone, Entry, ModelConfig, gpt2, shared


@dataclasses.dataclass(frozen=True)
class Config(ModelConfig):
    kind: ClassVar[str] = "relu"
    num_layers: int = 2
    hidden_size: int = 32
    num_heads: int = 4
    intermediate_size: int = 48
    positions: int = 256
    norm_eps: float = 1e-5


class Block(nn.Module):
    """As GPT-2's without norms, with a ReLU and layers of names of its own."""

    config: Config
    dtype: Any

    def setup(self):
        width, heads = self.config.hidden_size, self.config.num_heads
        self.qkv = nn.DenseGeneral((3, heads, width // heads), dtype=self.dtype)
        self.out = nn.DenseGeneral(width, axis=(-2, -1), dtype=self.dtype)
        self.widen = nn.Dense(self.config.intermediate_size, use_bias=False, dtype=self.dtype)
        self.narrow = nn.Dense(width, use_bias=False, dtype=self.dtype)

    def __call__(self, h, cond, rotary):
        q, _, _ = self.project_qkv(h, cond, rotary, True)
        return self.attention_output_and_mlp(h, q, cond, None)

    def project_qkv(self, h, cond, rotary, queries):
        return shared.queries_keys_values(self.qkv, h, queries, self.dtype)

    def attention_output_and_mlp(self, h, attended, cond, dropout_keys):
        h = h + self.out(attended)
        return h + self.narrow(nn.relu(self.widen(h))), 0.0


def build(config, dtype):
    return Backbone(config=config, embed=gpt2.Embed(config, dtype), condition=None, rotary=lambda position: (),
                    groups=(("blocks", Block(config, dtype), config.num_layers),), head=gpt2.Head(config, dtype),
                    dtype=dtype, tied=True)


SHARDING = (*shared.SHARDING, (r"blocks/widen/kernel", P(None, "fsdp", "tensor")),
            (r"blocks/narrow/kernel", P(None, "tensor", "fsdp")))
BACKBONES["relu"] = Entry(Config, build, SHARDING, {"tiny": {"num_layers": 1}})
'''
RUN = """
import json, sys
from pathlib import Path
folder = Path(sys.argv[1])
sys.path.insert(0, str(folder))
import relu_network
import bd3lm_jax
from bd3lm_jax.core.schema import MeshConfig
from bd3lm_jax.models import sharding_rules
from bd3lm_jax.parallel import sharding
from bd3lm_jax.planning import flops
from bd3lm_jax.training.train import train
from configs import common, tiny
from toy_runs import LENGTH, toy_dict
preset = tiny.get_config("block_size=4")
common.set_model(preset, "relu")
values = toy_dict(folder, {"model": preset.model.to_dict(), "train.steps": 2, "mesh.data": 1, "mesh.fsdp": 2,
                           "mesh.tensor": 2, "diffusion.block_size": 4})
common.set_size(preset, "tiny")
result = train(values, folder / "run")
lm = bd3lm_jax.load(folder / "run")
places = sharding.param_shardings(lm.params, sharding.make_mesh(MeshConfig(1, 2, 2)), sharding_rules(lm.config.model))
kernel = lm.params["blocks"]["widen"]["kernel"]
counted = flops.parts(lm.config.model, lm.config.diffusion, batch=8, length=LENGTH, noise_samples=1)
print(json.dumps({"layers": preset.model.num_layers, "nll": result["train_nll"], "flops": counted.layers,
                  "part": places["blocks"]["widen"]["kernel"].shard_shape(kernel.shape),
                  "tokens": len(lm.generate(num=1, length=16)[0].tokens)}))
"""


@pytest.mark.ci_slow
def test_a_network_from_outside(tmp_path):
    (tmp_path / "relu_network.py").write_text(NETWORK)
    write_text(tmp_path / "text.txt", 60)
    done = run_python(RUN, tmp_path, devices=4)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["layers"] == 1 and 0 < found["nll"] < 10 and 0 < found["tokens"] <= 16
    assert found["part"] == [2, 16, 24]
    length, size, width, hidden = 32, 4, 32, 48
    keys_values, token = 4 * width**2, 2 * (4 * width**2 + 2 * width * hidden)
    assert found["flops"] == 8 * (2 * length * token + (length - size) * (token + keys_values))

"""A network of the size of Llama 3.2 1B, random, in bfloat16 shards: how much host memory it takes to load it."""

import dataclasses
import json
import sys

import ml_dtypes
import numpy as np
import pytest
from toy_runs import run_python

from bd3lm_jax.checkpoints.published import llama, write
from bd3lm_jax.diffusion import AR
from bd3lm_jax.models.llama import LlamaConfig

LIMIT = 1.6  # times the bytes of the weights, in anonymous memory above what the imports take
ONE_B = LlamaConfig(vocab_size=128_256, num_layers=16, hidden_size=2048, num_heads=32, num_kv_heads=8, head_dim=64,
                    intermediate_size=8192,
                    dropout=0.0, rope_theta=5e5, rope_scaling=(), norm_eps=1e-5, qkv_bias=False, qk_norm=False,
                    tie_embeddings=True)
# 0.25 billion
SMALL = dataclasses.replace(ONE_B, vocab_size=32_000, hidden_size=1024, num_heads=16, intermediate_size=4096)


def write_random(directory, config):
    """Tensors are made when they are written: this needs the memory of one file."""
    random = np.random.default_rng(0)
    tensors = [write.Tensor(name, 2 * int(np.prod(leaf.shape)), lambda shape=leaf.shape: (
        random.random(shape, np.float32) * 0.04 - 0.02).astype(ml_dtypes.bfloat16))
        for leaf in llama.layout(config).values() for name in leaf.sources()]
    directory.mkdir()
    write.write_tensors(directory, tensors, write.parse_size("500MB"))
    write.write_json(directory / "config.json", llama.to_hf_config(config, AR(bos=False), 2048))
    return sum(tensor.num_bytes for tensor in tensors)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("config", [SMALL, ONE_B], ids=["0.25B", "1B"])
def test_peak_of_loading(tmp_path, config):
    size = write_random(tmp_path / "model", config)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    result = run_python("""
        import json, sys, threading, time
        import jax
        import bd3lm_jax.lm
        jax.block_until_ready(jax.numpy.zeros(8))

        def anonymous():
            lines = open("/proc/self/status").read().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
        base, peak, done = anonymous(), 0, threading.Event()

        def watch():
            global peak
            while not done.is_set():
                peak = max(peak, anonymous())
                time.sleep(0.002)
        watcher = threading.Thread(target=watch)
        watcher.start()
        began = time.perf_counter()
        lm = bd3lm_jax.lm.load(sys.argv[1], dtype="bfloat16")
        jax.block_until_ready(lm.params)
        seconds = time.perf_counter() - began
        done.set()
        watcher.join()
        held = sum(x.nbytes for x in jax.tree.leaves(lm.params))
        print(json.dumps({"peak": peak - base, "after": anonymous() - base, "held": held, "seconds": seconds}))
        """, tmp_path / "model", timeout=1200)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    print(f"weights {size / 1e9:.3f} GB, peak {found['peak'] / size:.3f}, after {found['after'] / size:.3f} times, "
          f"{found['seconds']:.0f} s")
    assert found["held"] >= size
    assert found["peak"] <= LIMIT * size

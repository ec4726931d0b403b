"""The main job: a small block diffusion model on Jane Austen, in minutes on two CPU cores. Nothing is downloaded.

    python -m launch train
    python -m launch eval --workdir=runs/tiny
    python -m launch sample --workdir=runs/tiny

    python -m launch sweep             # the same with block sizes 1, 4 and 16

Arguments: block_size=N, algo=bd3lm|mdlm|ar|... (docs/objectives.md), e.g. --config=configs/tiny.py:algo=ar.
Hardware and time: two shared CPU cores, 3 min 36 s with data, validation, report and samples.
Expected: 2.18 to 2.23 bits per byte on *Persuasion*, by machine (three machines, seed 0, jax 0.10.2).
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    options = common.parse(arg, block_size=4, algo="bd3lm")
    config = common.base()
    config.model.update(num_layers=4, hidden_size=128, num_heads=4, dropout=0.0, rope_theta=100.0)
    config.data.update(source="austen", tokenizer="bpe:2048", seq_len=128)
    config.diffusion.corruption = "exact_count"
    config.optim.update(lr=2e-3, beta2=0.99, warmup_steps=45, schedule="wsd", decay_fraction=0.3, ema_decay=0.98)
    config.train.update(steps=900, batch_size=8)
    config.log.every = 10
    config.checkpoint.every = 300
    config.eval.update(every=300, rows=64, batch_size=64, sample_length=128)
    common.set_algo(config, options.algo, options.block_size)
    return config


def sweep():
    for block_size in (1, 4, 16):
        yield {"diffusion.block_size": block_size}

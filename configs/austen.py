"""A real small model on Jane Austen: under an hour on two CPU cores, minutes on an accelerator. Nothing is downloaded.

    python -m launch train --config=configs/austen.py
    python -m launch eval --workdir=runs/austen

Arguments: block_size=N, algo=bd3lm|mdlm|ar|... (docs/objectives.md), e.g. --config=configs/austen.py:block_size=16.
Hardware and time: two CPU cores busy with other work, 48 minutes. On an accelerator: to be measured.
Expected: 1.84 bits per byte on *Persuasion* (one training, seed 0, jax 0.10.2).
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    options = common.parse(arg, block_size=4, algo="bd3lm")
    config = common.base()
    config.model.update(num_layers=4, hidden_size=192, num_heads=3, dropout=0.0, rope_theta=500.0)
    config.data.update(source="austen", tokenizer="bpe:2048", seq_len=256)
    config.diffusion.corruption = "exact_count"
    config.optim.update(lr=1.5e-3, beta2=0.99, warmup_steps=100, schedule="wsd", decay_fraction=0.4, ema_decay=0.995)
    config.train.update(steps=3000, batch_size=8)
    config.log.every = 20
    config.checkpoint.every = 500
    config.eval.update(every=500, rows=64, batch_size=32)
    common.set_algo(config, options.algo, options.block_size)
    return config

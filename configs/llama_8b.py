"""Block diffusion with a network of Llama 3's 8B shape (arXiv 2407.21783), rows of 4096 tokens, from scratch.

The data is that of configs/owt.py, to be replaced with as many tokens as one can get (--config.data.path=DIR). What it
needs can be seen before any hardware is there:

    python -m launch train --config=configs/llama_8b.py --plan --mesh=fsdp=64
    python -m launch train --config=configs/llama_8b.py --plan --mesh=fsdp=16,tensor=4
    python -m launch train --config=configs/llama_8b.py:algo=ar --workdir=runs/llama-ar
    python -m launch train --config=configs/llama_8b.py:block_size=32 --workdir=runs/llama-32

Arguments: block_size=N, algo=bd3lm|mdlm|ar|.... The network has 8.03B parameters at its vocabulary of 128256 ids, of
which the tokenizer uses the first 50258; --config.model.vocab_size=-1 leaves the others out.

Hardware: made for 64 accelerators with 80 GB or more; weights, moments, average and gradients are split over all.
Time: to be measured; a step has 2^20 tokens. Expected: not trained by anybody yet; a step was compiled, not run.
"""

from ml_collections import ConfigDict

from configs import common

SHAPE = dict(vocab_size=128_256, num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=8, head_dim=128,
             intermediate_size=14_336,
             rope_theta=500_000.0)


def get_config(arg: str = "") -> ConfigDict:
    options = common.parse(arg, block_size=4, algo="bd3lm")
    config = common.base()
    config.data.update(source="jsonl", path="openwebtext", tokenizer="gpt2", seq_len=4096, workers=8)
    common.set_model(config, "llama")
    config.model.update(SHAPE)
    config.optim.update(lr=3e-4, beta2=0.95, weight_decay=0.1, warmup_steps=2000, schedule="cosine",
                        final_lr_fraction=0.1, ema_decay=0.0)
    config.train.update(steps=100_000, batch_size=256)
    config.compute.update(remat="full", microbatch=64)
    config.mesh.update(data=1, fsdp=-1)
    config.eval.update(rows=256, batch_size=64, sample_length=1024)
    common.set_algo(config, options.algo, options.block_size)
    return config

"""Block diffusion with a mixture of experts of LLaDA2.0-flash's shape (arXiv 2512.15745): 103B parameters, 6B a token.

32 layers of width 4096, the first one dense, the others with 256 experts of which a token takes 8, and one that all
take. The data is that of configs/owt.py, to be replaced with as many tokens as one can get (--config.data.path=DIR).
What it needs can be seen before any hardware is there:

    python -m launch train --config=configs/llada2_flash.py --plan --mesh=fsdp=16,expert=16
    python -m launch train --config=configs/llada2_flash.py --workdir=runs/flash --config.train.init_from=PUBLISHED
    python -m launch train --config=configs/llada2_flash.py:algo=mdlm --workdir=runs/flash-mdlm

Arguments: block_size=N, algo=bd3lm|mdlm|ar|.... The vocabulary has LLaDA2's 157184 ids, of which the tokenizer uses the
first 50258. The published weights go on from train.init_from with --config.model.kind=init_from and their tokenizer.

Hardware: made for 256 accelerators; weights, moments and gradients of experts are split over all, those of the rest
over fsdp. Time: to be measured; a step has 2^20 tokens. Expected: not trained yet; the plan of the step is
in docs/scale.md.
"""

from ml_collections import ConfigDict

from configs import common

SHAPE = dict(vocab_size=157_184, num_layers=32, dense_layers=1, hidden_size=4096, num_heads=32, num_kv_heads=4,
             head_dim=128,
             rotary_dim=64, intermediate_size=9216, num_experts=256, expert_intermediate_size=1024,
             shared_intermediate_size=1024, top_k=8, groups=8,
             top_groups=4, routed_scale=2.5, load_balancing=0.0, rope_theta=600_000.0, norm_eps=1e-6, qk_norm=True)


def get_config(arg: str = "") -> ConfigDict:
    options = common.parse(arg, block_size=32, algo="bd3lm")
    config = common.base()
    config.data.update(source="jsonl", path="openwebtext", tokenizer="gpt2", seq_len=4096, workers=8)
    common.set_model(config, "moe")
    config.model.update(SHAPE)
    config.optim.update(lr=1e-4, beta2=0.95, weight_decay=0.1, warmup_steps=2000, schedule="cosine",
                        final_lr_fraction=0.1, ema_decay=0.0)
    config.train.update(steps=100_000, batch_size=256)
    config.compute.update(remat="full")
    config.mesh.update(data=1, fsdp=-1, expert=16)
    config.eval.update(rows=256, batch_size=256, sample_length=1024)
    common.set_algo(config, options.algo, options.block_size)
    return config

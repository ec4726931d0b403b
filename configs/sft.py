"""Supervised fine-tuning on prompts and answers: only the tokens of the answers are learnt.

    python -m launch train --config=configs/sft.py:from=DIR --config.data.path=dialogues.jsonl --workdir=runs/sft
    python -m launch sample --workdir=runs/sft --prompt="### User:
    What is 2 + 2?

    ### Assistant:
    "

A line of the file is {"prompt": ..., "response": ...} or {"messages": [{"role": ..., "content": ...}, ...]}. DIR is a
published checkpoint or a run directory. A network whose outputs are one token ahead (a causal one, Dream) stays so:
shifted=source; or say it, shifted=block|row|none (docs/adapt.md), also as --config.model.target_shift=block.

Arguments: from=DIR, algo=bd3lm (blocks; block_size=N) | llada (arXiv 2502.09992: one dialogue a row, the rest of it end
tokens that are learnt, each answer divided by its length) | ar, template=plain|chat|joined (data/dialogues.py; chat
needs jinja2 and a chat template in DIR), shifted=source|block|row|none, lora=RANK. The blocks and ar pack dialogues
into rows that do not see each other.
Hardware: one accelerator; two CPU cores for toy models. Time: to be measured. Expected: to be measured.
"""

from ml_collections import ConfigDict

from configs import common

TEMPLATES = {"plain": "plain", "chat": "chat", "joined": ""}


def get_config(arg: str = "") -> ConfigDict:
    options = common.parse(arg, **{"from": "", "block_size": 4, "algo": "bd3lm", "template": "plain", "lora": 0,
                                   "shifted": "source"})
    source = getattr(options, "from")
    known = options.template in TEMPLATES and options.shifted in common.SHIFTED
    if not source or options.algo not in ("bd3lm", "llada", "ar") or not known:
        raise ValueError("expected from=DIR, a published checkpoint or a run directory, algo=bd3lm, llada or ar, "
                         f"template={', '.join(TEMPLATES)}, and shifted={', '.join(common.SHIFTED)}; got "
                         f"from={source}, algo={options.algo}, template={options.template}, shifted={options.shifted}")
    config = common.base()
    config.data.update(source="sft", path="dialogues.jsonl", name=TEMPLATES[options.template], tokenizer=source,
                       seq_len=512, packing="pad" if options.algo == "llada" else "pack")
    config.diffusion.corruption = "exact_count"
    config.optim.update(lr=1e-3 if options.lora else 2e-5, beta2=0.99, warmup_steps=50, schedule="wsd",
                        final_lr_fraction=0.1, ema_decay=0.0)
    config.train.update(steps=2000, batch_size=16, init_from=source, lora_rank=options.lora)
    config.log.every = 20
    config.checkpoint.every = 500
    config.eval.update(every=500, rows=64, batch_size=16, mc_samples=4)
    common.set_algo(config, options.algo, options.block_size)
    config.model = ConfigDict({"kind": "init_from", "target_shift": common.SHIFTED[options.shifted]})
    if options.algo == "llada":
        config.diffusion.update(sft=True, random_length=0.0, normalise="answer")
    return config

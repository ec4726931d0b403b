"""RoBERTa writes: a masked language model learns ten mask rates on WikiText and becomes a generator (Barry, 2025).

    python -m launch train --config=configs/roberta_wikitext.py --config.data.path=wikitext-2 --workdir=runs/roberta
    python -m launch eval --workdir=runs/roberta
    python -m launch sample --workdir=runs/roberta --sampler=iterative --steps=10 --length=256 --prompt="..."

roberta-base is the directory roberta-base (config.json, safetensors, tokenizer.json), or from=DIR. WikiText is a
directory with files train.txt, valid.txt, test.txt, or one of them, an article's paragraph a line. Rows are 256 tokens:
16 of prompt, never masked, and 240 that are, with one rate a batch from 1.0, 0.9, ... 0.1. Writing takes 10 steps; in
each one every generated position is redrawn before a part of them is masked again.

Arguments: from=DIR, text=detokenised|raw (the marks ` @-@ ` and the spaces of the tokenised form undone, or kept),
rates=ten|fixed (fixed: .15 alone, what RoBERTa was trained with).
Hardware: one accelerator. Time: the published run took 30 minutes on an H200; not measured here.
Expected: to be measured.
"""

from ml_collections import ConfigDict

from configs import common

TEXTS = {"detokenised": "wikitext", "raw": ""}
PROMPT = 16
SPECIAL = (0, 1, 3)  # <s>, <pad>, <unk>; the end token </s> is never masked either
FIXED = (0.15,)


def get_config(arg: str = "") -> ConfigDict:
    options = common.parse(arg, **{"from": "roberta-base", "text": "detokenised", "rates": "ten"})
    source = getattr(options, "from")
    if options.text not in TEXTS or options.rates not in ("ten", "fixed"):
        raise ValueError("expected text=detokenised or raw and rates=ten or fixed, got "
                         f"text={options.text}, rates={options.rates}")
    config = common.base()
    config.data.update(source="text", path="wikitext", name=TEXTS[options.text], tokenizer=source, seq_len=256)
    config.optim.update(lr=5e-5, beta2=0.98, weight_decay=0.01, warmup_steps=200, schedule="wsd", ema_decay=0.0)
    config.train.update(steps=5000, batch_size=32, init_from=source)
    config.log.every = 20
    config.checkpoint.every = 500
    config.eval.update(every=500, rows=64, batch_size=16, mc_samples=4)
    common.set_algo(config, "roberta_diffusion", 0)
    config.diffusion.update(protected=PROMPT, special_ids=SPECIAL)
    if options.rates == "fixed":
        config.diffusion.rates = FIXED
    config.model = ConfigDict({"kind": "init_from"})
    return config

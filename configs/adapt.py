"""Pretrained weights become a block diffusion model: the network, its tokenizer and its weights from one directory.

    python -m launch train --config=configs/adapt.py:from=DIR --workdir=runs/adapted
    python -m launch eval --workdir=runs/adapted
    python -m launch sample --workdir=runs/adapted

DIR is a published checkpoint (config.json, safetensors, tokenizer.json; or a GGUF file) or a run directory. Recipes
(docs/adapt.md):
    recipe=ar    a causal model (GPT-2, Llama, Qwen, ... or algo=ar): outputs stay one token ahead, blocks grow from one
                 token to block_size over the first third of the steps while attention inside them opens
    recipe=mlm   a masked language model (BERT, RoBERTa): whole rows for the first third, then blocks
    recipe=mdlm  a diffusion model of whole rows (MDLM, LLaDA): blocks at once, as BD3-LM does (arXiv 2503.09573)

Arguments: from=DIR, recipe=ar|mlm|mdlm, block_size=N or algo=mdlm (one block a row), lora=RANK (low-rank updates of
frozen weights), shifted=source|block|row|none (docs/adapt.md; recipe=ar has block, the others stay as the source is),
steps=N (3000), e.g. --config=configs/adapt.py:from=runs/tiny-ar,block_size=16,lora=8. The text is the embedded corpus;
another one: --config.data.source=text --config.data.path=FILE.
Hardware: one accelerator for models of some 100M parameters; two CPU cores for toy ones. Time: to be measured.
Expected: to be measured.
"""

from ml_collections import ConfigDict

from configs import common

RECIPES = {"ar": "block", "mlm": "source", "mdlm": "source"}  # and how far ahead their outputs are


def get_config(arg: str = "") -> ConfigDict:
    options = common.parse(arg, recipe="ar", block_size=4, algo="bd3lm", lora=0, steps=3000, shifted="",
                           **{"from": ""})
    source = getattr(options, "from")
    if not source or options.recipe not in RECIPES or options.algo not in ("bd3lm", "mdlm"):
        raise ValueError("expected from=DIR, a published checkpoint or a run directory, recipe=ar, mlm or mdlm and "
                         f"algo=bd3lm or mdlm; got from={source}, recipe={options.recipe}, algo={options.algo}")
    form = options.shifted or RECIPES[options.recipe]
    if form not in common.SHIFTED:
        raise ValueError(f"config argument shifted={form}: expected one of {', '.join(common.SHIFTED)}")
    config = common.base()
    config.model = ConfigDict({"kind": "init_from", "target_shift": common.SHIFTED[form]})
    config.data.update(tokenizer=source, seq_len=256)
    config.diffusion.corruption = "exact_count"
    config.optim.update(lr=1e-3 if options.lora else 1e-4, beta2=0.99, warmup_steps=100, schedule="wsd",
                        ema_decay=0.0 if options.lora else 0.995)
    config.train.update(steps=options.steps, batch_size=16, init_from=source, lora_rank=options.lora)
    config.log.every = 20
    config.checkpoint.every = 500
    config.eval.update(every=500, rows=64, batch_size=16, mc_samples=4)
    common.set_algo(config, options.algo, options.block_size)
    if options.recipe == "ar":
        common.grow_blocks(config)
    elif options.recipe == "mlm":
        common.whole_rows_first(config)
    return config

"""BD3-LM on LM1B (One Billion Words), the paper's recipe (arXiv 2503.09573): length 128, wrapped, 65B tokens.

First 850K steps with one block a row, then 150K steps at the wanted block size with its clipped noise range:

    python -m launch prepare --config=configs/lm1b.py
    python -m launch train --config=configs/lm1b.py:algo=mdlm --config.train.steps=850000 --workdir=runs/lm1b-base
    python -m launch train --config=configs/lm1b.py:block_size=4 --config.train.init_from=runs/lm1b-base
    python -m launch eval --workdir=runs/lm1b

MDLM and AR train 1M steps in one go: --config=configs/lm1b.py:algo=mdlm, --config=configs/lm1b.py:algo=ar.
Arguments: tiny|small|medium, block_size=N, algo=bd3lm|mdlm|ar|.... The clips are the paper's for block sizes 4 and 16,
others train unclipped. The clip of size 4 masks 2 or 3 tokens of every block, never all four, where sampling starts;
--config.diffusion.corruption=exact_count --config.diffusion.clip_low=0 --config.diffusion.clip_high=1 trains them all.

Hardware: made for an accelerator with 80 GB or a pod slice; --config.compute.microbatch=64 fits smaller ones.
Time: to be measured. Expected test perplexity (published): AR 22.83, MDLM 31.78, BD3-LM 30.60 (block size 16),
29.83 (8), 28.23 (4). Preparing needs TensorFlow Datasets and the network once: pip install -e '.[data]'.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    options = common.parse(arg, size="small", block_size=4, algo="bd3lm")
    config = common.base()
    common.set_size(config, options.size)
    config.data.update(source="tfds", name="lm1b", tokenizer="bert-base-uncased", seq_len=128, workers=8)
    config.eval.sample_length = 128
    common.set_paper_recipe(config, options.algo, options.block_size)
    return config

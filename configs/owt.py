"""BD3-LM on OpenWebText, the paper's recipe (arXiv 2503.09573): GPT-2 tokens, length 1024, wrapped, 524B tokens.

OpenWebText is not in TensorFlow Datasets: put its documents, one JSON object {"text": ...} a line, as .jsonl
files (also .xz, .gz) into the directory openwebtext, or give --config.data.path=DIR. The last 100K are held out.

    python -m launch prepare --config=configs/owt.py
    python -m launch train --config=configs/owt.py:algo=mdlm --config.train.steps=850000 --workdir=runs/owt-base
    python -m launch train --config=configs/owt.py:block_size=4 --config.train.init_from=runs/owt-base
    python -m launch eval --workdir=runs/owt --split=valid

MDLM and AR train 1M steps in one go: --config=configs/owt.py:algo=mdlm, --config=configs/owt.py:algo=ar.
Arguments: tiny|small|medium, block_size=N, algo=bd3lm|mdlm|ar|.... The clips are those of configs/lm1b.py, which says
more about them.

Hardware: made for a pod slice; --config.compute.microbatch and --config.compute.remat=dots fit it to less memory.
Time: to be measured. Expected perplexity on the held-out documents (published): AR 17.54, MDLM 22.98, BD3-LM 22.27
(block size 16), 21.68 (8), 20.73 (4).
"""

from ml_collections import ConfigDict

from configs import common

DOCUMENTS = 8_013_769
HELD_OUT = 100_000


def get_config(arg: str = "") -> ConfigDict:
    options = common.parse(arg, size="small", block_size=4, algo="bd3lm")
    config = common.base()
    common.set_size(config, options.size)
    config.data.update(source="jsonl", path="openwebtext", tokenizer="gpt2", seq_len=1024, workers=8,
                       valid_fraction=HELD_OUT / DOCUMENTS)
    config.eval.update(rows=1024, sample_length=1024)
    common.set_paper_recipe(config, options.algo, options.block_size)
    return config

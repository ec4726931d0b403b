"""Information-density masking (arXiv 2603.15803), small: which tokens are masked more often, and what it trains to.

    python -m launch sweep --config=configs/sweeps/density.py --parallel=2
    python -m launch bench density --rounds=16 --workdir=runs/sweeps/density

The text is Python source of installed packages and sums in words, in turns; only the code is tagged (`data.density`
"python"), on 100, 30 and 10 % of the documents. Uniform masks, soft ones (w = 2), soft ones with importance weights,
hard ones; with and without complementary pairs. Every run has two noised copies of each row, blocks of 32 tokens as
published, and is validated with the same bound under uniform masks, which `bench density` splits by tag.
Arguments: algo=bd3lm|priority (the sweep gives them).
Hardware and time: two CPU cores, 0.8 s of a core a step, so 8 minutes of a core a run of 600 steps. What came out:
uniform masks gave the best bound, complementary pairs undid the harm of hard ones (docs/density.md).
"""

from ml_collections import ConfigDict

from configs import common, tiny

PRIORITY = {"arg": "algo=priority,block_size=32", "data.density": "python"}


def get_config(arg: str = "") -> ConfigDict:
    options = common.parse(arg, block_size=32, algo="bd3lm")
    config = tiny.get_config(f"algo={options.algo},block_size={options.block_size}")
    config.data.update(source="python_arithmetic", tokenizer="bpe:2048")
    config.train.update(steps=600, noise_samples=2)
    config.log.every = 5
    return config


def sweep():
    for pairs in (False, True):
        yield {"diffusion.complement": pairs}
        yield PRIORITY | {"diffusion.complement": pairs}
        yield PRIORITY | {"diffusion.complement": pairs, "diffusion.hard": True}
    yield PRIORITY | {"diffusion.importance": True}
    for fraction in (0.3, 0.1):
        yield PRIORITY | {"data.density_fraction": fraction}

"""The paper's variance study, small: how much the loss varies by noise schedule, and what each schedule trains to.

    python -m launch sweep --config=configs/sweeps/variance.py --parallel=2
    cd runs/sweeps/variance
    python -m launch bench variance --rounds=16 --workdir=diffusion.block_size=1,...     # see docs/likelihood.md

The sweep trains `configs/tiny.py` with exact counts at block sizes 1, 4 and 16 (the networks on which `bench variance`
measures every schedule), and at 4 and 16 with the linear schedule, the paper's clip of that block size and counts
that follow the loss. All are validated with the same unclipped bound.
Hardware and time: two shared CPU cores, under an hour. What came out: docs/likelihood.md.
"""

from ml_collections import ConfigDict

from configs import common, tiny


def get_config() -> ConfigDict:
    return tiny.get_config()


def sweep():
    yield {"diffusion.block_size": 1}
    for block_size in (4, 16):
        low, high = common.CLIPS[block_size]
        linear = {"diffusion.corruption": "bernoulli"}
        for noise in ({}, linear, linear | {"diffusion.clip_low": low, "diffusion.clip_high": high},
                      {"noise.adaptive_noise": "counts"}):
            yield {"diffusion.block_size": block_size} | noise

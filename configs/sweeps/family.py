"""Every objective on the same text at the same budget, under one bound: which one learns most in two CPU hours?

    python -m launch sweep --config=configs/sweeps/family.py --parallel=2
    python -m launch bench family --workdir=runs/sweeps/family --rounds=1

Each run is `configs/tiny.py` with another objective: 900 steps of 8 rows of 128 tokens. Two seeds for autoregression,
blocks of 4 and MDLM say how far two trainings differ, which the intervals of an evaluation do not. Blocks of 4 are
also reached by a curriculum, one block a row for 85 % of the steps, and trained for the 683 steps that cost as many
FLOPs as that curriculum.
Hardware and time: two CPU cores, about an hour. What came out: AR 1.938 bits per byte, blocks of 4, 8 and 16 2.178,
2.342 and 2.397, objectives of one block a row 2.52 to 2.66 (docs/family.md).
"""

from ml_collections import ConfigDict

from configs import tiny

WHOLE_ROWS = ("ar", "mdlm", "sedd", "d3pm", "md4", "genmd4", "uniform", "diffusionbert", "llada", "roberta_diffusion",
              "levels")
IN_BLOCKS_OF_4 = ("bd3lm", "cap", "adversarial", "priority")


def get_config(arg: str = "") -> ConfigDict:
    return tiny.get_config(arg)


def sweep():
    for algo in WHOLE_ROWS:
        yield {"arg": f"algo={algo}"}
    for algo in IN_BLOCKS_OF_4:
        yield {"arg": f"algo={algo},block_size=4"}
    for block_size in (8, 16):
        yield {"arg": f"algo=bd3lm,block_size={block_size}"}
    yield {"arg": "algo=ssd_lm,block_size=16"}
    yield {"arg": "algo=mixed"}
    yield {"arg": "algo=bd3lm,block_size=4", "model.decoder_layers": 1}
    yield {"arg": "algo=bd3lm,block_size=4", "train.block_sizes": "((0, 128), (765, 4))"}
    yield {"arg": "algo=bd3lm,block_size=4", "train.steps": 683}
    for arg in ("algo=ar", "algo=bd3lm,block_size=4", "algo=mdlm"):
        yield {"arg": arg, "seed": 1}

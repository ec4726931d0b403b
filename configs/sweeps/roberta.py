"""RoBERTa diffusion, small, beside a causal model of the same size: the recipe of configs/roberta_wikitext.py.

    python -m launch sweep --config=configs/sweeps/roberta.py --parallel=2

The networks begin at random. 256 tokens a row, of which the first 16 are the prompt and never masked; one mask rate a
batch out of ten, or always .15 as BERT and RoBERTa were trained; and an autoregressive network on the same rows. 1800
steps of 4 rows.
Arguments: algo=roberta_diffusion|ar (the sweep gives them).
Hardware and time: two CPU cores, five to twelve minutes a run. What came out (docs/adapt.md): 2.684 bits per byte on
*Persuasion* with ten rates, 2.520 with .15, 1.696 autoregressively; from random weights so few steps do not make a
writer of the first two.
"""

from ml_collections import ConfigDict

from configs import common, tiny


def get_config(arg: str = "") -> ConfigDict:
    options = common.parse(arg, algo="roberta_diffusion")
    config = tiny.get_config(f"algo={options.algo}")
    config.data.seq_len = 256
    common.set_algo(config, options.algo, 0)
    config.train.update(steps=1800, batch_size=4)
    config.optim.warmup_steps = 90
    config.eval.sample_length = 256
    return config


def sweep():
    yield {"arg": "algo=roberta_diffusion"}
    yield {"arg": "algo=roberta_diffusion", "diffusion.rates": "(0.15,)"}
    yield {"arg": "algo=ar"}

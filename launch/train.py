"""Train a model. Goes on if the work directory holds a checkpoint of the same configuration, refuses if of another.

  python -m launch train
  python -m launch train --config=configs/austen.py --workdir=runs/mine
  python -m launch train --config=configs/tiny.py:block_size=8 --config.optim.lr=5e-4 --workdir=runs/blocks-of-8
  python -m launch train --config=configs/tiny.py:algo=ar --workdir=runs/tiny-ar

Result: workdir, step, train_nll, valid_nll (nats a token), valid_ppl, tokens_per_s, step_ms, params, wall_s.
"""

from absl import flags

TAKES_CONFIG = True


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", "", "where the run is kept; empty: runs/<config file name>", flag_values=values)


def main(args: flags.FlagValues, config, name: str) -> dict:
    from bd3lm_jax.train import train

    return train(config, args.workdir or f"runs/{name}")

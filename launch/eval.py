"""Likelihood of a text under a trained model, with a 95 % interval over documents and draws.

  python -m launch eval --workdir=runs/tiny
  python -m launch eval --workdir=runs/tiny --split=valid --draws=8
  python -m launch eval --workdir=runs/tiny --data=my_text.txt

Result: nll (nats a token), nll_ci95, nll_mc_se (draws alone), ppl, ppl_ci95, bits_per_byte, tokens, documents, ...
"""

from absl import flags

TAKES_CONFIG = False


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", "", "run directory", flag_values=values)
    flags.DEFINE_string("split", "test", "train, valid or test", flag_values=values)
    flags.DEFINE_string("data", "", "a .txt or .jsonl file (all of it), or austen; empty: the run's own",
                        flag_values=values)
    flags.DEFINE_string("estimator", "", "exact_count, or nll (AR, block size 1); empty: the best", flag_values=values)
    flags.DEFINE_integer("draws", 1, "noise draws a row", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the noise", lower_bound=0, flag_values=values)
    flags.DEFINE_enum("weights", "ema", ["ema", "params"], "averaged weights, or the last ones", flag_values=values)
    flags.DEFINE_integer("batch", 0, "rows a pass; 0: the run's own", lower_bound=0, flag_values=values)


def main(args: flags.FlagValues) -> dict:
    from launch.arguments import required

    workdir = required(args, "workdir")
    from bd3lm_jax.evaluate import evaluate_run

    return evaluate_run(workdir, split=args.split, data=args.data, estimator=args.estimator, draws=args.draws,
                        seed=args.seed, weights=args.weights, batch=args.batch)

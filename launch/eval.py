"""Likelihood of a text under a trained model, with a 95 % interval over documents and draws.

  python -m launch eval --workdir=runs/tiny
  python -m launch eval --workdir=runs/tiny --split=valid --draws=8
  python -m launch eval --workdir=runs/tiny --data=my_text.txt
  python -m launch eval --workdir=runs/tiny --data=sotu --chunks=sliding --stride=64
  python -m launch eval --workdir=runs/tiny-ar,runs/tiny --data=all      # every named text, each run against the first
  python -m launch eval --workdir=runs/tiny --estimator=exact             # every mask: no Monte-Carlo error (S <= 8)
  python -m launch eval --workdir=runs/tiny --target_ci=0.1%              # draws until that part is so tight
  python -m launch eval --workdir=runs/tiny --against=runs/tiny-ar        # paired difference, interval and p-value

Result: nll (nats a token), nll_ci95, nll_mc_se (draws alone), nll_document_se (documents alone), ppl, ppl_ci95,
bits_per_byte, tokens, documents, ..., against (unit, difference, difference_ci95, p_value, same_masks, ...).
"""

from absl import flags

from bd3lm_jax.errors import UserError

TAKES_CONFIG = False


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", "", "run directory", flag_values=values)
    flags.DEFINE_string("split", "test", "train, valid or test", flag_values=values)
    flags.DEFINE_string("data", "", "a .txt or .jsonl file (all of it); a named text: austen, moby_dick, sotu, "
                        "wikitext2, ptb, lm1b, lambada, ag_news, pubmed, arxiv; or all of these; empty: the run's own",
                        flag_values=values)
    flags.DEFINE_string("data_dir", "", "where NAME.txt or NAME.jsonl of named texts are", flag_values=values)
    flags.DEFINE_string("chunks", "independent", "independent rows, or sliding windows that score their last tokens",
                        flag_values=values)
    flags.DEFINE_integer("stride", 0, "of sliding windows, in tokens; 0: half a row", flag_values=values)
    flags.DEFINE_string("first_token", "", "predict or skip the first token of each row; empty: predict if possible",
                        flag_values=values)
    flags.DEFINE_string("end_token", "count", "count or skip the end of each document", flag_values=values)
    flags.DEFINE_string("estimator", "", "exact_count, importance, bernoulli, exact (block size up to 8), or nll (AR, "
                        "block size 1); empty: the best", flag_values=values)
    flags.DEFINE_integer("draws", 1, "noise draws a row, four noised views each", lower_bound=1, flag_values=values)
    flags.DEFINE_string("target_ci", "", "more draws until the Monte-Carlo half width is this part of the nll, e.g. "
                        "0.5% or 0.005", flag_values=values)
    flags.DEFINE_integer("max_draws", 64, "of --target_ci", lower_bound=1, flag_values=values)
    flags.DEFINE_string("against", "", "run directory of a model to compare with on the same documents",
                        flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the noise", lower_bound=0, flag_values=values)
    flags.DEFINE_enum("weights", "ema", ["ema", "params"], "averaged weights, or the last ones", flag_values=values)
    flags.DEFINE_integer("batch", 0, "rows a pass; 0: the run's own", lower_bound=0, flag_values=values)


def main(args: flags.FlagValues) -> dict:
    from launch.arguments import required

    workdir, target_ci = required(args, "workdir"), _fraction(args.target_ci)
    common = {name: args[name].value for name in ("split", "data_dir", "chunks", "stride", "first_token", "end_token",
                                                  "estimator", "draws", "seed", "weights", "batch", "max_draws")}
    if args.data == "all":
        if args.against:
            raise UserError("--against does not go with --data=all: give --workdir=A,B instead")
        from bd3lm_jax.suite import evaluate_suite

        return evaluate_suite(workdir.split(","), target_ci=target_ci, **common)
    from bd3lm_jax.evaluate import evaluate_run

    return evaluate_run(workdir, data=args.data, against=args.against, target_ci=target_ci, **common)


def _fraction(text: str) -> float:
    """"0.5%" or "0.005" -> 0.005; "" -> 0, no target."""
    if not text:
        return 0.0
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise UserError(f"--target_ci={text}: expected a part of the nll, e.g. 0.5% or 0.005")
    return value

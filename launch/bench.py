"""Time and memory of the hot paths, each against its alternatives in interleaved rounds.

  python -m launch bench                          # lists the benchmarks
  python -m launch bench step                     # or attention, loss, data, eval, sampling
  python -m launch bench attention --baseline=torch --out=docs/plots
  python -m launch bench variance --workdir=runs/tiny --rounds=28    # of the loss, by noise schedule
  python -m launch bench family --workdir=runs/tiny-ar,runs/tiny --rounds=1    # objectives under one bound
  python -m launch bench faults --rounds=50          # kills, flipped bits, a full disk: docs/faults.md
  python -m launch bench density --workdir=RUN,RUN --rounds=16       # of priority masks, by kind of token
  python -m launch bench scaling --out=docs/plots                    # work and traffic on 1 to 8 simulated devices
  python -m launch bench sampling --workdir=runs/tiny --scorer=runs/tiny-ar    # which settings to sample with

Result: bench, device, versions, rows (case, variant, baseline, and ratios to the baseline; null where not known).
The same and a picture go to NAME.json and NAME.png in the directory that --out names.

sampling with --workdir measures samplers, thresholds and steps on a trained run. Result: quality, balanced, speed
(settings, which `sample` takes from then on when it is told what to prefer), rule, measured (a row a setting:
tokens_per_call, tokens_per_s, gen_ppl by the scorer or else self_nll, entropy, distinct_n, ...), cache (bytes_per_token
and nll_change by cache_dtype), scorer, length, texts, device, versions. The same and a picture go to sampling.json and
plots/sampling.png in the run directory.
"""

from absl import flags

from launch.arguments import define_path

TAKES_CONFIG = False
POSITIONAL = "name"


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("name", "", "which benchmark, also without --name=; empty: list them", flag_values=values)
    flags.DEFINE_integer("rounds", 7, "interleaved rounds, whose median counts", lower_bound=1, flag_values=values)
    flags.DEFINE_string("baseline", "", "torch: also PyTorch's side (attention, step)", flag_values=values)
    define_path(values, "workdir", "", "run directory, for sampling, or several with commas, for variance, density and "
                "family", several=True)
    define_path(values, "out", "runs/bench", "directory of the result and the picture")
    define_path(values, "scorer", "", "of sampling: run directory of an autoregressive model that judges the texts")
    flags.DEFINE_integer("num_samples", 8, "of sampling with --workdir: texts of each setting a round", lower_bound=1,
                         flag_values=values)


def main(args: flags.FlagValues) -> dict:
    from bd3lm_jax.core import log
    from bd3lm_jax.core.errors import UserError, command_line

    if args.name == "sampling" and args.workdir:
        if args.baseline or args["out"].present:
            raise UserError("sampling with --workdir writes to the run directory and runs against nothing: leave --out "
                            "and --baseline out")
        from bd3lm_jax.evaluation.tune_sampling import tune_sampling

        return tune_sampling(args.workdir, scorer=args.scorer, rounds=args.rounds, texts=args.num_samples)
    if args.scorer or args["num_samples"].present:
        raise UserError("--scorer and --num_samples are for: bench sampling --workdir=DIR")
    from bd3lm_jax.experiments.bench import BENCHES, bench

    if args.name:
        return bench(args.name, args.rounds, args.baseline, args.out, args.workdir)
    for name, module in BENCHES.items():
        log.note(f"{command_line('bench')} {name:<10}  # {(module.__doc__ or '').splitlines()[0]}")
    return {"benches": list(BENCHES)}

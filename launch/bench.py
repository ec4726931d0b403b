"""Time and memory of the hot paths, each against its alternatives in interleaved rounds.

  python -m launch bench                          # lists the benchmarks
  python -m launch bench step                     # or attention, loss, data
  python -m launch bench attention --against=torch --out=docs/plots

Result: bench, device, versions, rows (case, variant, baseline, and ratios to the baseline; null where not known).
The same and a picture go to DIR/NAME.json and DIR/NAME.png.
"""

from absl import flags

TAKES_CONFIG = False
POSITIONAL = "name"


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("name", "", "which benchmark, also without --name=; empty: list them", flag_values=values)
    flags.DEFINE_integer("rounds", 7, "interleaved rounds, whose median counts", lower_bound=1, flag_values=values)
    flags.DEFINE_string("against", "", "torch: also PyTorch's side (attention, step)", flag_values=values)
    flags.DEFINE_string("out", "runs/bench", "directory of the result and the picture", flag_values=values)


def main(args: flags.FlagValues) -> dict:
    from bd3lm_jax import log
    from bd3lm_jax.bench import BENCHES, bench

    if args.name:
        return bench(args.name, args.rounds, args.against, args.out)
    for name, module in BENCHES.items():
        log.note(f"python -m launch bench {name:<10}  # {module.__doc__.splitlines()[0]}")
    return {"benches": list(BENCHES)}

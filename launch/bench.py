"""Time and memory of the hot paths, each against its alternative in interleaved rounds.

  python -m launch bench                          # lists the benchmarks
  python -m launch bench --name=step --rounds=7
"""

from absl import flags

TAKES_CONFIG = False


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("name", "", "which benchmark; empty: list them", flag_values=values)
    flags.DEFINE_integer("rounds", 7, "interleaved rounds, whose median counts", lower_bound=1, flag_values=values)


def main(args: flags.FlagValues) -> dict:
    from bd3lm_jax import log
    from bd3lm_jax.bench import BENCHES, bench

    if args.name:
        return bench(args.name, args.rounds)
    for name in BENCHES:
        log.note(f"python -m launch bench --name={name}")
    return {"benches": list(BENCHES)}

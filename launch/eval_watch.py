"""Job of `eval`: the likelihood of every new checkpoint of a run that trains."""

from absl import flags

from bd3lm_jax.core.errors import Preempted
from launch import eval_flags

FLAGS = ("workdir", "watch", "watch_timeout", *eval_flags.TEXT, *eval_flags.ESTIMATOR, *eval_flags.WEIGHTS,
         "block_size")


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_boolean("watch", False, "follow a run that trains: evaluate each new checkpoint, until the last one",
                         flag_values=values)
    flags.DEFINE_float("watch_timeout", 3600.0, "of --watch: end after so many seconds without a new checkpoint; 0: "
                       "never", lower_bound=0.0, flag_values=values)


def _run(args: flags.FlagValues) -> dict:
    """The result; where a signal ended it, it is written before the exit code tells of the signal."""
    from bd3lm_jax.core import log
    from bd3lm_jax.evaluation.watch import FILE, watch

    result = watch(args.workdir, **eval_flags.options_of(args), timeout=args.watch_timeout)
    if result["ended"].startswith("SIG"):
        log.result(result)
        if result["ended"] == "SIGINT":
            raise KeyboardInterrupt
        raise Preempted(f"stopped by {result['ended']}; what was evaluated is in {args.workdir}/{FILE}: run the same "
                        "command again to go on")
    return result


JOB = eval_flags.Job("--watch", FLAGS, eval_flags.check, _run)

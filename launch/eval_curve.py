"""Job of `eval`: likelihood, network calls and speed at every block size that a model was trained with."""

from absl import flags

from launch import eval_flags, processes

FLAGS = ("workdir", "curve", "nll_tolerance", "split", *eval_flags.ESTIMATOR, *eval_flags.WEIGHTS, *processes.FLAGS)


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_boolean("curve", False, "likelihood, calls and speed at every block size the model was trained with",
                         flag_values=values)
    flags.DEFINE_float("nll_tolerance", 0.01, "of --curve: the largest block size is recommended whose nll is at most "
                       "this part above the best", lower_bound=0.0, flag_values=values)


def _run(args: flags.FlagValues) -> dict:
    processes.join(args)
    from bd3lm_jax.core.log import spinner
    from bd3lm_jax.evaluation.block_sizes import curve

    options = eval_flags.options_of(args)
    with spinner("measuring"):
        return curve(args.workdir, split=args.split, estimator=options["estimator"], model=options["model"],
                     tolerance=args.nll_tolerance)


JOB = eval_flags.Job("--curve", FLAGS, eval_flags.check, _run)

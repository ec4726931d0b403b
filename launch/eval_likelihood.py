"""Jobs of `eval`: the likelihood of one text under a run, beside another run on demand; of all named texts under runs.
"""

from absl import flags

from bd3lm_jax.core import paths
from bd3lm_jax.core.errors import UserError
from launch import eval_flags, processes

NAME = "a likelihood (neither --samples nor --task)"


def _check_suite(args: flags.FlagValues) -> None:
    if args.baseline:
        raise UserError("--baseline does not go with --data=all: give --workdir=A,B instead")
    for name in ("block_size", "step"):
        if args[name].present:
            raise UserError(f"--{name} does not go with --data=all: give one --data at a time")
    eval_flags.check(args)


def _run_one(args: flags.FlagValues) -> dict:
    processes.join(args)
    from bd3lm_jax.core.log import spinner
    from bd3lm_jax.evaluation.evaluate_run import evaluate_run

    with spinner("measuring"):
        return evaluate_run(args.workdir, **eval_flags.options_of(args), baseline=args.baseline)


def _run_suite(args: flags.FlagValues) -> dict:
    processes.join(args)
    from bd3lm_jax.core.log import spinner
    from bd3lm_jax.evaluation.suite import evaluate_suite

    with spinner("measuring"):
        return evaluate_suite(paths.split(args.workdir), **eval_flags.options_of(args))


ONE = eval_flags.Job(NAME, eval_flags.LIKELIHOOD, eval_flags.check, _run_one)
SUITE = eval_flags.Job(NAME, eval_flags.LIKELIHOOD, _check_suite, _run_suite)

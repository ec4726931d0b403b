"""Train every run that sweep() of a config file yields, each in a process of its own, and compare them in one table.

  python -m launch sweep                                        # block sizes 1, 4 and 16 of configs/tiny.py
  python -m launch sweep --dry_run                              # which runs, how far, and their commands
  python -m launch sweep --config=configs/tiny.py --config.train.steps=300 --workdir=runs/sweeps/short --parallel=2
  python -m launch sweep --index=2                              # run number 2 only: a task of an array job
  python -m launch sweep --early_stopping=0.1                          # stop runs that fall 0.1 bits per byte behind

A config file with a sweep (each dict: what changes; "arg" is what get_config is called with):

  def sweep():
      for lr in (1e-3, 3e-3):
          yield {"optim.lr": lr}

Run it again to go on: finished runs are skipped, without --early_stopping also those that were given up. Ctrl-C and
SIGTERM let the runs save and stop. More: docs/sweeps.md.
Result: sweep, runs (name, status, overrides, step, valid_nll, nll_ci95, valid_ppl, bits_per_byte, workdir, log, error,
retries, difference and difference_ci95 to the baseline in nats a token, paired by document).
The table is also WORKDIR/table.csv and table.md, the plot WORKDIR/sweep.png. Exit code 1 if a run has failed.
"""

import sys

from absl import flags

from bd3lm_jax.core.errors import UserError, program
from bd3lm_jax.core.migrations import current_name
from launch import arguments

TAKES_CONFIG = True
LOADS_CONFIG = True


def define(values: flags.FlagValues) -> None:
    arguments.define_path(values, "workdir", "", "where the sweep is kept; empty: runs/sweeps/<config file name>")
    flags.DEFINE_integer("parallel", 1, "runs at a time; they share this machine's devices", lower_bound=1,
                         flag_values=values)
    flags.DEFINE_integer("index", None, "train only this run, counted from 0", lower_bound=0, flag_values=values)
    flags.DEFINE_boolean("dry_run", False, "list the runs, train nothing", flag_values=values)
    flags.DEFINE_integer("retries", 2, "how often a run is started again that was preempted (exit code 42), stuck (75) "
                         "or killed (134, 137)", lower_bound=0, flag_values=values)
    flags.DEFINE_float("early_stopping", None,
                       "stop a run when its validation bound is so many bits per byte behind the "
                       "best one at the same step; empty: never", flag_values=values)
    flags.DEFINE_float("early_stopping_after", 0.5, "never before this part of its steps", flag_values=values)
    flags.DEFINE_string("baseline", "0", "the run that the table compares the others with, counted from 0, or best",
                        flag_values=values)


def main(args: flags.FlagValues, spec: str, overrides: list[str]) -> dict:
    from bd3lm_jax.experiments.sweeps.early_stopping import StoppingRule
    from bd3lm_jax.experiments.sweeps.sweep import sweep

    if args.early_stopping is None and args["early_stopping_after"].present:
        raise UserError("--early_stopping_after goes with --early_stopping: add it")
    rule = None if args.early_stopping is None else StoppingRule(args.early_stopping, args.early_stopping_after)
    baseline = int(args.baseline) if args.baseline.isdecimal() else args.baseline
    points = load_points(spec, overrides)
    workdir = args.workdir or f"runs/sweeps/{arguments.config_name(spec)}"
    return sweep(points, workdir, parallel=args.parallel, index=args.index, dry_run=args.dry_run, retries=args.retries,
                 give_up=rule, baseline=baseline)


def load_points(spec: str, overrides: list[str]) -> list:
    """A bd3lm_jax.experiments.sweeps.sweep.Point for everything that sweep() of the config file yields; `overrides`
    apply to all.

    UserError, naming the run, for a key or a value that is wrong in one of them.
    """
    from bd3lm_jax.core import plugins
    from bd3lm_jax.experiments.sweeps.sweep import ARG, Point

    path, colon, _ = spec.partition(":")
    fixed = {current_name(arguments.override_key(word)) for word in overrides} | ({ARG} if colon else set())
    launch = (sys.argv[0],) if program() == "bd3lm" else ("-m", "launch")
    points = []
    for i, changes in enumerate(arguments.load_sweep(path)):
        conflicts = sorted(key for key in changes if current_name(key) in fixed)
        if conflicts:
            raise UserError(f"'{conflicts[0]}' is given on the command line and by sweep() in '{path}': leave one out")
        try:
            changes = {key: _plain(key, value) for key, value in changes.items()}
            point_spec = f"{path}:{changes[ARG]}" if ARG in changes else spec
            words = [*overrides, *(f"--config.{key}={value}" for key, value in changes.items() if key != ARG)]
            config = arguments.load_config(point_spec, words)
        except UserError as error:
            raise UserError(f"run {i} of sweep() in '{path}': {error}") from None
        command = (sys.executable, *launch, "train", f"--config={point_spec}", *words,
                   *(f"--import={module}" for module in plugins.requested()))
        points.append(Point(changes, config, command))
    return points


def _plain(key: str, value):
    """A number, a text or a tuple of them; NumPy's become Python's."""
    value = value.tolist() if hasattr(value, "tolist") else value
    value = tuple(value) if isinstance(value, list) else value
    parts = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(part, (bool, int, float, str)) for part in parts):
        raise UserError(f"'{key}' is {value!r}, expected a number, a text or a tuple of them")
    return value

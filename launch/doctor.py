"""Versions, devices, mesh, what is missing and what it is for, and a small self-test. Exit 1 if something is wrong.

  python -m launch doctor
"""

from absl import flags

TAKES_CONFIG = False


def define(values: flags.FlagValues) -> None:
    del values


def main(args: flags.FlagValues) -> dict:
    del args
    from bd3lm_jax.evaluation.doctor import diagnose

    return diagnose()

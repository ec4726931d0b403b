"""Train a model. Goes on if the work directory holds a checkpoint of the same configuration, refuses if of another.

  python -m launch train
  python -m launch train --config=configs/austen.py --workdir=runs/mine
  python -m launch train --config=configs/tiny.py:block_size=8 --config.optim.lr=5e-4 --workdir=runs/blocks-of-8
  python -m launch train --config=configs/tiny.py:algo=ar --workdir=runs/tiny-ar
  python -m launch train --distributed --mesh=data=-1,fsdp=4        # on every host of a TPU slice: docs/clusters.md
  python -m launch train --config=configs/owt.py --mesh=data=8,fsdp=4 --plan               # what it will need
  python -m launch train --config=configs/owt.py --mesh=data=8,fsdp=4 --plan --accelerator=v5e     # on one of them

Result: workdir, step, train_nll, valid_nll (nats a token), valid_ppl, tokens_per_s, step_ms, params, wall_s.
With --plan nothing is read, downloaded or trained; result: params, devices, mesh, flops_per_step, bytes_per_device,
communication (calls and bytes that a device sends a step) and compile_s by the best compiler here, compiler (a TPU if
package libtpu is there, else cpu: an estimate), estimate (the same of the CPU compiler, for GPUs), expected
(bytes_needed, fits, compiler and tokens_per_s by device).
"""

import dataclasses
import re

from absl import flags

from bd3lm_jax.core.errors import UserError
from launch import processes
from launch.arguments import define_path

TAKES_CONFIG = True


def define(values: flags.FlagValues) -> None:
    define_path(values, "workdir", "", "where the run is kept; empty: runs/<config file name>")
    flags.DEFINE_list("mesh", [], "devices by axis (data, fsdp, expert, tensor), e.g. data=8,fsdp=4; -1: what is left "
                      "(planned as 1); slices=N: of N slices that are alike; empty: the config's", flag_values=values)
    flags.DEFINE_boolean("profile", False, "trace a few steps into WORKDIR/profile", flag_values=values)
    flags.DEFINE_boolean("plan", False, "do not train: say what training needs, no accelerator needed",
                         flag_values=values)
    flags.DEFINE_enum("accelerator", None, ["v4", "v5e", "v5p", "v6e", "H100", "H200"],
                      "with --plan: which one; empty: all, TPUs with the figures of one compile by the TPU "
                      "compiler (package libtpu, else estimated); a TPU: its own", flag_values=values)
    flags.DEFINE_float("mfu", 0.4, "with --plan: model FLOPs utilisation, the part of the peak that is reached",
                       lower_bound=1e-3, upper_bound=1.0, flag_values=values)
    flags.DEFINE_float("watchdog_timeout", 1800.0, "seconds without a finished step, validation or save after which "
                       "the process ends with exit code 75; 0: never", lower_bound=0.0, flag_values=values)
    processes.define(values)


def main(args: flags.FlagValues, config, name: str) -> dict:
    if args.mesh:
        config = dataclasses.replace(config, mesh=parse_mesh(args.mesh))
    if args.plan:
        from bd3lm_jax.planning.plan import plan

        return plan(config, target=args.accelerator or "", utilisation=args.mfu)
    if args["accelerator"].present:
        raise UserError("--accelerator goes with --plan: training uses the devices that are there")
    processes.join(args)
    from bd3lm_jax.training.train import train

    return train(config, args.workdir or f"runs/{name}", profile=args.profile, stuck_after=args.watchdog_timeout)


def parse_mesh(words: list[str]):
    """`["data=8", "fsdp=4"]` -> a MeshConfig; axes that are not named have size 1. UserError for one named twice."""
    from bd3lm_jax.config import MeshConfig

    axes, sizes = [field.name for field in dataclasses.fields(MeshConfig)], {}
    for word in words:
        axis, _, size = word.partition("=")
        if axis not in axes or not re.fullmatch("-?[0-9]{1,9}", size):
            raise UserError(f"--mesh: '{word}' is not one of {', '.join(f'{axis}=N' for axis in axes)}")
        if axis in sizes:
            raise UserError(f"--mesh: '{axis}' is given twice, {sizes[axis]} and {size}: leave one out")
        sizes[axis] = int(size)
    return MeshConfig(**dict.fromkeys(axes, 1) | sizes)

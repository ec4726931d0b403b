"""Show (or do) what a cluster needs to train, evaluate or sweep: create, run, logs, resume, delete.

  python -m launch tpu --engine=gcloud --accelerator=v5litepod-16 --name=owt --project=P --zone=us-central1-a \\
      --shared_dir=/mnt/nfs/runs --spot -- train --config=configs/owt.py --mesh=data=-1,fsdp=4
  python -m launch tpu --engine=xpk --accelerator=v6e-256 --slices=2 --name=owt --project=P --zone=us-east5-b \\
      --shared_dir=/mnt/runs -- train --config=configs/owt.py --mesh=fsdp=-1,slices=2
  python -m launch tpu --engine=skypilot --accelerator=H100:8 --name=owt --shared_dir=gs://bucket/runs -- train
  python -m launch tpu --engine=slurm --accelerator=H100:8 --name=sizes -- sweep --config=configs/tiny.py
  python -m launch tpu --engine=gcloud ... --action=logs --run -- train       # does one action instead of showing it

After -- stands one of our own commands; its flags, its configuration and its mesh are checked here. What is run is
the committed state of the checkout, with the versions of constraints.txt. See docs/clusters.md.
Result: engine, accelerator, slices, chips, hosts, actions (commands by action), files (a script of all actions and what
the engine reads).
"""

import dataclasses
import importlib
import os

from absl import flags

from bd3lm_jax.core.errors import UserError, nearest
from launch import arguments, processes

TAKES_CONFIG = False
TAKES_COMMAND = True
RUNNABLE = ("train", "eval", "sweep")


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("engine", "gcloud", "gcloud, xpk, skypilot or slurm", flag_values=values)
    flags.DEFINE_string("accelerator", "", "of a slice: v4-N, v5litepod-N, v5p-N, v6e-N, H100:N or H200:N",
                        flag_values=values)
    flags.DEFINE_string("name", "bd3lm", "of the machines and of the job", flag_values=values)
    flags.DEFINE_string("project", "", "of gcloud and xpk", flag_values=values)
    flags.DEFINE_string("zone", "", "of gcloud and xpk; of skypilot where it should be one", flag_values=values)
    flags.DEFINE_string("cluster", "", "of xpk: one that is there (empty: made and deleted); of slurm: --clusters",
                        flag_values=values)
    flags.DEFINE_integer("slices", 1, "of gcloud and xpk", lower_bound=1, flag_values=values)
    flags.DEFINE_boolean("spot", False, "machines that can be taken away", flag_values=values)
    flags.DEFINE_string("shared_dir", "", "directory that all hosts see, where runs/ will lie (skypilot: or "
                        "gs://BUCKET); --workdir and --config of the command are relative to the checkout",
                        flag_values=values)
    flags.DEFINE_integer("max_restarts", 20, "after exit code 42, 75, 134 or 137", lower_bound=0,
                         flag_values=values)
    flags.DEFINE_string("action", "all", "create, run, logs, resume, delete or all", flag_values=values)
    flags.DEFINE_boolean("run", False, "do the action, with the --mesh and the rest as given; otherwise only show it",
                         flag_values=values)
    arguments.define_path(values, "out", "", "where files are written; empty: runs/clusters/NAME")


def main(args: flags.FlagValues, words: list[str]) -> dict:
    from bd3lm_jax.experiments import clusters
    from bd3lm_jax.experiments.clusters import slices

    slice_type = slices.find(arguments.required(args, "accelerator"))
    chips, hosts = slice_type.chips * args.slices, slice_type.hosts * args.slices
    words, points = check_command(words, chips, hosts, args.engine == "slurm", args.slices)
    job = clusters.Job(name=args.name, slice=slice_type, slices=args.slices, project=args.project, zone=args.zone,
                       cluster=args.cluster, shared_dir=args.shared_dir, spot=args.spot, restarts=args.max_restarts,
                       out=os.path.abspath(args.out or f"runs/clusters/{args.name}"), command=tuple(words),
                       points=points)
    return clusters.launch(args.engine, job, args.action, args.run)


def check_command(words: list[str], chips: int, hosts: int, array: bool, slices: int) -> tuple[list[str], int]:
    """The command as the hosts run it, and the number of runs of a sweep (0: no sweep), which `array` makes tasks.

    UserError for a command that is none of ours or cannot run there, and for what the command itself would refuse.
    """
    if not words:
        raise UserError(f"no command: after -- stands {', '.join(RUNNABLE[:-1])} or {RUNNABLE[-1]} with its flags")
    name, rest = words[0], words[1:]
    if name not in RUNNABLE:
        raise UserError(f"'{name}' is no command for a cluster: {nearest(name, RUNNABLE)}")
    command, rest = importlib.import_module(f"launch.{name}"), arguments.common(rest)
    spec, overrides, argv = arguments.split_config(rest) if command.TAKES_CONFIG else ("", [], rest)
    args = arguments.parse_flags(command.define, argv)
    if name == "sweep":
        return words, _check_sweep(command, spec, overrides, args, chips, hosts, array)
    if name == "train":
        config = arguments.load_config(spec, overrides)
        if args.plan:
            raise UserError("train --plan needs no cluster: run it here")
        if args.mesh:
            config = dataclasses.replace(config, mesh=command.parse_mesh(args.mesh))
        _check_mesh(config, chips, slices)
    if hosts > 1 and not args.distributed:
        words, args = [*words, "--distributed"], arguments.parse_flags(command.define, [*argv, "--distributed"])
    if name == "eval":
        single_host_flag = next((flag for flag in ("samples", "task", "watch") if args[flag].value), None)
        if hosts > 1 and single_host_flag:
            raise UserError(
                f"eval --{single_host_flag} has one host, and the accelerator has {hosts}: take a smaller one")
        command.check(args)
    processes.check(args)
    return words, 0


def _check_sweep(command, spec: str, overrides: list[str], args, chips: int, hosts: int, array: bool) -> int:
    points = command.load_points(spec, overrides)
    if hosts > 1:
        raise UserError(f"the runs of a sweep have one host each, and the accelerator has {hosts}: take a smaller one")
    if array and args.index is not None:
        raise UserError("sweep --index does not go with engine 'slurm': the array gives every run its number")
    for point in points:
        _check_mesh(point.config, chips, 1)
    return len(points) if array else 0


def _check_mesh(config, chips: int, slices: int) -> None:
    """UserError unless the mesh of a config fits these devices and slices, and heads and batch fit the mesh."""
    from jax.sharding import AbstractMesh

    from bd3lm_jax.parallel import sharding

    sizes = sharding.axis_sizes(config.mesh, chips, slices)
    if config.mesh.slices not in (-1, slices):
        raise UserError(f"--slices={slices}, but mesh.slices={config.mesh.slices}: add slices={slices} to --mesh "
                        "of the command, or slices=-1 for as many as there are")
    sharding.check_mesh(AbstractMesh(sizes, sharding.AXES), config.model, config.compute.microbatch
                        or config.train.batch_size)

"""Flags of commands that several processes can run together, and how these find each other."""

from absl import flags

from bd3lm_jax.core.errors import UserError

FLAGS = ("distributed", "coordinator", "num_processes", "process_id", "init_timeout", "heartbeat_timeout")
IDENTITY = ("coordinator", "num_processes", "process_id")


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_boolean("distributed", False, "one of many processes: found on TPUs, Slurm and OpenMPI, elsewhere "
                         "named by the next three", flag_values=values)
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "how many there are", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("process_id", None, "which one this is, from 0", lower_bound=0, flag_values=values)
    flags.DEFINE_float("init_timeout", 300.0, "seconds for all processes to find each other", lower_bound=1.0,
                       flag_values=values)
    flags.DEFINE_float("heartbeat_timeout", 100.0, "seconds of silence after which another process counts as dead",
                       lower_bound=2.0, flag_values=values)


def check(args: flags.FlagValues) -> None:
    """UserError for flags of many processes that do not fit together."""
    present = [name for name in IDENTITY if args[name].present]
    if not args.distributed:
        if present:
            raise UserError(f"--{present[0]} goes with --distributed: add it")
    elif present and len(present) < len(IDENTITY):
        raise UserError(f"--{present[0]} needs its companions: --coordinator=HOST:PORT --num_processes=N "
                        "--process_id=I")


def join(args: flags.FlagValues) -> None:
    """Join the other processes if --distributed says so. UserError as `check`, and on all processes if they cannot
    compute the same."""
    check(args)
    if not args.distributed:
        return
    from bd3lm_jax.parallel import distributed, replicas

    distributed.join(args.coordinator, args.num_processes, args.process_id, args.init_timeout, args.heartbeat_timeout)
    replicas.check_start()

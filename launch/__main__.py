"""`python -m launch COMMAND` and `bd3lm COMMAND`: find the command, print its result, turn errors into one line and an
exit code."""

import importlib
import os
import signal
import sys

from launch import streams

EXIT_PREEMPTED = 42  # Preempted.exit_code, which takes a moment to import
COMMANDS = {
    "train": "train a model, or go on with a run",
    "eval": "likelihood of a split, with its error bar",
    "sample": "generate text",
    "infill": "fill the holes of texts",
    "prepare": "tokenise and pack a corpus ahead of time",
    "convert": "from GGUF, and from and to Hugging Face layout and run directories",
    "doctor": "what is installed, which devices, and a small self-test",
    "bench": "time and memory of the hot paths",
    "sweep": "train a config with some keys changed, many times, and compare",
    "clean": "what killed runs have left in the cache and in run directories",
    "tpu": "what a cluster needs to run one of these: gcloud, xpk, SkyPilot, Slurm",
}
USAGE = """Block diffusion language models in JAX.

  python -m launch COMMAND [--config=NAME[:args] | --config=FILE.py[:args]] [--config.key=value ...] [flags]

{commands}

Examples:
  python -m launch train                                # the main job: a model of Jane Austen, minutes on two cores
  python -m launch eval --workdir=runs/tiny
  python -m launch sample --workdir=runs/tiny --prompt="It was a truth"
  python -m launch COMMAND --help                       # flags and examples of a command

People read stderr; the last line of stdout is the result as one JSON object.
Exit codes: 0 done, 1 failed, 2 wrong usage, 42 preempted and saved, 75 stuck (both: run the same command again)."""
HELP = ("--help", "-h")
JAX_SETTINGS = {  # settings of JAX that would change results; jax_settings.py holds to them in Python
    "JAX_ENABLE_X64": "0", "JAX_THREEFRY_PARTITIONABLE": "1", "JAX_NUMPY_DTYPE_PROMOTION": "standard",
    "JAX_NUMPY_RANK_PROMOTION": "allow", "JAX_DEFAULT_PRNG_IMPL": "threefry2x32",
}


def main(argv: list[str]) -> int:
    """Run one command; returns the exit code."""
    if not argv or argv[0] in HELP:
        commands = "\n".join(f"  {name:<9} {line}" for name, line in COMMANDS.items())
        return streams.show(_as_typed(USAGE.format(commands=commands)))
    from bd3lm_jax.core.errors import UserError, command_line, escape_control_characters, nearest, one_line

    name, rest = argv[0], argv[1:]
    try:
        if name not in COMMANDS:
            raise UserError(f"unknown command '{name}': {nearest(name, COMMANDS)}")
        command = importlib.import_module(f"launch.{name}")
        if any(word in HELP for word in rest):
            return streams.show(_help(command))
        return _run(command, rest)
    except UserError as error:
        print("error:", one_line(error), file=sys.stderr, flush=True)
        if error.on_all_processes:
            from bd3lm_jax.parallel import distributed

            distributed.wait_and_shut_down()
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        print(f"error: the package '{escape_control_characters(str(error.name))}' is not installed: pip install -e .",
              file=sys.stderr)
        return 1
    except Exception as error:
        if isinstance(error, OSError) and error.errno in streams.DISK_FULL_ERRNOS:
            print(f"error: cannot write {error.filename or 'a file'}: {error.strerror}; free some space, or choose "
                  "another place", file=sys.stderr)
            return 1
        if _no_backend(error):
            print(f"error: JAX has no such device ({one_line(error) or 'not installed'}): JAX_PLATFORMS="
                  f"{os.environ.get('JAX_PLATFORMS', '')}; unset it, or install what it names "
                  f"({command_line('doctor')} says what is there)", file=sys.stderr)
            return 2
        import traceback

        print(escape_control_characters(traceback.format_exc()), end="", file=sys.stderr)
        return _code_of(error)


def _no_backend(error: Exception) -> bool:
    """Whether JAX failed to start the devices that JAX_PLATFORMS names."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    return any(os.path.basename(frame.filename) == "xla_bridge.py" and frame.name == "backends" for frame in frames)


def _fix_settings() -> None:
    """Before JAX is imported: what it computes with, whatever its variables say."""
    for name, value in JAX_SETTINGS.items():
        if os.environ.get(name, value).lower() not in (value, {"0": "false", "1": "true"}.get(value)):
            print(f"note: {name}={os.environ[name]} is not used, it would change results", file=sys.stderr)
        os.environ[name] = value


def _code_of(error: Exception) -> int:
    """1, or 75 where another process of the run is gone, which says nothing against running all again."""
    if "bd3lm_jax.parallel.distributed" not in sys.modules:
        return 1
    from bd3lm_jax.core.errors import WatchdogTimeout
    from bd3lm_jax.parallel import distributed

    if not distributed.is_lost_peer(error):
        return 1
    print("error: another process of this run is gone: run the same command again", file=sys.stderr)
    return WatchdogTimeout.exit_code


def _run(command, argv: list[str]) -> int:
    from bd3lm_jax.core import log
    from launch import arguments

    argv = arguments.common(argv)
    if command.TAKES_CONFIG:
        spec, overrides, argv = arguments.split_config(argv)
        args = arguments.parse_flags(command.define, argv, takes_config=True)
        if getattr(command, "LOADS_CONFIG", False):
            result = command.main(args, spec, overrides)
        else:
            result = command.main(args, arguments.load_config(spec, overrides), arguments.config_name(spec))
    elif getattr(command, "TAKES_COMMAND", False):
        argv, words = arguments.split_command(argv)
        result = command.main(arguments.parse_flags(command.define, argv), words)
    else:
        result = command.main(arguments.parse_flags(command.define, argv, getattr(command, "POSITIONAL", None)))
    with streams.result():
        log.result(result)
    return 0 if result.get("ok", True) else 1


def _help(command) -> str:
    from launch import arguments

    config = arguments.CONFIG_HELP if command.TAKES_CONFIG else ""
    flags = f"{config}\n{arguments.flags_help(command.define)}".rstrip()
    return _as_typed(f"{command.__doc__.strip()}\n\nFlags:{flags}\n{arguments.COMMON_HELP}")


def _as_typed(text: str) -> str:
    """A help text with commands as this user starts them."""
    from bd3lm_jax.core.errors import program

    return text.replace("python -m launch", program())


def _stop_at_once(*_: object) -> None:
    """SIGTERM where nothing listens to it that could save: while libraries load, processes join, texts are written."""
    os.write(2, b"error: stopped by SIGTERM: run the same command again\n")
    os._exit(EXIT_PREEMPTED)


def launch(argv: list[str] | None = None) -> None:
    """`main`, then the end of the process if it failed. argv: None for what was typed after the program's name."""
    if argv is None:
        argv = sys.argv[1:]
        sys.path.append("")  # `--import=MODULE` finds files of this folder; last, so that they hide nothing installed
    signal.signal(signal.SIGTERM, _stop_at_once)  # before anything is loaded
    streams.open_all()
    _fix_settings()
    code = main(argv)
    if code:  # at once: exit handlers of a failed process would wait for its peers and threads
        with streams.discarding(sys.stdout):
            if sys.stdout:
                sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    launch(sys.argv[1:])  # Python itself has put the working directory on the path

"""Command-line flags and `--config=NAME[:args] --config.key=value` to plain values; no device is touched."""

import contextlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from absl import flags
from ml_collections import ConfigDict, config_flags

from bd3lm_jax.core import migrations, paths, remote, synonyms
from bd3lm_jax.core.errors import UserError, nearest
from launch import flag_names, texts

DEFAULT_CONFIG = "configs/tiny.py"
SHIPPED = Path(__file__).parents[1] / "configs"  # the presets of this package, in a checkout and where it is installed
COMMON_HELP = """\
Flags of every command:
  --import=MODULE           import a module that adds objectives, networks, schedules, samplers or corpora; repeatable
                            (docs/objectives.md)
  --compile_cache=off       compile everything anew: do not read or keep compiled programs on disk"""
CONFIG_HELP = """
  --config=NAME[:args]      the run's configuration: a preset of this package, e.g. tiny (the default), found from any
                            folder, or a file FILE.py; its docstring says which args it takes
  --config.KEY=VALUE        change one key, e.g. --config.optim.lr=1e-3 --config.train.steps=2000;
                            defaults and meanings in bd3lm_jax/core/schema.py"""


def parse_flags(define: Callable[[flags.FlagValues], None], argv: Sequence[str],
                positional: str | None = None, takes_config: bool = False) -> flags.FlagValues:
    """Values of the flags that `define` declares; one word without dashes is the value of the flag `positional`.

    takes_config: the command has keys of a config as well, which an unknown flag may have meant.

    UserError for an unknown flag, two spellings of one flag (`flag_names`), a bad value, a stray argument, a text that
    is not UTF-8.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    define(values)
    try:
        rest = values(["launch", *flag_names.canonical(argv, values)])[1:]
    except flags.UnrecognizedFlagError as error:
        raise UserError(_unknown_flag(error, list(values), takes_config)) from None
    except flags.Error as error:
        raise UserError(_one_line(error)) from None
    if rest and positional and not values[positional].present:
        values[positional].value = rest.pop(0)
    if rest:
        raise UserError(f"unexpected argument '{rest[0]}': flags are written --name=value")
    return texts.decode_flags(values, PathParser)


def _unknown_flag(error: flags.UnrecognizedFlagError, known: list[str], takes_config: bool) -> str:
    """What is said of a flag that is none: the one that others call so, else the closest, else how keys are written."""
    suggestion, key = synonyms.flag(error.flagname, known), synonyms.config_key(error.flagname)
    if suggestion or key and takes_config:
        return f"Unknown command line flag '{error.flagname}'. Did you mean: {suggestion or f'--config.{key}'}"
    near = "Did you mean" in str(error)
    return _one_line(error) + ("" if near else ": see --help; keys of a config are written --config.train.steps=100")


class PathParser(flags.ArgumentParser):
    """The value of a flag that is a path, or several with commas between them: `paths.local` of each."""

    def __init__(self, several: bool = False, may_be_remote: bool = False):
        self.several, self.may_be_remote = several, may_be_remote

    def parse(self, argument):
        try:
            words = paths.split(argument, "path", self.may_be_remote) if self.several else [argument]
            expanded = [paths.local(word, "path", self.may_be_remote) for word in words]
            for path in expanded:
                remote.check(path)
            return ",".join(expanded)
        except UserError as error:
            raise ValueError(str(error).removeprefix("path=")) from None

    def flag_type(self) -> str:
        return "path"


def define_path(values: flags.FlagValues, name: str, default: str, text: str, *, several: bool = False,
                may_be_remote: bool = False) -> None:
    """A flag that is a path; several: or paths with commas between them (`paths.split` gives them).

    may_be_remote: of an input, which may have a scheme (gs://).
    """
    flags.DEFINE(PathParser(several, may_be_remote), name, default, text, flag_values=values)


def define_inputs(values: flags.FlagValues, name: str, text: str) -> None:
    """A flag that may be given several times, each time with the path of an input, which may have a scheme (gs://)."""
    flags.DEFINE_multi(PathParser(may_be_remote=True), flags.ArgumentSerializer(), name, None, text, flag_values=values)


def define_seed(values: flags.FlagValues, text: str) -> None:
    """The flag of a command that draws random numbers: 0 to the largest number of 63 bits."""
    flags.DEFINE_integer("seed", 0, text, lower_bound=0, upper_bound=2**63 - 1, flag_values=values)


def required(values: flags.FlagValues, name: str) -> str:
    """The value of a flag that has no sensible default. UserError if it is not given."""
    value = values[name].value
    if not value:
        raise UserError(f"--{name} is missing: see --help for an example")
    return value


def define_step(values: flags.FlagValues) -> None:
    """The flag of commands that use a trained run."""
    flags.DEFINE_string("step", "latest", "checkpoint of a run: latest, best (the lowest validation bound when it was "
                        "saved) or its number", flag_values=values)


def step_of(args: flags.FlagValues) -> int | str:
    """What --step says. UserError for another word."""
    if args.step.isdecimal():
        return int(args.step)
    if args.step not in ("latest", "best"):
        raise UserError(f"--step={args.step}: expected latest, best or the number of a step")
    return args.step


def flags_help(define: Callable[[flags.FlagValues], None]) -> str:
    """One line a flag, with its default."""
    values = flags.FlagValues()
    define(values)
    return "\n".join(f"  --{name:<12} {' '.join(values[name].help.split())} (default {values[name].default!r})"
                     for name in values)


def split_config(argv: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """(config file and its args, `--config.key=value` words, the other words)."""
    spec, overrides, rest = DEFAULT_CONFIG, [], []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("--config", "-config"):
            spec = value if equals else next(words, "")
        elif re.match(r"--?(no)?config\.", word):
            overrides.append(word if equals or name.lstrip("-").startswith("no") else f"{word}={next(words, '')}")
        else:
            rest.append(word)
    return spec, overrides, rest


def common(argv: Sequence[str]) -> list[str]:
    """Does what the flags of every command say, --import and --compile_cache; returns the other words.

    What stands behind `--` is left alone. UserError for a module that cannot be imported, or another word than on, off.
    """
    from bd3lm_jax.core import plugins

    before, after = split_at_dashes(argv)
    modules, rest = [], []
    words = iter(before)
    for word in words:
        name, equals, value = word.partition("=")
        name = name.lstrip("-").replace("-", "_")
        if name not in ("import", "compile_cache") or not word.startswith("-"):
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if name == "import":
            modules.append(value)
        elif value in ("on", "off"):
            os.environ["BD3LM_COMPILE_CACHE"] = value  # also of the processes that a command starts
        else:
            raise UserError(f"--compile_cache={value}: expected on or off")
    plugins.load(modules)
    return rest + after


def split_at_dashes(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before the first `--`, and it with the words after it."""
    words = list(argv)
    where = words.index("--") if "--" in words else len(words)
    return words[:where], words[where:]


def split_command(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(what stands before `--`, the command after it); the latter may begin with `python -m launch` or `bd3lm`."""
    before, after = split_at_dashes(argv)
    command = after[1:]
    if command[1:3] == ["-m", "launch"]:
        return before, command[3:]
    return before, command[1:] if command[:1] == ["bd3lm"] else command


def override_key(word: str) -> str:
    """`--config.optim.lr=1` -> `optim.lr`."""
    return re.sub(r"^--?(no)?config\.", "", word).partition("=")[0]


def config_name(spec: str) -> str:
    """The name of a config file without directory, ending and args: what its run directory is called."""
    return Path(spec.partition(":")[0]).stem


def load_config(spec: str, overrides: Sequence[str]):
    """A bd3lm_jax.config.Config: `get_config(args)` of a config file with keys changed, validated.

    UserError for a missing file, bad args, key or value.
    """
    from bd3lm_jax import unused_keys
    from bd3lm_jax.checkpoints import adapt
    from bd3lm_jax.config import Config

    config = _get_config(spec)
    overrides = _known_overrides(texts.decode_overrides(overrides), list(_leaves(config)))
    values = flags.FlagValues()
    try:
        argv = ["launch", *overrides]
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        values(argv)
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(_one_line(error)) from None
    result = Config.from_dict(adapt.resolve(values.config))
    unused_keys.check(result, {override_key(word) for word in overrides})
    return result


def _known_overrides(words: Sequence[str], known: list[str]) -> list[str]:
    """The words with today's names of their keys. UserError for a key that is not `known`, or is given by two names."""
    result, spelled = [], {}
    for word in words:
        given = override_key(word)
        key = given if given in known else migrations.current_name(given)
        if key not in known:
            raise UserError(f"unknown config key '{given}': {_nearest_key(given, known)}")
        migrations.check_one_name(spelled.setdefault(key, given), given)
        result.append(word.replace(given, key, 1))
    return result


def load_sweep(path: str) -> list[dict]:
    """What `sweep()` of a config file yields, the changed keys of each run: `[{"optim.lr": 1e-3}, ...]`.

    UserError for a missing file, no sweep(), or one that yields nothing or something else.
    """
    module = _load_module(path)
    if not callable(getattr(module, "sweep", None)):
        raise UserError(f"config file '{path}' has no function sweep(): write one that yields the changed keys of each "
                        "run, e.g. def sweep(): yield from ({'optim.lr': lr} for lr in (1e-3, 3e-3))")
    with _errors_of(path):
        if inspect.signature(module.sweep).parameters:
            raise UserError(f"sweep() in config file '{path}' takes arguments, expected none")
        try:
            points = list(module.sweep())
        except ValueError as error:  # what a config says of its own values
            raise UserError(f"sweep() in config file '{path}': {error}") from None
    if not points:
        raise UserError(f"sweep() in config file '{path}' yields nothing, expected a dict of changed keys for each run")
    for point in points:
        if not isinstance(point, dict) or not all(isinstance(key, str) for key in point):
            raise UserError(f"sweep() in config file '{path}' yields {point!r}, expected a dict of changed keys, e.g. "
                            "{'optim.lr': 1e-3}")
    return points


def _load_module(path: str):
    """The module of a config file. UserError if there is none."""
    path = _config_file(path)
    module_spec = importlib.util.spec_from_file_location(f"config_{Path(path).stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"config file '{path}' is not a Python file: expected a name that ends in .py")
    module = importlib.util.module_from_spec(module_spec)
    with _errors_of(path):
        module_spec.loader.exec_module(module)
    return module


def _config_file(path: str) -> str:
    """The file of `tiny`, a preset of this package, of `configs/tiny.py`, which is that preset where the working
    directory has no such file, or of any other path. UserError if there is none."""
    path = paths.local(path, "--config")
    presets = {}
    for file in _config_files(SHIPPED):
        inside = file.relative_to(SHIPPED)
        presets |= {str(inside.with_suffix("")): file, f"configs/{inside}": file}
    is_file, is_python = os.path.isfile(path), path.endswith(".py")
    if path in presets and not (is_python and is_file):
        _import_shipped()
        return str(presets[path])
    if not is_file:
        known = {*presets, *map(str, _config_files(Path("configs")))}
        same_kind = [name for name in known if name.endswith(".py") == is_python]
        raise UserError(f"config file '{path}' does not exist: {nearest(path, same_kind)}")
    return path


def _config_files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*.py") if file.stem not in ("__init__", "common")]


def _import_shipped() -> None:
    """Presets import `configs.common`: that of this package, also where the working directory has such a folder."""
    sys.path.insert(0, str(SHIPPED.parent))
    try:
        importlib.import_module("configs")
    finally:
        sys.path.remove(str(SHIPPED.parent))


@contextlib.contextmanager
def _errors_of(path: str) -> Iterator[None]:
    """Whatever the code of a config file raises as a UserError with its line; a package that is missing stays that."""
    try:
        yield
    except (UserError, ModuleNotFoundError):
        raise
    except SyntaxError as error:
        raise UserError(f"config file '{error.filename}' line {error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        here = os.path.abspath(path)
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if os.path.abspath(frame.filename) == here]
        where = f" line {lines[-1]}" if lines else ""
        raise UserError(f"config file '{path}'{where}: {type(error).__name__}: {error}") from None


def _get_config(spec: str) -> ConfigDict:
    path, colon, arg = spec.partition(":")
    module = _load_module(path)
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"config file '{path}' has no function get_config(arg)")
    args = [arg] if colon else []
    with _errors_of(path):
        signature = inspect.signature(module.get_config)
        try:
            signature.bind(*args)
        except TypeError:
            raise UserError(f"config file '{path}' takes "
                            + ("no args after ':'" if args else "args: give FILE.py:args")) from None
        try:
            config = module.get_config(*args)
        except ValueError as error:  # what a config says of its own values
            raise UserError(f"{spec}: {error}") from None
        if not isinstance(config, (ConfigDict, dict)):
            raise UserError(f"get_config() in config file '{path}' returns {config!r}, expected a ConfigDict or a dict")
        config = ConfigDict(cast(dict, config))
        _check_keys(path, config)
    _use_current_names(config)
    _add_defaults(config)
    return config


def _use_current_names(config: ConfigDict) -> None:
    """Keys that a config file sets by their first names get today's, with the references among them."""
    for section, names in migrations.RENAMED.items():
        values: Any = config.get(section)
        for first, current in names.items() if isinstance(values, ConfigDict) else ():
            if first in values.keys():
                if current in values.keys():
                    migrations.check_one_name(f"{section}.{first}", f"{section}.{current}")
                value = dict(values.items(preserve_field_references=True))[first]
                del values[first]
                values[current] = value


def _add_defaults(config: ConfigDict) -> None:
    """Keys that a config file leaves out, at their defaults: --config.KEY=VALUE may name them."""
    from bd3lm_jax.config import NETWORK, OBJECTIVE, default_dict

    sections: dict[str, Any] = {name: values for name, values in config.items() if isinstance(values, ConfigDict)}
    kinds = (sections.get(name, {}).get("kind", kind) for name, kind in (("model", NETWORK), ("diffusion", OBJECTIVE)))
    with config.unlocked():
        for name, default in default_dict(*kinds).items():
            if name not in config:
                config[name] = ConfigDict(default) if isinstance(default, dict) else default
            for key in default.keys() - sections[name].keys() if name in sections else ():
                sections[name][key] = default[key]


def _check_keys(path: str, config: ConfigDict) -> None:
    """UserError for keys that --config.KEY=VALUE could not name."""
    for key, value in config.items():
        if not isinstance(key, str):
            raise UserError(f"get_config() in config file '{path}' has the key {key!r}, expected a text")
        if isinstance(value, ConfigDict):
            _check_keys(path, value)


def _leaves(config: ConfigDict, prefix: str = ""):
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _nearest_key(key: str, known: list[str]) -> str:
    """The key of that name in another section, else the one that others call so, else the closest of its section, else
    the closest section."""
    section, leaf = key.partition(".")[0], key.rpartition(".")[2]
    same_name = [name for name in known if name.rpartition(".")[2] == leaf]
    suggestion = synonyms.config_key(key, known)
    if suggestion and (not same_name or suggestion in same_name):
        return f"did you mean '{suggestion}'?"
    same_section = [name for name in known if name.startswith(f"{section}.")]
    sections = {name.partition(".")[0] for name in known}
    return nearest(key, same_name or same_section) if same_name or same_section else nearest(section, sections)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

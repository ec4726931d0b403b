"""Modules from outside the package that add objectives, networks, schedules and other things to its registries.

A module registers what it has when it is imported, and importing it runs its code. So only what the user names is
imported: `--import=MODULE` of a command, the variable BD3LM_IMPORT (modules with commas between them), and installed
packages with an entry point in the group "bd3lm_jax.plugins". A run directory, which may come from somebody else,
says which modules it needs, and is never a reason to import them.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterable
from typing import Any

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.log import note, note_once

GROUP, VARIABLE = "bd3lm_jax.plugins", "BD3LM_IMPORT"
_requested: list[str] = []  # by the user, in order
_installed_loaded = False  # for what is installed and what the variable names


def load(names: Iterable[str], flag: str = "--import=") -> None:
    """Import modules. UserError, with the flag, for one that cannot be imported."""
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise UserError(f"{flag}{name}: expected the name of a module, e.g. my_objective for my_objective.py in "
                            "this folder or on PYTHONPATH")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = str(error.name)
            raise UserError(f"{flag}{name}: " + (
                f"no module {missing} in this folder or on PYTHONPATH" if f"{name}.".startswith(f"{missing}.") else
                f"it needs the package '{missing}', which is not installed")) from None
        except (Exception, SystemExit) as error:
            raise UserError(f"{flag}{name} cannot be imported: {type(error).__name__}: {error}") from None
        if name not in _requested:
            _requested.append(name)


def load_installed() -> None:
    """Import, once a process, what BD3LM_IMPORT names and the plug-ins of installed packages. UserError for the former;
    a package whose plug-in cannot be imported is passed over with a warning."""
    global _installed_loaded
    if _installed_loaded:
        return
    _installed_loaded = True  # first: a plug-in may read a config while it is imported
    load(filter(None, os.environ.get(VARIABLE, "").split(",")), f"{VARIABLE}=")
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            entry.load()
        except (Exception, SystemExit) as error:
            note(f"warning: plug-in '{entry.name}' ({entry.value}) is passed over: {type(error).__name__}: {error}")


def requested() -> list[str]:
    """The modules that the user named so far."""
    return list(_requested)


def required_modules(parts: Iterable[Any]) -> list[str]:
    """The modules that another process has to import: those that the user named, and those that define one of `parts`
    (classes and functions of a run) outside the package. A note names what no other process can import."""
    module_names = requested()
    for part in parts:
        module = part.__module__
        if module.split(".")[0] == __name__.split(".")[0] or module in module_names:
            continue
        if module == "__main__" or importlib.util.find_spec(module) is None:
            note_once(f"warning: {part.__name__} is defined in {module}, which other commands cannot import: put it in "
                      "a module of its own, and name that with --import=MODULE")
        else:
            module_names.append(module)
    return module_names


def missing(names: Any) -> list[str]:
    """Those of the modules that a run directory names (whatever stands there) that this process has not imported."""
    names = names if isinstance(names, list) else []
    return [name for name in names if isinstance(name, str) and name not in sys.modules]

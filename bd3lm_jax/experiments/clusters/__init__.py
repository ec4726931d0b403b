"""Clusters: what existing engines need to run one of our commands. Nothing here depends on an engine.

An engine is one file and one line in ENGINES: a module with `needs` (names of the fields of Job that may not be empty),
`check(job)` and `actions(job) -> {action: [argv, ...]}` and `files(job) -> {path: text}`. Commands are lists of words;
quoting happens once, in `shell`, and inside the few texts that a remote shell reads, with `shlex`.
"""

import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bd3lm_jax.core import files
from bd3lm_jax.core.errors import RunError, UserError, lookup
from bd3lm_jax.core.log import note
from bd3lm_jax.experiments.clusters import gcloud, skypilot, slurm, xpk
from bd3lm_jax.experiments.clusters.job import ACTIONS, Job

ENGINES = {"gcloud": gcloud, "xpk": xpk, "skypilot": skypilot, "slurm": slurm}
NAME = r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?"  # what all engines take
ACTION_HELP = {"create": "the machines, and what is installed on them", "run": "the command",
               "logs": "follow what it says", "resume": "after it has ended or its machines were taken: it goes on",
               "delete": "everything that create and run made, except what is on the shared file system"}
SCRIPT = "cluster.sh"
ZONE = r"([a-z0-9]+(-[a-z0-9]+)+)?"


def launch(engine: str, job: Job, action: str, execute: bool) -> dict[str, Any]:
    """Write the engine's files and one script with all actions, show them, and with `execute` do one.

    action: one of ACTIONS, or "all". Returns engine, actions (their commands as a shell reads them), files, chips and
    hosts. UserError for what the engine cannot do, RunError if a command fails.
    """
    module = lookup(ENGINES, engine, "engine")
    check(engine, module, job)
    if action != "all" and action not in ACTIONS:
        lookup(dict.fromkeys(ACTIONS), action, "action")
    if execute and action == "all":
        raise UserError(f"--run does one action: add --action=, one of {', '.join(ACTIONS)}")
    actions = module.actions(job)
    texts = module.files(job) | {f"{job.out}/{SCRIPT}": script(engine, job, actions)}
    _write(texts)
    chosen = ACTIONS if action == "all" else (action,)
    for name in chosen:
        note(f"# {name}: {ACTION_HELP[name]}")
        for argv in actions[name]:
            note(shlex.join(argv))
    if execute:
        _execute(action, actions[action])
    return {"engine": engine, "accelerator": job.slice.name, "slices": job.slices,
            "chips": job.slice.chips * job.slices, "hosts": job.hosts,
            "actions": {name: [shlex.join(argv) for argv in actions[name]] for name in chosen}, "files": list(texts)}


def check(engine: str, module: Any, job: Job) -> None:
    """UserError for a field that is missing, that no engine takes, or that this one does not."""
    if not re.fullmatch(NAME, job.name):
        raise UserError(f"--name={job.name!r}: expected up to 40 lower-case letters, digits and '-', a letter first")
    texts = {"project": job.project, "zone": job.zone, "shared_dir": job.shared_dir, "cluster": job.cluster,
             "out": job.out}
    for field, text in [*texts.items(), *(("the command", word) for word in job.command)]:
        if not text.isprintable():
            raise UserError(f"{field} holds a character that cannot be printed, {text!r}: leave it out")
    if not re.fullmatch(ZONE, job.zone):
        raise UserError(f"--zone={job.zone}: expected a zone, e.g. us-central1-a")
    for field in module.needs:
        if not getattr(job, field):
            raise UserError(f"--{field} is missing: engine '{engine}' needs it, see --help for an example")
    for field in set(texts) - {"shared_dir", "out"} - set(module.takes):
        if getattr(job, field):
            raise UserError(f"--{field} means nothing to engine '{engine}': leave it out")
    module.check(job)


def script(engine: str, job: Job, actions: dict[str, list[Sequence[str]]]) -> str:
    """One bash script whose first argument is the action."""
    lines = ["#!/usr/bin/env bash", f"# {engine}: {job.name} on {job.slices} x {job.slice.name}, {job.hosts} hosts",
             "set -euo pipefail", 'case "${1:-}" in']
    for name in ACTIONS:
        lines += [f"{name})  # {ACTION_HELP[name]}", *(f"  {shlex.join(argv)}" for argv in actions[name]), "  ;;"]
    return "\n".join([*lines, f'*) echo "usage: bash $0 {"|".join(ACTIONS)}" >&2; exit 2 ;;', "esac", ""])


def _write(texts: dict[str, str]) -> None:
    for path, text in texts.items():
        with files.errors(path, "choose another --out", work_started=False):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            files.write(path, text.encode())


def _execute(action: str, commands: Sequence[Sequence[str]]) -> None:
    for argv in commands:
        try:
            code = subprocess.run(argv, stdout=2).returncode  # the result alone goes to stdout
        except FileNotFoundError:
            raise RunError(f"{action}: the program '{argv[0]}' is not installed") from None
        if code:
            raise RunError(f"{action}: exit code {code} of {shlex.join(argv)}")

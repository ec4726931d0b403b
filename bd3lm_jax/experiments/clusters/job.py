"""What is asked of a cluster, and the pieces of shell that several engines share."""

import dataclasses
import shlex

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.experiments.clusters.slices import Slice

ACTIONS = ("create", "run", "logs", "resume", "delete")
# Exit codes of a run that goes on when started again: saved, stuck, a peer is gone, killed, SIGTERM before Python ran.
RETRY_EXIT_CODES = (42, 75, 134, 137, 143)
PYTHON = "3.11"  # that constraints.txt was tested with; images of TPU VMs bring an older one
VENV = ".venv"
GRACE_S = 120  # between SIGTERM and SIGKILL: what a run needs to finish its step and save


@dataclasses.dataclass(frozen=True)
class Job:
    """One command on one cluster. Texts are as the user gave them, "" where nothing was given.

    command: words after `python -m launch`. points: runs of a sweep, 0 for other commands.
    """

    name: str
    slice: Slice
    slices: int
    project: str
    zone: str
    cluster: str
    shared_dir: str  # a directory that all hosts see, where runs/ lies
    spot: bool
    restarts: int  # at most, after an exit code of AGAIN
    out: str  # directory for the files of the engine
    command: tuple[str, ...]
    points: int

    @property
    def hosts(self) -> int:
        return self.slice.hosts * self.slices


def install(job: Job) -> list[str]:
    """Shell lines that make a virtual environment of the locked versions in the checkout."""
    extra = "tpu" if job.slice.is_tpu else "cuda"
    return ["python3 -m pip install --quiet --user uv",
            f"python3 -m uv venv --quiet --allow-existing --python {PYTHON} {VENV}",
            f"python3 -m uv pip install --quiet --python {VENV} -c constraints.txt -e '.[{extra}]'"]


def link_runs(directory: str) -> list[str]:
    """Shell lines that let runs/ lie in `directory`; none for "". They fail where runs/ holds other files: a link would
    land inside it."""
    if not directory:
        return []
    message = f"error: runs/ is a directory here, not a link to {directory}: move what is in it there, then remove it"
    free = f"[ -L runs ] || [ ! -e runs ] || rmdir runs 2>/dev/null || {{ echo {shlex.quote(message)} >&2; exit 1; }}"
    return [f"mkdir -p {shlex.quote(directory)}", f"{{ {free}; }}", f"ln -sfn {shlex.quote(directory)} runs"]


def reject_bucket(engine: str, job: Job) -> None:
    if job.shared_dir.startswith("gs://"):
        raise UserError(f"--shared_dir={job.shared_dir}: engine '{engine}' mounts no bucket, give the directory "
                        "where it is mounted")


def command_line(job: Job, python: str) -> str:
    """Our command as a shell reads it."""
    return shlex.join([python, "-m", "launch", *job.command])


def pack(job: Job, directory: str) -> list[list[str]]:
    """Commands that put the committed state of the checkout into an archive in `directory`."""
    return [["git", "archive", "--format=tar.gz", f"--output={directory}/code.tar.gz", "HEAD"]]

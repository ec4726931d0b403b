"""Cloud TPU VMs as queued resources, by the `gcloud` command: every host gets the same code and the same command."""

import shlex

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.experiments.clusters.job import (
    RETRY_EXIT_CODES,
    Job,
    command_line,
    install,
    link_runs,
    pack,
    reject_bucket,
)

needs = ("project", "zone")
takes = ("project", "zone")
TPUS = ("gcloud", "compute", "tpus")
POLL_S = 30  # between questions whether the machines are there
HOME = "bd3lm_jax"  # the checkout on every host, in the home directory
LOG, PID = "bd3lm.log", "bd3lm.pid"


def check(job: Job) -> None:
    if not job.slice.is_tpu:
        raise UserError(f"engine 'gcloud' has queued resources of TPUs, not {job.slice.name}: use skypilot or slurm")
    if (job.hosts > 1 or job.spot) and not job.shared_dir:
        raise UserError("--shared_dir is missing: several hosts, or machines that can be taken, keep runs/ in a "
                        "directory that all of them see, e.g. an NFS share that the image mounts")
    reject_bucket("gcloud", job)


def files(job: Job) -> dict[str, str]:
    return {}


def actions(job: Job) -> dict[str, list[list[str]]]:
    create, run = _create(job), _everywhere(job, _start(job))
    logs = _ssh(job, _nodes(job)[0], f"tail -n 200 -F ~/{LOG}", worker="0")
    return {"create": create, "run": run, "logs": [logs], "resume": [*_delete(job), *create, *run],
            "delete": _delete(job)}


def _create(job: Job) -> list[list[str]]:
    nodes = ([f"--node-id={job.name}"] if job.slices == 1
             else [f"--node-count={job.slices}", f"--node-prefix={job.name}"])
    request = [*TPUS, "queued-resources", "create", job.name, *nodes, *_where(job),
               f"--accelerator-type={job.slice.name}", f"--runtime-version={job.slice.runtime}",
               *(["--spot"] if job.spot else [])]
    copies = [[*TPUS, "tpu-vm", "scp", f"{job.out}/code.tar.gz", f"{node}:", *_where(job), "--worker=all"]
              for node in _nodes(job)]
    unpack = [f"mkdir -p ~/{HOME}", f"tar -xzf ~/code.tar.gz -C ~/{HOME}", f"cd ~/{HOME}", *link_runs(job.shared_dir),
              *install(job)]
    return [*pack(job, job.out), request, _wait(job), *copies, *_everywhere(job, " && ".join(unpack))]


def _wait(job: Job) -> list[str]:
    """Until the request is granted; fails when it never will be."""
    ask = shlex.join([*TPUS, "queued-resources", "describe", job.name, *_where(job), "--format=value(state.state)"])
    return ["bash", "-c", f'while state=$({ask}) && [ "$state" != ACTIVE ]; do case "$state" in '
            f'FAILED|SUSPENDED|DELETING) echo "request is $state" >&2; exit 1 ;; esac; sleep {POLL_S}; done; '
            '[ "$state" = ACTIVE ]']


def _start(job: Job) -> str:
    """Shell text for a host: the command, again after an exit code of AGAIN, cut loose from the connection."""
    again = "|".join(map(str, RETRY_EXIT_CODES))
    loop = (f"for attempt in $(seq 0 {job.restarts}); do {command_line(job, '.venv/bin/python')}; code=$?; "
            f"case $code in {again}) sleep 10 ;; *) exit $code ;; esac; done; exit $code")
    running = f'[ -e ~/{PID} ] && kill -0 "$(cat ~/{PID})" 2>/dev/null'
    return (f"cd ~/{HOME} || exit 1; if {running}; then echo 'it runs already' >&2; exit 1; fi; "
            f"nohup setsid bash -c {shlex.quote(loop)} >> ~/{LOG} 2>&1 < /dev/null & echo $! > ~/{PID}")


def _delete(job: Job) -> list[list[str]]:
    return [[*TPUS, "queued-resources", "delete", job.name, *_where(job), "--force", "--quiet"]]


def _nodes(job: Job) -> list[str]:
    return [job.name] if job.slices == 1 else [f"{job.name}-{i}" for i in range(job.slices)]


def _everywhere(job: Job, text: str) -> list[list[str]]:
    return [_ssh(job, node, text, worker="all") for node in _nodes(job)]


def _ssh(job: Job, node: str, text: str, worker: str) -> list[str]:
    return [*TPUS, "tpu-vm", "ssh", node, *_where(job), f"--worker={worker}", f"--command={text}"]


def _where(job: Job) -> list[str]:
    return [f"--project={job.project}", f"--zone={job.zone}"]

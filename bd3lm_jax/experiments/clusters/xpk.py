"""Workloads on GKE by `xpk`, which restarts them on exit codes 42 and 127 to 255, and on those it is told."""

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.experiments.clusters.job import (
    GRACE_S,
    PYTHON,
    RETRY_EXIT_CODES,
    Job,
    command_line,
    link_runs,
    pack,
    reject_bucket,
)

needs = ("project", "zone", "shared_dir")
takes = ("project", "zone", "cluster")
DEFAULT_CODES = (42, *range(127, 256))
IMAGE = f"python:{PYTHON}-slim-bookworm"


def check(job: Job) -> None:
    if not job.slice.is_tpu:
        raise UserError(f"engine 'xpk' is set up for TPUs here, not {job.slice.name}: use skypilot or slurm")
    reject_bucket("xpk", job)


def files(job: Job) -> dict[str, str]:
    return {}


def actions(job: Job) -> dict[str, list[list[str]]]:
    cluster = job.cluster or job.name
    where = [f"--cluster={cluster}", f"--project={job.project}", f"--zone={job.zone}"]
    run = [*_unpacked(job), _workload(job, where)]
    end = ["xpk", "workload", "delete", f"--workload={job.name}", *where, "--force"]
    size = [f"--tpu-type={job.slice.name}", f"--num-slices={job.slices}"]
    create = [] if job.cluster else [[
        "xpk", "cluster", "create", *where, *size, "--spot" if job.spot else "--on-demand"
    ]]
    delete = [] if job.cluster else [["xpk", "cluster", "delete", *where, "--force"]]
    logs = ["kubectl", "logs", "--follow", "--prefix", "--all-containers", "--tail=200", "--max-log-requests=512",
            f"--selector=jobset.sigs.k8s.io/jobset-name={job.name}"]
    return {"create": create, "run": run, "logs": [logs], "resume": [end, *run], "delete": [end, *delete]}


def _unpacked(job: Job) -> list[list[str]]:
    """The committed state as a directory, which xpk puts into the image."""
    code = f"{job.out}/code"
    return [*pack(job, job.out), ["mkdir", "-p", code], ["tar", "-xzf", f"{job.out}/code.tar.gz", "-C", code]]


def _workload(job: Job, where: list[str]) -> list[str]:
    exit_codes = ",".join(str(code) for code in RETRY_EXIT_CODES if code not in DEFAULT_CODES)
    return ["xpk", "workload", "create", f"--workload={job.name}", *where, f"--tpu-type={job.slice.name}",
            f"--num-slices={job.slices}", f"--base-docker-image={IMAGE}", f"--script-dir={job.out}/code",
            f"--max-restarts={job.restarts}", f"--restart-on-exit-codes={exit_codes}",
            f"--termination-grace-period-seconds={GRACE_S}", f"--command={_text(job)}"]


def _text(job: Job) -> str:
    """Shell text of the container; exec, so that SIGTERM reaches Python."""
    lines = [*link_runs(job.shared_dir), "pip install --quiet -c constraints.txt -e '.[tpu]'",
             f"exec {command_line(job, 'python')}"]
    return " && ".join(lines)

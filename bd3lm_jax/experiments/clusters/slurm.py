"""Slurm: one batch script, an array for a sweep, that asks to be queued again when the run wants to go on."""

import shlex

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.experiments.clusters.job import GRACE_S, RETRY_EXIT_CODES, VENV, Job, command_line, install, link_runs

needs = ()
takes = ("cluster",)


def check(job: Job) -> None:
    if job.slice.is_tpu:
        raise UserError(f"engine 'slurm' is for GPUs, not {job.slice.name}: use --accelerator=H100:8, or gcloud or xpk")
    if job.slices > 1:
        raise UserError("--slices means nothing to engine 'slurm': ask for more GPUs, e.g. --accelerator=H100:16")
    if job.spot:
        raise UserError("--spot means nothing to engine 'slurm': preemption is a matter of partition and QOS there")


def files(job: Job) -> dict[str, str]:
    return {_path(job): _script(job)}


def actions(job: Job) -> dict[str, list[list[str]]]:
    submit = ["sbatch", *([f"--clusters={job.cluster}"] if job.cluster else []), _path(job)]
    create = [["bash", "-c", " && ".join([*link_runs(job.shared_dir), *install(job)])]]
    return {"create": create, "run": [submit], "resume": [submit],
            "logs": [["bash", "-c", f"tail -n 200 -F {shlex.quote(job.out)}/{job.name}-*.log"]],
            "delete": [["scancel", f"--name={job.name}", "--me"]]}


def _path(job: Job) -> str:
    return f"{job.out}/job.slurm"


def _script(job: Job) -> str:
    """Slurm sends SIGTERM to this script alone, which hands it to srun, and srun to every process.

    jax gives a process that it finds under Slurm one GPU: so many processes on several hosts, on one a single process.
    """
    gpus = job.slice.chips // job.slice.hosts
    array, log = (f"#SBATCH --array=0-{job.points - 1}\n", "%A_%a") if job.points else ("", "%j")
    index = ' --index="$SLURM_ARRAY_TASK_ID"' if job.points else ""
    again = "|".join(map(str, RETRY_EXIT_CODES))
    return f"""#!/usr/bin/env bash
#SBATCH --job-name={job.name}
#SBATCH --nodes={job.slice.hosts}
#SBATCH --ntasks-per-node={gpus if job.slice.hosts > 1 else 1}
#SBATCH --gpus-per-node={gpus}
{array}#SBATCH --output={_in_comment(job.out)}/{job.name}-{log}.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@{GRACE_S}
set -u
cd "$SLURM_SUBMIT_DIR" || exit 1
child="" signals=0 code=127
trap 'signals=$((signals + 1)); [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM
srun --kill-on-bad-exit=1 {command_line(job, f"{VENV}/bin/python")}{index} &
child=$!
[ "$signals" = 0 ] || kill -TERM "$child" 2>/dev/null  # it came before there was anyone to tell
while :; do  # a signal ends the wait, not the run
  before=$signals
  wait "$child"
  now=$?
  [ "$now" = 127 ] || code=$now
  [ "$signals" != "$before" ] || break
done
case "$code" in
{again})
  if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.restarts} ]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
  ;;
esac
exit "$code"
"""


def _in_comment(path: str) -> str:
    """A path as sbatch reads it in a comment: quoted where it has spaces."""
    if '"' in path or "%" in path:
        raise UserError(f"--out={path}: Slurm reads \\\" and % in the name of a log otherwise, choose another")
    return f'"{path}"' if " " in path else path

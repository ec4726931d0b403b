"""Managed jobs of SkyPilot: one YAML file; it finds the machines, and new ones when they are taken."""

import json
import textwrap

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.experiments.clusters.job import RETRY_EXIT_CODES, VENV, Job, command_line, install, link_runs

needs = ("shared_dir",)
takes = ("zone",)
PORT = 8476
MOUNT = "/mnt/bd3lm-runs"  # where a bucket appears


def check(job: Job) -> None:
    if job.slices > 1:
        raise UserError("engine 'skypilot' gives a job one slice: use gcloud or xpk for --slices above 1")


def files(job: Job) -> dict[str, str]:
    return {_path(job): _yaml(job)}


def actions(job: Job) -> dict[str, list[list[str]]]:
    start = [["sky", "jobs", "launch", "--yes", "--detach-run", f"--name={job.name}", _path(job)]]
    return {"create": [], "run": start, "logs": [["sky", "jobs", "logs", f"--name={job.name}"]], "resume": start,
            "delete": [["sky", "jobs", "cancel", "--yes", f"--name={job.name}"]]}


def _path(job: Job) -> str:
    return f"{job.out}/sky.yaml"


def _yaml(job: Job) -> str:
    """Quoted texts are JSON, which YAML reads; shell texts are literal blocks."""
    tpu, bucket = job.slice.is_tpu, job.shared_dir.startswith("gs://")
    chips = f"tpu-{job.slice.name}" if tpu else f"{job.slice.kind}:{job.slice.chips // job.slice.hosts}"
    lines = [f"name: {json.dumps(job.name)}", "workdir: .", f"num_nodes: {1 if tpu else job.slice.hosts}", "resources:",
             f"  accelerators: {json.dumps(chips)}", f"  use_spot: {json.dumps(job.spot)}"]
    if job.zone:
        region = job.zone.rpartition("-")[0]
        lines.append(f"  infra: {json.dumps(f'gcp/{region}/{job.zone}', ensure_ascii=False)}")
    if tpu:
        lines += ["  accelerator_args:", f"    runtime_version: {json.dumps(job.slice.runtime)}"]
    lines += ["  job_recovery:", f"    recover_on_exit_codes: {json.dumps(RETRY_EXIT_CODES)}"]
    if bucket:
        lines += ["file_mounts:", f"  {MOUNT}:", f"    source: {json.dumps(job.shared_dir, ensure_ascii=False)}",
                  "    mode: MOUNT"]
    setup = ["set -e", *link_runs(MOUNT if bucket else job.shared_dir), *install(job)]
    return "\n".join([*lines, "setup: |", _block(setup), "run: |", _block(_run(job)), ""])


def _run(job: Job) -> list[str]:
    """exec, so that SIGTERM reaches Python. GPUs of several hosts are told where the first one is."""
    line = f"exec {command_line(job, f'{VENV}/bin/python')}"
    if not job.slice.is_tpu and job.hosts > 1:
        line += (f' --coordinator="$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{PORT}" '
                 '--num_processes="$SKYPILOT_NUM_NODES" --process_id="$SKYPILOT_NODE_RANK"')
    return [line]


def _block(lines: list[str]) -> str:
    return textwrap.indent("\n".join(lines), "  ")

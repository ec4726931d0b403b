"""The Slurm script of a job, run by bash with stand-ins for srun and scontrol."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import time

import pytest
from grids import some
from toy_cluster import COMMAND, bash, engine_job

from bd3lm_jax.experiments import clusters


def slurm_script(tmp_path, **changes):
    asked = engine_job(tmp_path, "slurm", **changes)
    clusters.launch("slurm", asked, "all", execute=False)
    return f"{asked.out}/job.slurm"


def sbatch_options(path):
    lines = [line for line in open(path, encoding="utf-8") if line.startswith("#SBATCH ")]
    return dict((shlex.split(line.removeprefix("#SBATCH "))[0].split("=", 1) + [""])[:2] for line in lines)


def test_slurm_script_asks_for_what_it_needs(tmp_path):
    path = slurm_script(tmp_path)
    assert bash(f"bash -n {shlex.quote(path)}").returncode == 0
    options = sbatch_options(path)
    assert options == {"--job-name": "owt", "--nodes": "2", "--ntasks-per-node": "8", "--gpus-per-node": "8",
                       "--output": f"{tmp_path}/o'ut $dir/owt-%j.log", "--open-mode": "append", "--requeue": "",
                       "--signal": "B:TERM@120"}
    array = sbatch_options(slurm_script(tmp_path, accelerator="H100:8", points=6))
    assert array["--array"] == "0-5" and array["--output"].endswith("owt-%A_%a.log")
    assert (array["--nodes"], array["--ntasks-per-node"], array["--gpus-per-node"]) == ("1", "1", "8")


@pytest.fixture
def slurm(tmp_path):
    """A function that starts the batch script, with an srun that runs its task and hands signals to it."""
    bin_ = tmp_path / "slurm"
    bin_.mkdir()
    python = shutil.which("python3")
    (bin_ / "srun").write_text(f"""#!{python}
import json, os, signal, sys, time
from pathlib import Path
here = Path({str(tmp_path)!r})
def leave(*_):
    time.sleep(0.5)  # finishes its step and saves
    os._exit(42)
signal.signal(signal.SIGTERM, leave)
(here / "task").write_text(json.dumps(sys.argv[1:]))
code = (here / "code").read_text()
while code == "wait":
    time.sleep(0.01)
sys.exit(int(code))
""")
    (bin_ / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/scontrol"\n')
    for file in bin_.iterdir():
        file.chmod(0o755)

    def start(script, **environment):
        told = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "4"} | environment
        started.append(subprocess.Popen(["bash", script], env=os.environ | told | {
            "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}"}))
        return started[-1]

    started = []
    yield start
    (tmp_path / "code").write_text("0")  # a task that still waits leaves
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("code", "restarts", "requeued"), some([
    (0, 0, False), (1, 0, False), (2, 0, False), (42, 0, True), (75, 2, True), (134, 0, True), (42, 3, False)], 0, 3))
def test_slurm_exit_codes(tmp_path, slurm, code, restarts, requeued):
    (tmp_path / "code").write_text(str(code))
    process = slurm(slurm_script(tmp_path, points=6, accelerator="H100:8"), SLURM_RESTART_COUNT=str(restarts))
    assert process.wait(120) == code
    assert json.loads((tmp_path / "task").read_text()) == ["--kill-on-bad-exit=1", ".venv/bin/python", "-m", "launch",
                                                           *COMMAND, "--index=4"]
    told = tmp_path / "scontrol"
    assert (told.read_text() if told.exists() else "") == ("requeue 77\n" if requeued else "")


@pytest.mark.parametrize("signals", [1, 3])
def test_slurm_hands_sigterm_to_the_run_and_waits_for_it(tmp_path, slurm, signals):
    (tmp_path / "code").write_text("wait")
    process = slurm(slurm_script(tmp_path))
    deadline = time.monotonic() + 120
    while not (tmp_path / "task").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert process.wait(120) == 42
    assert (tmp_path / "scontrol").read_text() == "requeue 77\n"


@pytest.mark.parametrize("command", ["child=$!", "before=$signals"])
def test_slurm_sigterm_while_the_run_is_started_is_not_lost(tmp_path, slurm, command):
    """The script gets it right before this command of its own, by a trap of bash."""
    (tmp_path / "code").write_text("wait")
    (tmp_path / "early").write_text(f"""
early() {{
  if [ "$BASH_COMMAND" = {shlex.quote(command)} ]; then
    trap - DEBUG
    while [ ! -s {shlex.quote(str(tmp_path))}/task ]; do sleep 0.02; done
    kill -TERM $$
  fi
}}
trap early DEBUG
""")
    process = slurm(slurm_script(tmp_path), BASH_ENV=str(tmp_path / "early"))
    assert process.wait(120) == 42
    assert (tmp_path / "scontrol").read_text() == "requeue 77\n"

"""What clusters are told: every word arrives as it was given, also through two shells, YAML and Slurm; exit codes.

Stand-ins for the engines' programs write down what they were called with; a real bash and PyYAML read the rest.
"""

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import time

import pytest
import yaml
from toy_cluster import COMMAND, bash, engine_job, job

from bd3lm_jax.core.errors import RunError, UserError
from bd3lm_jax.experiments import clusters
from bd3lm_jax.experiments.clusters import slices
from bd3lm_jax.experiments.clusters.job import link_runs

RECORD = """#!/usr/bin/env python3
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
    print(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]), file=file)
"""


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A function: the calls of all stand-ins so far."""
    bin_, record = tmp_path / "bin", tmp_path / "record"
    bin_.mkdir()
    for name in ("gcloud", "xpk", "sky", "sbatch", "scancel", "kubectl", "git", "tar", "tail", "python", "python3",
                 "pip", "mkdir", "ln"):
        (bin_ / name).write_text(RECORD.replace("/usr/bin/env python3", shutil.which("python3")))
        (bin_ / name).chmod(0o755)
    record.touch()
    monkeypatch.setenv("PATH", f"{bin_}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(record))
    return lambda: [json.loads(line) for line in record.read_text().splitlines()]


# ---- accelerators


@pytest.mark.parametrize(("name", "kind", "chips", "hosts"), [
    ("v5litepod-1", "v5e", 1, 1), ("v5litepod-8", "v5e", 8, 1), ("v5litepod-16", "v5e", 16, 4),
    ("v5litepod-256", "v5e", 256, 64), ("v6e-256", "v6e", 256, 64), ("v4-8", "v4", 4, 1), ("v4-32", "v4", 16, 4),
    ("v5p-8", "v5p", 4, 1), ("v5p-128", "v5p", 64, 16), ("H100:8", "H100", 8, 1), ("H200:64", "H200", 64, 8),
    ("H100:2", "H100", 2, 1)])
def test_slices_by_name(name, kind, chips, hosts):
    found = slices.find(name)
    assert (found.kind, found.chips, found.hosts, found.is_tpu) == (kind, chips, hosts, ":" not in name)


@pytest.mark.parametrize(("name", "said"), [
    ("v5e-16", "did you mean 'v6e-16'"), ("v5litpod-16", "did you mean 'v5litepod-16'?"),
    ("v6e-3", "v6e comes in 1, 4, 8, 16, 32, 64, 128, 256"),
    ("v4-4", "v4 comes in 8, 16"), ("zebra", "for example v4-64"), ("A100:8", "unknown GPU 'A100'"),
    ("H100:12", "a multiple of it"), ("H100:x", "expected H100:N"),
    ("H100:0", "expected H100:N")])
def test_unknown_slices(name, said):
    with pytest.raises(UserError, match=said.replace("?", r"\?")):
        slices.find(name)


# ---- words


@pytest.mark.parametrize("engine", clusters.ENGINES)
def test_every_word_reaches_the_engine(tmp_path, recorded, engine):
    """What is told, read by bash, calls what `actions` lists; a hostile word is a word and runs nothing."""
    asked = engine_job(tmp_path, engine)
    result = clusters.launch(engine, asked, "all", execute=False)
    actions = clusters.ENGINES[engine].actions(asked)
    assert list(result["actions"]) == list(clusters.ACTIONS)
    script = next(path for path in result["files"] if path.endswith("cluster.sh"))
    for action in clusters.ACTIONS:
        words = [shlex.split(line) for line in result["actions"][action]]
        assert words == actions[action]
        before = len(recorded())
        plain = [argv for argv in actions[action] if argv[0] != "bash"]  # the rest loops or installs: see below
        text = "\n".join(shlex.join(argv) for argv in plain)
        assert bash(text).returncode == 0
        assert recorded()[before:] == plain
    assert bash(f"bash -n {shlex.quote(script)}").returncode == 0
    assert bash(f"bash {shlex.quote(script)} dance").returncode == 2
    assert not (tmp_path / "x").exists()


def remote_text(asked, engine):
    """What the shell of a host runs last: `--command=` of gcloud and xpk, `run` of SkyPilot."""
    if engine == "skypilot":
        return yaml.safe_load(clusters.ENGINES[engine].files(asked)[f"{asked.out}/sky.yaml"])["run"]
    argv = clusters.ENGINES[engine].actions(asked)["run"][-1]
    return next(word for word in argv if word.startswith("--command=")).removeprefix("--command=")


@pytest.mark.parametrize("engine", ["xpk", "skypilot"])
def test_every_word_reaches_our_command(tmp_path, recorded, engine):
    asked = engine_job(tmp_path, engine)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(tmp_path / "bin" / "python", tmp_path / ".venv" / "bin" / "python")
    assert bash(remote_text(asked, engine), cwd=tmp_path).returncode == 0
    assert recorded()[-1] == ["python", "-m", "launch", *COMMAND]
    links = [call for call in recorded() if call[0] == "ln"]
    assert links == ([["ln", "-sfn", asked.shared_dir, "runs"]] if engine == "xpk" else [])


@pytest.mark.parametrize(("codes", "attempts"), [([0], 1), ([42, 75, 0], 3), ([42, 1], 2), ([134, 137, 42, 42, 42], 4),
                                                 ([2], 1)])
def test_a_host_starts_the_command_again_on_some_codes(tmp_path, monkeypatch, codes, attempts):
    """The text that gcloud hands to every host, run by a real shell; the command fails with the given codes in turn."""
    home = tmp_path / "home"
    (home / "bd3lm_jax" / ".venv" / "bin").mkdir(parents=True)
    python = home / "bd3lm_jax" / ".venv" / "bin" / "python"
    python.write_text(f"""#!{shutil.which("python3")}
import json, sys
from pathlib import Path
path = Path({str(tmp_path)!r}, "calls")
calls = json.loads(path.read_text()) if path.exists() else []
path.write_text(json.dumps([*calls, sys.argv[1:]]))
sys.exit({codes}[len(calls)])
""")
    python.chmod(0o755)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sleep").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "sleep").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(home))
    assert bash(remote_text(job(tmp_path), "gcloud")).returncode == 0
    pid = int((home / "bd3lm.pid").read_text())
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and os.path.exists(f"/proc/{pid}") and not zombie(pid):
        time.sleep(0.02)
    calls = json.loads((tmp_path / "calls").read_text())
    assert len(calls) == attempts
    assert calls[0] == ["-m", "launch", *COMMAND]


def zombie(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "Z"


def test_versions_are_pinned_wherever_something_is_installed(tmp_path):
    for engine in clusters.ENGINES:
        asked = engine_job(tmp_path, engine)
        module = clusters.ENGINES[engine]
        text = json.dumps([module.actions(asked), module.files(asked)])
        extra = "cuda" if engine == "slurm" else "tpu"
        assert "-c constraints.txt -e '.[" + extra in text, engine
        assert text.count("pip install") - text.count("--user uv") == text.count("-c constraints.txt")


# ---- gcloud


def test_gcloud_asks_for_a_queued_resource(tmp_path):
    create = clusters.gcloud.actions(job(tmp_path, project="p"))["create"]
    request = next(argv for argv in create if "queued-resources" in argv)
    assert request[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "owt"]
    assert set(request[6:]) == {"--node-id=owt", "--project=p", "--zone=us-central1-a", "--spot",
                                "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"}


def test_gcloud_with_several_slices(tmp_path):
    actions = clusters.gcloud.actions(job(tmp_path, slices=3))
    request = next(argv for argv in actions["create"] if "queued-resources" in argv)
    assert "--node-count=3" in request and "--node-prefix=owt" in request
    assert [argv[5] for argv in actions["run"]] == ["owt-0", "owt-1", "owt-2"]
    assert all("--worker=all" in argv for argv in actions["run"])
    assert "delete" in actions["resume"][0] and actions["resume"][-3:] == actions["run"]


@pytest.mark.parametrize(("states", "code"), [(["ACTIVE"], 0), (["CREATING", "PROVISIONING", "ACTIVE"], 0),
                                              (["CREATING", "FAILED"], 1), (["SUSPENDED"], 1), ([], 1)])
def test_gcloud_waits_for_its_machines(tmp_path, states, code):
    wait = next(argv for argv in clusters.gcloud.actions(job(tmp_path))["create"] if argv[0] == "bash")
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for i, state in enumerate(states):
        (tmp_path / f"state{i}").write_text(state)
    (bin_ / "gcloud").write_text(f'#!/bin/sh\nn=$(cat "{tmp_path}/n" 2>/dev/null || echo 0)\n'
                                 f'echo $((n + 1)) > "{tmp_path}/n"\ncat "{tmp_path}/state$n"\n')
    (bin_ / "sleep").write_text("#!/bin/sh\n")
    for file in bin_.iterdir():
        file.chmod(0o755)
    found = subprocess.run(wait, env=os.environ | {"PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}"}, timeout=30,
                           capture_output=True)
    assert found.returncode == code


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")
def test_gcloud_knows_its_commands(tmp_path):
    """gcloud's own linter, offline, with an empty configuration."""
    asked = [job(tmp_path, project="p", slices=n, out="out", shared_dir="/s", command=("train",)) for n in (1, 2)]
    commands = {shlex.join(argv): argv for one in asked for argvs in clusters.gcloud.actions(one).values()
                for argv in argvs if argv[0] == "gcloud"}
    for text in [*commands, "gcloud compute tpus queued-resources create x --nonsense=1"]:
        found = subprocess.run(["gcloud", "meta", "lint-gcloud-commands", f"--command-string={text}"], text=True,
                               capture_output=True, env=os.environ | {"CLOUDSDK_CONFIG": str(tmp_path)}, timeout=120)
        (verdict,) = json.loads(found.stdout)
        assert verdict["success"] == ("nonsense" not in text), verdict.get("error_message")


# ---- xpk


def test_xpk_starts_a_workload_again(tmp_path):
    (argv,) = [argv for argv in clusters.xpk.actions(job(tmp_path))["run"] if argv[:3] == ["xpk", "workload", "create"]]
    flags = dict(word.split("=", 1) for word in argv[3:])
    assert (flags["--max-restarts"], flags["--restart-on-exit-codes"]) == ("3", "75")  # 42 and 127-255: by itself
    assert (flags["--tpu-type"], flags["--num-slices"], flags["--cluster"]) == ("v5litepod-16", "1", "owt")
    assert flags["--script-dir"].startswith(job(tmp_path).out)


def test_xpk_leaves_a_cluster_alone_that_was_there(tmp_path):
    own, given = (clusters.xpk.actions(job(tmp_path, cluster=name)) for name in ("", "theirs"))
    assert [argv[1] for argv in own["create"]] == ["cluster"] and [argv[1] for argv in own["delete"]] == \
        ["workload", "cluster"]
    assert given["create"] == [] and [argv[1] for argv in given["delete"]] == ["workload"]
    assert all("--cluster=theirs" in argv for argv in given["delete"])


# ---- SkyPilot


def sky_yaml(asked):
    return yaml.safe_load(clusters.skypilot.files(asked)[f"{asked.out}/sky.yaml"])


SKY = {"name": str, "workdir": str, "num_nodes": int, "resources": dict, "file_mounts": dict, "setup": str, "run": str}
SKY_RESOURCES = {"accelerators": str, "accelerator_args": dict, "use_spot": bool, "infra": str, "job_recovery": dict}


@pytest.mark.parametrize(("accelerator", "nodes", "asks"), [
    ("v5litepod-16", 1, "tpu-v5litepod-16"), ("v6e-8", 1, "tpu-v6e-8"), ("H100:16", 2, "H100:8"),
    ("H200:4", 1, "H200:4")])
@pytest.mark.parametrize("shared", ["/mnt/it's: $HOME #", "gs://bucket/ru'ns: #"])
def test_skypilot_yaml(tmp_path, accelerator, nodes, asks, shared):
    """Keys and types as in docs.skypilot.co/en/latest/reference/yaml-spec.html."""
    found = sky_yaml(job(tmp_path, accelerator, project="", shared_dir=shared))
    assert all(type(value) is SKY[key] for key, value in found.items())
    resources = found["resources"]
    assert all(type(value) is SKY_RESOURCES[key] for key, value in resources.items())
    assert (found["num_nodes"], resources["accelerators"]) == (nodes, asks)
    assert resources["infra"] == "gcp/us-central1/us-central1-a" and resources["use_spot"] is True
    assert resources["job_recovery"] == {"recover_on_exit_codes": [42, 75, 134, 137, 143]}
    assert ("accelerator_args" in resources) == accelerator.startswith("v")
    if shared.startswith("gs:"):
        (target, mount), = found["file_mounts"].items()
        assert mount == {"source": shared, "mode": "MOUNT"}
    else:
        target = shared
    assert ["ln", "-sfn", target, "runs"] in [shlex.split(line) for line in found["setup"].splitlines()]


def test_skypilot_tells_gpus_of_several_hosts_where_they_are(tmp_path, recorded):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(tmp_path / "bin" / "python", tmp_path / ".venv" / "bin" / "python")
    run = sky_yaml(job(tmp_path, "H100:16", project="", command=("train",)))["run"]
    environment = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    assert bash(run, cwd=tmp_path, env=os.environ | environment).returncode == 0
    assert recorded()[-1] == ["python", "-m", "launch", "train", "--coordinator=10.0.0.1:8476", "--num_processes=2",
                              "--process_id=1"]


# ---- doing it, and what cannot be done


def test_execute_does_one_action_and_stops_at_a_failure(tmp_path, recorded):
    asked = engine_job(tmp_path, "skypilot")
    result = clusters.launch("skypilot", asked, "delete", execute=True)
    assert recorded() == [["sky", "jobs", "cancel", "--yes", "--name=owt"]]
    assert list(result["actions"]) == ["delete"]
    (tmp_path / "bin" / "sky").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(RunError, match="logs: exit code 3 of sky jobs logs"):
        clusters.launch("skypilot", asked, "logs", execute=True)
    (tmp_path / "bin" / "xpk").unlink()
    with pytest.raises(RunError, match="'xpk' is not installed"):
        clusters.launch("xpk", engine_job(tmp_path, "xpk"), "delete", execute=True)


WRONG = [
    ("gcloud", {"project": ""}, "--project is missing: engine 'gcloud'"), ("xpk", {"zone": ""}, "--zone is missing"),
    ("gcloud", {"shared_dir": ""}, "--shared_dir is missing"), ("xpk", {"shared_dir": ""}, "--shared_dir is missing"),
    ("gcloud", {"shared_dir": "gs://b"}, "mounts no bucket"),
    ("gcloud", {"accelerator": "H100:8"}, "queued resources of TPUs"),
    ("slurm", {"accelerator": "v6e-8"}, "is for GPUs"), ("slurm", {"spot": True}, "--spot means nothing"),
    ("slurm", {"project": "p"}, "--project means nothing to engine 'slurm'"), ("skypilot", {"slices": 2}, "one slice"),
    ("gcloud", {"cluster": "c"}, "--cluster means nothing"), ("gcloud", {"name": "x'; rm -rf /"}, "lower-case letters"),
    ("gcloud", {"name": "X"}, "lower-case letters"), ("gcloud", {"name": ""}, "lower-case letters"),
    ("gcloud", {"zone": "here; there"}, "expected a zone"),
    ("gcloud", {"command": ("train", "a\nb")}, "cannot be printed"),
    ("skypilot", {"shared_dir": "a\u2028b"}, "cannot be printed"), ("glcoud", {}, "did you mean 'gcloud'"),
]


@pytest.mark.parametrize(("engine", "changes", "said"), WRONG)
def test_what_cannot_be_done(tmp_path, engine, changes, said):
    asked = engine_job(tmp_path, engine, **changes) if engine in clusters.ENGINES else job(tmp_path)
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        clusters.launch(engine, asked, "all", execute=False)
    assert not os.path.exists(asked.out)


def test_actions_that_do_not_exist_or_are_too_many(tmp_path):
    with pytest.raises(UserError, match="did you mean 'resume'"):
        clusters.launch("gcloud", job(tmp_path), "resum", execute=False)
    with pytest.raises(UserError, match="--run does one action"):
        clusters.launch("gcloud", job(tmp_path), "all", execute=True)


def test_a_machine_that_stays_needs_no_shared_directory(tmp_path):
    asked = dataclasses.replace(job(tmp_path, "v5litepod-8", shared_dir="", spot=False))
    assert "ln -sfn" not in json.dumps(clusters.gcloud.actions(asked))
    assert clusters.launch("gcloud", asked, "all", execute=False)["hosts"] == 1


@pytest.mark.parametrize(("before", "code", "linked"), [
    ("nothing", 0, True), ("a link", 0, True), ("an empty directory", 0, True), ("a directory with a run", 1, False)])
def test_runs_lie_in_the_shared_directory_or_it_is_said(tmp_path, before, code, linked):
    """By a real ln: of a directory that is there the link would land inside, and nothing would be shared."""
    shared, runs = tmp_path / "it's shared", tmp_path / "here" / "runs"
    runs.parent.mkdir()
    if before == "a link":
        runs.symlink_to(tmp_path)
    elif "directory" in before:
        runs.mkdir()
        if before.endswith("run"):
            (runs / "mine").mkdir()
    done = subprocess.run(["bash", "-c", " && ".join([*link_runs(str(shared)), "touch runs/new"])], cwd=runs.parent,
                          capture_output=True, text=True)
    assert (done.returncode, (shared / "new").exists()) == (code, linked), done.stderr
    assert ("error: runs/ is a directory here, not a link" in done.stderr) != linked

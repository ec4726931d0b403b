"""Several processes: the same losses as one, one writer, one stop, and what is said when they cannot work together."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import pytest
from places import HELPERS, ROOT
from toy_fed import fed
from toy_runs import environment, free_port, write_text

from bd3lm_jax.core.errors import Preempted, RunError, UserError, WatchdogTimeout
from bd3lm_jax.parallel import distributed

CONFIG = """
from pathlib import Path
from ml_collections import ConfigDict
from toy_runs import toy_dict

def get_config():
    return ConfigDict(toy_dict(Path({directory!r}), {{"mesh.data": 2, "mesh.fsdp": 2, "checkpoint.every": 50}}))
"""
SECONDS = 600


@pytest.fixture
def runs(tmp_path):
    """A function that starts a command (train) in `count` processes of `devices` simulated devices each."""
    write_text(tmp_path / "text.txt", 60)
    (tmp_path / "toy.py").write_text(CONFIG.format(directory=str(tmp_path)))
    started = []

    def start(workdir, count, devices, *flags, ranks=None, command=()):
        command = command or ("train", f"--config={tmp_path / 'toy.py'}")
        joined = ("--distributed", f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}",
                  "--heartbeat_timeout=60")
        for i in ranks or range(count):
            words = [sys.executable, HELPERS / "toy_fed.py", tmp_path / f"{workdir}.{i}.fed", *command,
                     f"--workdir={tmp_path / workdir}", *flags, *((*joined, f"--process_id={i}") if count > 1 else ())]
            out, err = (open(tmp_path / f"{workdir}.{i}.{kind}", "w") for kind in ("out", "err"))
            started.append(subprocess.Popen(words, cwd=ROOT, stdout=out, stderr=err, env=environment(devices)))
        return started[-len(ranks or range(count)):]

    yield start
    for process in started:
        process.kill()
        process.wait()


def said(tmp_path, workdir, i, kind):
    return (tmp_path / f"{workdir}.{i}.{kind}").read_text()


def logged(tmp_path, workdir):
    path = tmp_path / workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.ci_slow
def test_two_processes_train_as_one(tmp_path, runs):
    """2 x 4 devices and a single one: five steps on the same rows, the same bound; one process writes and speaks."""
    for workdir, count, devices, fsdp in (("two", 2, 4, 4), ("one", 1, 1, 1)):
        processes = runs(workdir, count, devices, "--config.train.steps=5", f"--mesh=data={count},fsdp={fsdp}")
        assert [process.wait(SECONDS) for process in processes] == [0] * count, said(tmp_path, workdir, 0, "err")
    rows = fed(tmp_path / "one.0.fed")
    assert fed(tmp_path / "two.0.fed", tmp_path / "two.1.fed") == rows and sorted(rows) == list(range(5))
    assert fed(tmp_path / "two.0.fed") != rows  # each process holds its own
    two, one = (logged(tmp_path, workdir) for workdir in ("two", "one"))
    assert [line["step"] for line in two] == [1, 2, 3, 4, 5] == [line["step"] for line in one]
    for ours, theirs in zip(two, one):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-5)
        assert ours["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=1e-5)
    assert two[-1]["valid/nll"] == pytest.approx(one[-1]["valid/nll"], abs=1e-5)
    assert json.loads(said(tmp_path, "two", 0, "out").splitlines()[-1])["step"] == 5
    assert "{" not in said(tmp_path, "two", 1, "out") and "step 5/5" not in said(tmp_path, "two", 1, "err")
    measure = runs("two", 2, 2, "--split=valid", command=("eval",))
    assert [process.wait(SECONDS) for process in measure] == [0, 0], said(tmp_path, "two", 0, "err")
    found = json.loads(said(tmp_path, "two", 0, "out").splitlines()[-1])
    assert found["nll"] == pytest.approx(two[-1]["valid/nll"], abs=1e-5) and "{" not in said(tmp_path, "two", 1, "out")


@pytest.mark.ci_slow
def test_sigterm_to_one_process_stops_both_after_the_same_step(tmp_path, runs):
    processes = runs("run", 2, 2, "--config.train.steps=100000", "--config.eval.every=100000")
    wait_for_steps(tmp_path, "run", 4, processes)
    processes[1].send_signal(signal.SIGTERM)
    assert [process.wait(SECONDS) for process in processes] == [42, 42], said(tmp_path, "run", 1, "err")
    steps = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdecimal()]
    assert max(steps) == logged(tmp_path, "run")[-1]["step"]
    for i in range(2):
        assert f"stopped by SIGTERM after step {max(steps)}" in said(tmp_path, "run", i, "err").splitlines()[-1]
    (process,) = runs("run", 1, 4, f"--config.train.steps={max(steps) + 1}")
    assert process.wait(SECONDS) == 0
    assert f"continuing from step {max(steps)}" in said(tmp_path, "run", 0, "err")
    assert [line["step"] for line in logged(tmp_path, "run")] == list(range(1, max(steps) + 2))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_takes_the_other_along(tmp_path, runs, victim):
    processes = runs("run", 2, 2, "--config.train.steps=100000", "--config.eval.every=100000")
    wait_for_steps(tmp_path, "run", 4, processes)
    processes[victim].kill()
    code = processes[1 - victim].wait(SECONDS)
    assert code in (75, 134, -signal.SIGABRT), said(tmp_path, "run", 1 - victim, "err")


def wait_for_steps(tmp_path, workdir, steps, processes):
    deadline = time.monotonic() + SECONDS
    while len(logged(tmp_path, workdir)) < steps:
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes), \
            said(tmp_path, workdir, 0, "err")
        time.sleep(0.1)


@pytest.mark.ci_slow
def test_different_configurations_are_found_before_anything_is_done(tmp_path, runs):
    """Both processes leave with 2 and name the keys, also those that may differ between two runs of a directory."""
    joined = ("--distributed", f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2")
    flags = ((*joined, "--process_id=0"), (*joined, "--process_id=1", "--config.optim.lr=0.5", "--config.log.every=7"))
    processes = [runs(f"run{i}", 1, 2, *words)[0] for i, words in enumerate(flags)]
    assert [process.wait(SECONDS) for process in processes] == [2, 2]
    for i in range(2):
        last = said(tmp_path, f"run{i}", 0, "err").splitlines()[-1]
        assert "process 1 has another configuration than process 0 (optim.lr: 0.01 != 0.5; log.every: 1 != 7)" in last
        assert not (tmp_path / f"run{i}").exists()


OLDER = "--xla_cpu_max_isa=SSE4_2"  # code as for an older processor, which rounds differently


@pytest.mark.ci_slow
@pytest.mark.parametrize(("devices", "flags", "unlike", "code", "message"), [
    (2, "", False, 2, "process 1 has 2 x cpu, process 0 has 1 x cpu: start all processes on equally many devices"),
    (1, OLDER, False, 2, f"process 1 has another environment than process 0 (XLA_FLAGS: '' != '{OLDER}'): results"),
    (1, OLDER, True, 1, "replicas differ from those of device 0 of process 0 (params/")])
def test_processes_that_cannot_compute_the_same(tmp_path, runs, monkeypatch, devices, flags, unlike, code, message):
    """Both leave with the same words before anything is saved, also where only the values show it."""
    joined = ("--distributed", f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2", "--mesh=data=-1")
    if unlike:
        monkeypatch.setenv("TOY_UNLIKE", "1")
    monkeypatch.setenv("XLA_FLAGS", "")
    processes = runs("run", 1, 1, *joined, "--process_id=0", ranks=[0])
    monkeypatch.setenv("XLA_FLAGS", flags)
    processes += runs("run", 1, devices, *joined, "--process_id=1", ranks=[1])
    assert [process.wait(SECONDS) for process in processes] == [code, code], said(tmp_path, "run", 0, "err")
    for i in range(2):
        assert message in said(tmp_path, "run", i, "err").splitlines()[-1]
    assert not [path for path in tmp_path.glob("run/checkpoints/*") if path.name.isdecimal()]


@pytest.mark.ci_slow
def test_a_work_directory_that_is_not_shared_is_found_before_anything_is_done(tmp_path, runs):
    port = 20000 + (os.getpid() * 7 + 9998) % 20000
    joined = ("--distributed", f"--coordinator=127.0.0.1:{port}", "--num_processes=2")
    processes = [runs(f"run{i}", 1, 2, *joined, f"--process_id={i}")[0] for i in range(2)]
    assert [process.wait(SECONDS) for process in processes] == [2, 2], said(tmp_path, "run0", 0, "err")
    for i in range(2):
        last = said(tmp_path, f"run{i}", 0, "err").splitlines()[-1]
        host = os.uname().nodename
        assert f"does not find in {tmp_path}/run1 what process 0 on {host} has in {tmp_path}/run0" in last
        assert "config.json: None != '" in last and "is it a shared file system?" in last
    assert not (tmp_path / "run1").exists() and not (tmp_path / "run0" / "checkpoints").exists()


@pytest.mark.ci_slow
def test_what_one_process_cannot_read_none_of_them_uses(tmp_path, runs, monkeypatch):
    """Step 6 of a run that is done, unreadable for process 1 alone: both go on from step 4, to the same losses."""
    found = []
    for attempt in range(2):
        port = 20000 + (os.getpid() * 7 + 9990 + attempt) % 20000
        processes = []
        for i in range(2):
            if attempt and i:
                monkeypatch.setenv("TOY_UNREADABLE", "6")
            processes += runs("run", 1, 1, "--mesh=data=1,fsdp=2", "--config.checkpoint.every=2", "--stuck_after=200",
                              "--distributed", f"--coordinator=127.0.0.1:{port}", "--processes=2", f"--process_id={i}",
                              ranks=[i])
        assert [process.wait(SECONDS) for process in processes] == [0, 0], said(tmp_path, "run", 0, "err")
        found.append({line["step"]: line["train/loss"] for line in logged(tmp_path, "run") if "train/loss" in line})
    text = said(tmp_path, "run", 0, "err")
    assert "checkpoints/6 is damaged (process 1 cannot read it: OSError: input/output error)" in text
    assert "continuing from step 4" in text
    assert [path.name for path in (tmp_path / "run" / "checkpoints" / ".damaged").iterdir()] == ["6"]
    assert (tmp_path / "run" / "checkpoints" / "6").is_dir()
    assert found[0] == found[1] and sorted(found[0]) == list(range(1, 7))


@pytest.mark.parametrize(("rank", "missing"), [(1, "the coordinator"), (0, "the other process")])
def test_processes_that_do_not_find_each_other_say_for_how_long_they_tried(tmp_path, runs, rank, missing):
    (process,) = runs("run", 2, 1, "--init_timeout=1.5", ranks=[rank])
    assert process.wait(SECONDS) == 75, missing
    last = said(tmp_path, "run", rank, "err").splitlines()[-1]
    assert last.startswith("error: not all processes have joined at 127.0.0.1:") and "within 1.5 s" in last
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (("host", 2, 0), "expected HOST:PORT"), ((":80", 2, 0), "expected HOST:PORT"), (("host:x", 2, 0), "HOST:PORT"),
    (("host:0", 2, 0), "port 0 does not exist, expected 1 to 65535"), (("host:65536", 2, 0), "port 65536 does not"),
    (("host:99999999", 2, 0), "port 99999999 does not exist"), (("host:" + "9" * 5000, 2, 0), "does not exist"),
    (("host:80", 2, 2), "--process_id=2: expected 0 to 1 of 2 processes")])
def test_addresses_that_cannot_be(arguments, message):
    with pytest.raises(UserError, match=message):
        distributed.join(*arguments, within=1, heartbeat=10)


@pytest.mark.parametrize(("said", "kind"), [("UNAVAILABLE: failed to connect to all addresses", WatchdogTimeout),
                                            ("INVALID_ARGUMENT: unexpected task", RunError)])
def test_a_process_that_is_gone_while_joining_is_a_reason_to_run_again(monkeypatch, said, kind):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: fail(RuntimeError(said)))
    with pytest.raises(UserError, match=f"cannot join the other processes: {said}") as caught:
        distributed.join("host:80", 2, 1, within=100, heartbeat=10)
    assert type(caught.value) is kind


# As they are set for process 5 of 8, the second of four on the second host.
SLURM = {"SLURM_JOB_ID": "5000", "SLURM_STEP_NODELIST": "node[07-08],spare3", "SLURM_NTASKS": "8", "SLURM_PROCID": "5",
         "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "2"}
OPENMPI = {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp://10.96.0.1,10.148.0.1:34911", "OMPI_COMM_WORLD_SIZE": "8",
           "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.fixture
def cluster(monkeypatch):
    """Join in an environment: what jax has found out where it would begin to wait for the others."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMIX_", "JAX_COORDINATOR"))]:
        monkeypatch.delenv(name)

    def join(environment, *told):
        from jax._src.clusters import ClusterEnv

        found = {}

        def initialize(coordinator_address=None, num_processes=None, process_id=None, **limits):
            names = ("coordinator", "processes", "process", "devices")
            found.update(zip(names, ClusterEnv.auto_detect_unset_distributed_params(
                coordinator_address, num_processes, process_id, None, None, 1)), **limits)
            if found["coordinator"] is None:
                raise ValueError("coordinator_address should be defined.")

        monkeypatch.setattr(jax.distributed, "initialize", initialize)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        distributed.join(*(told or ("", None, None)), within=10, heartbeat=30)
        return found

    return join


@pytest.mark.parametrize(("environment_there", "coordinator"), [
    (SLURM, f"node07:{65536 - 4096 + 5000 - 4096}"), (OPENMPI, f"10.96.0.1:{65536 - 4096 + 320928 % 4096}")])
def test_clusters_are_found(cluster, environment_there, coordinator):
    """Ports by the job's number among the last 4096; a process has the device of its number on its host."""
    found = cluster(environment_there)
    assert (found["coordinator"], found["processes"], found["process"], found["devices"]) == (coordinator, 8, 5, [1])
    assert found["heartbeat_timeout_seconds"] == 30 and found["initialization_timeout"] > 10


def test_what_is_told_goes_before_what_is_found(cluster):
    found = cluster(SLURM, "here:1234", 2, 1)
    assert (found["coordinator"], found["processes"], found["process"]) == ("here:1234", 2, 1)


@pytest.mark.parametrize("left", [(), ("SLURM_JOB_ID", "SLURM_NTASKS")])
def test_where_no_cluster_is_found_that_is_said(cluster, left):
    """Nor is a Slurm allocation without srun one."""
    with pytest.raises(UserError, match="--distributed found no cluster .*: give --coordinator=HOST:PORT --num_p"):
        cluster({name: SLURM[name] for name in left})


# ---- a single process


def test_a_single_process_agrees_with_itself():
    assert distributed.allgather_texts("é") == ["é"]
    distributed.assert_equal_across_processes({"a": 1}, "configuration")
    assert distributed.run_on_process0(lambda: 3) == 3 == distributed.process0_first(lambda: 3)
    for kind in (UserError, RunError):
        with pytest.raises(kind, match="no") as caught:
            distributed.run_on_process0(lambda: fail(kind("no")))
        assert not caught.value.on_all_processes


def fail(error):
    raise error


def test_two_processes_compare_by_key(monkeypatch):
    other = json.dumps({"a": 1, "b": [1, 2], "c": "x"})
    monkeypatch.setattr(distributed, "allgather_texts", lambda text: [text, other])
    distributed.assert_equal_across_processes({"a": 1, "b": [1, 2], "c": "x"}, "text")
    with pytest.raises(UserError, match=r"another text than .* \(b: \[1\] != \[1, 2\]; d: 2 != None\)") as caught:
        distributed.assert_equal_across_processes({"a": 1, "b": [1], "c": "x", "d": 2}, "text")
    assert caught.value.on_all_processes


def test_a_directory_that_another_process_does_not_see(monkeypatch, tmp_path):
    """Process 1 sees nothing there; then the same, but late."""
    here, nothing = {"config.json": "af", "newest checkpoint": 3}, {"config.json": None, "newest checkpoint": 3}
    distributed.assert_shared_directory(tmp_path, lambda: fail(AssertionError("a single process looks")))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "SHARED_VISIBLE_S", 1.0)
    monkeypatch.setattr(distributed, "allgather_texts", lambda text: [text, json.dumps(["far", "/there", nothing])])
    message = r"process 1 on far does not find in /there what process 0 on .* \(config.json: None != 'af'\): is it"
    with pytest.raises(UserError, match=message) as caught:
        distributed.assert_shared_directory(tmp_path, lambda: here)
    assert caught.value.on_all_processes
    seen = iter([nothing, nothing])
    monkeypatch.setattr(distributed, "allgather_texts", lambda text: [
        json.dumps(here if text.startswith("{") else ["near", "/here", here]), text])
    distributed.assert_shared_directory(tmp_path, lambda: next(seen, here))


def test_the_first_process_tells_the_others_what_is_wrong(monkeypatch):
    """Process 1 of two hears of an error of process 0, with its kind, and does not do the work."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    for told, kind in ((json.dumps([True, "disk full"]), RunError), (json.dumps([False, "disk full"]), UserError)):
        monkeypatch.setattr(distributed, "allgather_texts", lambda text, told=told: [told, text])
        with pytest.raises(UserError, match="disk full") as caught:
            distributed.run_on_process0(lambda: fail(AssertionError("the work of process 0")))
        assert type(caught.value) is kind and caught.value.on_all_processes
    monkeypatch.setattr(distributed, "allgather_texts", lambda text: ["", text])
    assert distributed.run_on_process0(lambda: fail(AssertionError("the work of process 0"))) is None
    assert distributed.process0_first(lambda: 5) == 5


def test_a_lost_peer_is_told_from_an_error_of_ours(monkeypatch):
    gone = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:53388")
    assert not distributed.is_lost_peer(gone)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert distributed.is_lost_peer(gone)
    assert not distributed.is_lost_peer(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))
    assert not distributed.is_lost_peer(ValueError("Connection closed by peer"))
    assert distributed.is_lost_peer(
        ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:1"))
    around = ValueError("a save failed")
    around.__cause__ = gone
    assert distributed.is_lost_peer(around)


def test_sigterm_stops_a_single_process_and_the_old_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="nothing left to save"):
        with distributed.stop_on_sigterm() as stop:
            with stop.defer_to_steps():
                assert not stop.should_stop(1)
                for _ in range(2):
                    os.kill(os.getpid(), signal.SIGTERM)
                    assert stop.should_stop(2)
            raise AssertionError("the run goes on after its steps")
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_where_nothing_is_to_be_saved_passes_every_error_handler():
    before, went_on = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(Preempted) as caught:
        with distributed.stop_on_sigterm():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                went_on.append(True)
            except Exception:
                went_on.append(True)
    assert not went_on and caught.value.exit_code == 42
    assert signal.getsignal(signal.SIGTERM) is before


def test_work_that_can_be_left_out_ends_with_sigterm_and_other_work_does_not():
    def work():
        stop.alive()
        if tells:
            os.kill(os.getpid(), signal.SIGTERM)
        stop.alive()
        return "done"

    with pytest.raises(Preempted):
        with distributed.stop_on_sigterm() as stop, stop.defer_to_steps():
            for tells, expected in ((False, "done"), (True, "left out"), (False, "left out")):
                assert stop.run_unless_stopped(work, "left out") == expected
            tells = False
            assert work() == "done"

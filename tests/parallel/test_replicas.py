"""Replicas that differ are found before anything is saved, and processes that would differ before anything is done."""

import json
import types

import jax
import jax.numpy as jnp
import pytest
from toy_runs import run_python

from bd3lm_jax.checkpoints.checkpoint import Checkpoints
from bd3lm_jax.core.errors import RunError, UserError
from bd3lm_jax.core.state import TrainState
from bd3lm_jax.parallel import distributed, replicas

STATE = TrainState(jnp.int32(1), {"w": jnp.arange(6.0)}, {}, {"m": jnp.ones(3)})


@pytest.mark.ci_slow
def test_replicas_on_the_devices_of_one_process(tmp_path):
    """The second of three devices holds another value, as a broken accelerator leaves it; parts of an array may differ.
    """
    done = run_python("""
        import sys
        from pathlib import Path
        import jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from bd3lm_jax.parallel import replicas
        from bd3lm_jax.checkpoints.checkpoint import Checkpoints
        from bd3lm_jax.core.errors import RunError
        from bd3lm_jax.core.state import TrainState

        mesh = jax.make_mesh((3,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        one, other = np.float32([1, 2, 3]), np.float32([1, 2, 3.0000002])

        def array(*values, spec=P(), shape=(3,)):
            shards = [jax.device_put(x, device) for x, device in zip(values, jax.devices())]
            return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, spec), shards)

        def state(second):
            return TrainState(array(one, one, one), {"w": array(one, other, one, spec=P("data"), shape=(9,))}, {},
                              {"m": array(one, second, one)})

        with Checkpoints(sys.argv[1], 2) as checkpoints:
            checkpoints.save(3, state(one), {})
            try:
                checkpoints.save(4, state(other), {})
            except RunError as error:
                print(error)
        print(sorted(path.name for path in Path(sys.argv[1], "checkpoints").iterdir() if path.name.isdecimal()))
    """, tmp_path, devices=3)
    assert done.returncode == 0, done.stderr
    message, steps = done.stdout.splitlines()
    assert "(opt/state/m: device 1 of process 0): nothing is saved at step 4" in message and steps == "['3']"


def test_processes_whose_arrays_differ_are_named_and_nothing_is_saved(tmp_path, monkeypatch):
    """Process 1 of two has another moment of the optimiser."""
    original, asked = distributed.allgather_texts, []

    def texts(text):
        asked.append(text)
        if text.startswith("{"):
            other = json.loads(text)
            other["opt/state/m"] = [other["opt/state/m"][0] ^ 1]
            return [text, json.dumps(other)]
        return [text, "another True"] if text.endswith(" True") else original(text)

    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(3, STATE, {}, wait=True)
        monkeypatch.setattr(distributed, "allgather_texts", texts)
        message = r"replicas differ .*\(opt/state/m: process 1\): nothing is saved at step 4\..*the last checkpoint"
        with pytest.raises(RunError, match=message) as caught:
            checkpoints.save(4, STATE, {})
        assert caught.value.on_all_processes and len(asked) == 2
        monkeypatch.setattr(distributed, "allgather_texts", original)
        assert checkpoints.steps() == [3]


@pytest.mark.parametrize(("devices", "message"), [
    ([(0, "cpu"), (0, "cpu"), (1, "cpu")], "process 1 has 1 x cpu, process 0 has 2 x cpu"),
    ([(0, "A"), (1, "A"), (2, "B")], "process 2 has 1 x B, process 0 has 1 x A")])
def test_unequal_devices_are_named(devices, message):
    found = [types.SimpleNamespace(process_index=i, device_kind=kind) for i, kind in devices]
    with pytest.raises(UserError, match=f"{message}: start all processes on equally many devices") as caught:
        replicas._check_devices(found)
    assert caught.value.on_all_processes and caught.value.exit_code == 2
    replicas._check_devices(found[:1] * 4)


def test_flags_that_change_nothing_may_differ(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_b=2 --xla_dump_to=/here --xla_a --xla_force_host_platform_device_count=4")
    first = replicas.numeric_environment()
    assert first["XLA_FLAGS"] == "--xla_a --xla_b=2" and first["jax"] == jax.__version__
    monkeypatch.setenv("XLA_FLAGS", "--xla_a --xla_b=2 --xla_dump_to=/there")
    assert replicas.numeric_environment() == first == json.loads(json.dumps(first))
    monkeypatch.setenv("XLA_FLAGS", "--xla_a --xla_b=3")
    assert replicas.numeric_environment() != first


def test_another_program_is_named(monkeypatch):
    lowered = [jax.jit(f).lower(jnp.ones(3)) for f in (lambda x: x + 1, lambda x: x + 2)]
    replicas.check_program(lambda: pytest.fail("a single process compares nothing"))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    sent = []
    monkeypatch.setattr(distributed, "allgather_texts", lambda text: sent.append(text) or [sent[0], text])
    replicas.check_program(lambda: lowered[0])
    with pytest.raises(UserError, match="process 1 has another training step than process 0 .hash: ") as caught:
        replicas.check_program(lambda: lowered[1])
    assert caught.value.on_all_processes

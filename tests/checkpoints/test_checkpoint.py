import itertools
import json
import shutil
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import pytest
from toy_checkpoints import abstract, assert_equal, make_state, restore, saved

from bd3lm_jax.checkpoints.checkpoint import Checkpoints
from bd3lm_jax.core.errors import RunError, UserError
from bd3lm_jax.parallel import distributed
from bd3lm_jax.parallel.fingerprint import fingerprints

# Reads that fail leave coroutines behind, which complain when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_round_trip_keeps_the_latest(tmp_path):
    saved(tmp_path, [1, 2, 3, 4], keep=2)
    state, meta, warnings = restore(tmp_path)
    assert_equal(state, make_state(4))
    assert meta == {"config": {"seed": 4}} and not warnings
    checkpoints = Checkpoints(tmp_path, 2, read_only=True)
    assert checkpoints.steps() == [3, 4] and checkpoints.latest_step() == 4


def test_deleted_steps_leave_no_files(tmp_path):
    directory = saved(tmp_path, [1, 2, 3], keep=1)
    names = {path.name for path in directory.rglob("*") if path.name.isdecimal()}
    assert names == {"3"} and not (directory / ".trash").exists()


def test_a_reader_bears_that_steps_go_away_while_it_looks(tmp_path):
    """Steps come and go all the time, each by one rename: orbax lists them first and then asks for their times."""
    directory, away, done = tmp_path / "checkpoints", tmp_path / "away", threading.Event()
    for step in range(8):
        (directory / str(step)).mkdir(parents=True)

    def come_and_go():
        for step in itertools.cycle(range(8)):
            (directory / str(step)).rename(away)
            done.wait(0.001)
            away.rename(directory / str(step))
            if done.wait(0.005):
                return

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(50):
            with Checkpoints(tmp_path, 1, read_only=True) as checkpoints:
                assert set(checkpoints.steps()) <= set(range(8))
    finally:
        done.set()
        thread.join()
    with Checkpoints(tmp_path, 1, read_only=True) as checkpoints:
        assert checkpoints.steps() == list(range(8))


def test_saved_arrays_may_be_donated_at_once(tmp_path):
    state = make_state(1)
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, state, {})
        jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0)(state)
    assert_equal(restore(tmp_path)[0], make_state(1))


def test_latest_step_counts_a_save_under_way(tmp_path):
    with Checkpoints(tmp_path, 1) as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.save(7, make_state(7), {})
        assert checkpoints.latest_step() == 7


def test_existing_and_earlier_steps_are_refused(tmp_path):
    saved(tmp_path, [2])
    with Checkpoints(tmp_path, 3) as checkpoints:
        with pytest.raises(RunError, match="step 2 is already saved"):
            checkpoints.save(2, make_state(2), {})
        with pytest.raises(RunError, match="step 1 was not saved.*later step, 2"):
            checkpoints.save(1, make_state(1), {})


@pytest.mark.parametrize("which, factor", [("ema", 2), ("params", 1)])
def test_weights_alone(tmp_path, which, factor):
    directory = saved(tmp_path, [5])
    for other in {"ema", "params", "opt"} - {which}:
        shutil.rmtree(directory / "5" / other)
    target = make_state(0).ema if which == "ema" else make_state(0).params
    tree, meta, step = Checkpoints(tmp_path, 1, read_only=True).restore_params(which, abstract(target))
    assert_equal(tree, make_state(5).ema if which == "ema" else make_state(5).params)
    assert step == 5 and meta == {"config": {"seed": 5}}


def test_without_average_ema_means_params(tmp_path):
    saved(tmp_path, [5], ema=False)
    with Checkpoints(tmp_path, 1, read_only=True) as checkpoints:
        tree, _, _ = checkpoints.restore_params("ema", abstract(make_state(0).params))
        assert_equal(tree, make_state(5).params)
        state, _ = checkpoints.restore(abstract(make_state(0, ema=False)))
    assert_equal(state, make_state(5, ema=False))


def test_unknown_weights(tmp_path):
    with pytest.raises(UserError, match="'best'.*'ema' or 'params'"):
        Checkpoints(tmp_path, 1, read_only=True).restore_params("best", {})


@pytest.mark.parametrize("read_only", [True, False])
def test_no_checkpoint(tmp_path, read_only):
    checkpoints = Checkpoints(tmp_path / "run", 1, read_only=read_only)
    with pytest.raises(UserError, match=f"no checkpoint in {tmp_path}/run/checkpoints: train first"):
        checkpoints.restore(abstract(make_state(0)))
    assert (tmp_path / "run").exists() != read_only


def test_other_shapes_are_named_before_anything_is_read(tmp_path):
    directory = saved(tmp_path, [1, 2])
    shutil.rmtree(directory / "2" / "params")
    for read_only in (True, False):
        with Checkpoints(tmp_path, 3, read_only) as checkpoints, pytest.raises(UserError) as error:
            checkpoints.restore(abstract(make_state(0, width=8)))
    message = str(error.value)
    assert error.value.exit_code == 2 and "checkpoints/2 is of another model" in message
    assert "params/head/bias is bfloat16[16] in the checkpoint, bfloat16[8] in this model" in message
    assert "\n" not in message and "; and 3 more" in message  # of 8: weights, average and two moments


def test_other_trees_are_named(tmp_path):
    saved(tmp_path, [1])
    with Checkpoints(tmp_path, 3) as checkpoints:
        with pytest.raises(UserError, match="ema/head/bias is float32.16. in the checkpoint, absent in this model"):
            checkpoints.restore(abstract(make_state(0, ema=False)))
        wanted = {**make_state(0).params, "extra": jnp.zeros(2)}
        with pytest.raises(UserError, match="params/extra is absent in the checkpoint, float32.2. in this model"):
            checkpoints.restore_params("params", abstract(wanted))


def run_python(code, *arguments):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.ci_slow
def test_restores_on_other_meshes_bit_for_bit(tmp_path):
    saved(tmp_path, [3])
    expected = jax.tree.leaves(fingerprints(make_state(3)))
    answer = json.loads(run_python("""
        import json, sys
        import jax, jax.numpy as jnp
        jax.config.update("jax_num_cpu_devices", 8)
        import optax
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from bd3lm_jax.checkpoints.checkpoint import Checkpoints
        from bd3lm_jax.parallel.fingerprint import fingerprints
        from bd3lm_jax.core.state import TrainState

        params = {"blocks": {"qkv": {"kernel": jax.ShapeDtypeStruct((2, 64, 16), jnp.float32)}},
                  "head": {"bias": jax.ShapeDtypeStruct((16,), jnp.bfloat16)}}
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
        ema = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params)
        state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, ema, jax.eval_shape(tx.init, params))
        sums = []
        for shape in ((8, 1), (2, 4)):
            mesh = jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
            specs = {0: P(), 1: P("fsdp"), 3: P(None, "fsdp", "data")}
            target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(mesh, specs[len(x.shape)])), state)
            with Checkpoints(sys.argv[1], 5) as checkpoints:
                restored, _ = checkpoints.restore(target)
                assert restored.params["blocks"]["qkv"]["kernel"].sharding == target.params["blocks"]["qkv"][
                    "kernel"].sharding
                sums.append(jax.tree.leaves(fingerprints(restored)))
                checkpoints.save(4 + len(sums), restored, {"mesh": shape})
        print(json.dumps(sums))
    """, tmp_path))
    assert answer == [expected, expected]
    state, meta, _ = restore(tmp_path)
    assert meta == {"mesh": [2, 4]}
    assert_equal(state, make_state(3))


@pytest.mark.ci_slow
@pytest.mark.parametrize("waits", [True, False])
def test_full_disk_names_the_last_complete_checkpoint(tmp_path, waits):
    saved(tmp_path, [3])
    message = run_python("""
        import resource, signal, sys
        import jax, numpy as np
        from bd3lm_jax.checkpoints.checkpoint import Checkpoints
        from bd3lm_jax.core.errors import RunError
        from bd3lm_jax.core.state import TrainState

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        big = jax.numpy.asarray(np.random.default_rng(0).standard_normal(2**18), "float32")
        state = TrainState(jax.numpy.int32(5), {"kernel": big}, {}, {"kernel": big})
        checkpoints = Checkpoints(sys.argv[1], keep=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, 2**17))
        try:
            checkpoints.save(5, state, {}, wait=sys.argv[2] == "True")
            checkpoints.save(6, state, {})
        except RunError as error:
            print(error)
    """, tmp_path, waits)
    assert message.startswith(f"could not save a checkpoint to {tmp_path}/checkpoints: ")
    assert "File too large" in message
    assert "the last complete checkpoint is step 3. Free some disk space" in message
    assert_equal(restore(tmp_path)[0], make_state(3))


def test_what_another_process_cannot_read_is_not_used_here_either(tmp_path, monkeypatch):
    """Step 2 is whole, but process 1 says otherwise: step 1; and what is said here is that step 1 can be read."""
    directory, said = saved(tmp_path, [1, 2]), []

    def texts(text):
        if text.startswith("["):
            return [text, text]  # the steps that are there
        said.append(text)
        return [text, "cannot read it: OSError: input/output error" if len(said) == 1 else ""]

    monkeypatch.setattr(distributed, "allgather_texts", texts)
    state, _, (warning,) = restore(tmp_path)
    assert_equal(state, make_state(1))
    assert "checkpoints/2 is damaged (process 1 cannot read it: OSError: input/output error)" in warning
    shutil.rmtree(directory / "1" / "params")
    with pytest.raises(RunError, match="none of the checkpoints"):
        restore(tmp_path)
    assert said[:3] == ["", "", ""] and len(said) == 4 and said[3].startswith("cannot read it: KeyError: ")


class Manager:
    """In place of orbax's: one step, and every call that reaches other processes fails with `error`."""

    def __init__(self, error):
        self.error = error

    def all_steps(self, read):
        return [1]

    def fail(self, *_, **__):
        raise ValueError("a barrier failed") from self.error

    save = restore = wait_until_finished = fail

    def close(self):
        pass


GONE = "UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:53388"
LATE = "DEADLINE_EXCEEDED: Barrier timed out. Id: async_write_complete"


@pytest.mark.parametrize("call", ["save", "wait", "restore", "restore of a step", "close"])
@pytest.mark.parametrize("message", [GONE, LATE])
def test_a_lost_process_is_no_fault_of_the_files(tmp_path, monkeypatch, call, message):
    """Of many processes the error stays what it is, which is told apart by `is_lost_peer`; of one it is one of
    files."""
    error = jax.errors.JaxRuntimeError(message)
    checkpoints = Checkpoints(tmp_path, 1)
    (checkpoints.directory / "1").mkdir()
    checkpoints._manager = Manager(error)
    call = {"save": lambda: checkpoints.save(2, make_state(2), {}), "wait": checkpoints.wait,
            "restore": lambda: checkpoints.restore(abstract(make_state(0))), "close": checkpoints.close,
            "restore of a step": lambda: checkpoints.restore(abstract(make_state(0)), 1)}[call]
    with pytest.raises(RunError, match="could not save|is damaged|can be read"):
        call()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "allgather_texts",
                        lambda text: [text] if text.startswith("[") else Manager(error).fail())
    with pytest.raises(ValueError) as caught:
        call()
    assert caught.value.__cause__ is error and distributed.is_lost_peer(caught.value)


def test_what_is_in_flight_is_told_and_not_that_closing_failed_as_well(tmp_path):
    for body, expected in ((KeyError, KeyError), (None, RunError)):
        with pytest.raises(expected):
            with Checkpoints(tmp_path, 1) as checkpoints:
                checkpoints._manager = Manager(OSError(28, "No space left on device"))
                if body is not None:
                    raise body

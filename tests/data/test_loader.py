import os
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from grids import some

from bd3lm_jax.data.loader import Loader, prefetch, row_ids
from bd3lm_jax.data.prepare import prepare
from bd3lm_jax.data.tokenizers import ByteTokenizer


@pytest.mark.parametrize("num_rows, batch", [(10, 4), (10, 10), (3, 8), (1, 2), (17, 5)])
def test_each_row_once_an_epoch(num_rows, batch):
    epochs = 6
    steps = -(-num_rows * epochs // batch)
    ids = np.concatenate([row_ids(num_rows, batch, seed=3, step=step) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(ids[epoch * num_rows:(epoch + 1) * num_rows].tolist()) == list(range(num_rows))


def test_order_is_a_function_of_seed_and_step():
    ids = [row_ids(100, 10, seed=5, step=step) for step in range(30)]
    shuffled_calls = {step: row_ids(100, 10, seed=5, step=step) for step in (29, 3, 17, 0)}
    for step, found in shuffled_calls.items():
        np.testing.assert_array_equal(found, ids[step])
    assert ids[0].dtype == np.int64 and ids[0].shape == (10,)
    epochs = [np.concatenate(ids[start:start + 10]).tolist() for start in (0, 10, 20)]
    other_seed = np.concatenate([row_ids(100, 10, seed=6, step=step) for step in range(10)]).tolist()
    assert len({tuple(order) for order in [*epochs, other_seed, range(100)]}) == 5


def test_order_never_changes():
    """A change here breaks exact resume of runs in progress."""
    assert row_ids(8, 8, seed=0, step=0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert row_ids(8, 8, seed=0, step=1).tolist() == [5, 3, 7, 2, 4, 1, 0, 6]


def test_first_rows_are_uniform():
    firsts = np.array([row_ids(5, 1, seed=seed, step=0)[0] for seed in range(2000)])
    observed = np.bincount(firsts, minlength=5)
    assert ((observed - 400) ** 2 / 400).sum() < 18.5  # chi-square with 4 degrees of freedom, p = 0.001


def test_host_batches(data_config):
    rows = prepare(data_config(packing="pack"), "test", 8, ByteTokenizer())
    ids, batch = Loader(rows, 6, 1, None).get(4)
    np.testing.assert_array_equal(ids, row_ids(len(rows), 6, 1, 4))
    np.testing.assert_array_equal(batch["tokens"], rows.tokens(ids))
    np.testing.assert_array_equal(batch["segments"], rows.segments(ids))
    np.testing.assert_array_equal(batch["positions"], rows.positions(ids))


PLACE = """
import os, sys, numpy as np, jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from bd3lm_jax.data.loader import Loader, row_ids
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
port, process, processes = map(int, sys.argv[1:])
if processes > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=processes, process_id=process)

class Rows:
    length, read = 4, []
    def __len__(self):
        return 100
    def tokens(self, ids):
        self.read.extend(ids.tolist())
        return 10 * ids[:, None].astype(np.int32) + np.arange(4, dtype=np.int32)
    segments = positions = lambda self, ids: self.tokens(ids) * 0

mesh = jax.make_mesh((2 * processes, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
rows = Rows()
ids, batch = Loader(rows, 8, 0, NamedSharding(mesh, P("data"))).get(0)
assert batch["tokens"].shape == (8, 4) and set(batch) == {"tokens", "segments", "positions"}
for shard in batch["tokens"].addressable_shards:
    assert (np.asarray(shard.data) == 10 * ids[shard.index[0]][:, None] + np.arange(4)).all()
if processes > 1:  # all leave together: the end of one would end the others
    jax.distributed.shutdown()
print(sorted(rows.read))
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize("processes", some([1, 2], 1))
def test_a_process_reads_only_its_rows_and_each_once(processes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    started = [subprocess.Popen([sys.executable, "-c", PLACE, str(port), str(process), str(processes)],
                                stdout=subprocess.PIPE, text=True, env=environment)
               for process in range(processes)]
    lines = [process.communicate(timeout=100)[0].splitlines()[-1] for process in started]
    read = [[int(i) for i in line.strip("[]").split(",")] for line in lines]
    # tokens, segments and positions each call Rows.tokens once a row
    once = sorted(i for part in read for i in set(part))
    assert once == sorted(row_ids(100, 8, 0, 0).tolist())
    assert all(len(part) == 3 * len(set(part)) == 3 * 8 // processes for part in read)


@pytest.mark.parametrize("workers, depth", [(1, 1), (2, 4), (3, 0)])
def test_prefetch_keeps_order_and_runs_ahead_no_further_than_depth(workers, depth):
    lock, started = threading.Lock(), []

    def get(step):
        with lock:
            started.append(step)
        time.sleep(0.001 * (step % 3))
        return step * step

    for step, value in zip(range(5, 20), prefetch(get, 5, 20, workers, depth), strict=True):
        assert value == step * step
        assert max(started) <= step + depth
    assert sorted(started) == list(range(5, 20))


def test_prefetch_works_while_the_consumer_waits():
    ahead = threading.Event()

    def get(step):
        if step == 1:
            ahead.set()
        return step

    values = prefetch(get, 0, 5, 1, 2)
    assert next(values) == 0
    assert ahead.wait(timeout=10)
    values.close()


def test_prefetch_raises_at_the_failing_step():
    def get(step):
        if step == 3:
            raise ValueError("row 3 is bad")
        return step

    seen = []
    with pytest.raises(ValueError, match="row 3 is bad"):
        for value in prefetch(get, 0, 10, 2, 2):
            seen.append(value)
    assert seen == [0, 1, 2]

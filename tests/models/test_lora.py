"""Low-rank updates: nothing at first, the stated product in the weights, and nothing else is trained or averaged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_runs import network, toy_config, write_text

from bd3lm_jax.checkpoints import rundir
from bd3lm_jax.checkpoints.checkpoint import Checkpoints
from bd3lm_jax.checkpoints.restore import restore
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.state import LORA
from bd3lm_jax.data.prepare import prepare
from bd3lm_jax.data.token_bytes import RowsWithBytes
from bd3lm_jax.likelihood import evaluate
from bd3lm_jax.models import lora
from bd3lm_jax.scoring import parameters
from bd3lm_jax.training.train import train

RANK, ALPHA = 2, 6.0


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    directory = tmp_path_factory.mktemp("lora")
    write_text(directory / "text.txt", 80)
    return directory


@pytest.fixture(scope="module")
def runs(home):
    """A run, and three updates of its frozen weights."""
    train(toy_config(home, {"train.steps": 2}), str(home / "base"))
    config = toy_config(home, CHANGES | {"train.init_from": str(home / "base")})
    result = train(config, str(home / "updated"))
    return home / "base", home / "updated", result


CHANGES = {"train.lora_rank": RANK, "train.lora_alpha": ALPHA, "train.steps": 3, "optim.ema_decay": 0.0,
           "optim.weight_decay": 0.1}


def paths(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x)
            for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def stored(workdir):
    """All parameters in a checkpoint, updates beside their matrices."""
    config, _ = rundir.read(workdir)
    model, _ = network(config)
    shapes = jax.eval_shape(lambda: parameters.init(model, config.diffusion, RANK, jax.random.key(0)))
    with Checkpoints(workdir, 1, read_only=True) as checkpoints:
        return checkpoints.restore_params("params", shapes)[0]


@pytest.mark.ci_slow
def test_fresh_updates_change_no_bit(home):
    model, params = network(toy_config(home))
    updates = lora.init(model, params, RANK, jax.random.key(0))
    assert set(paths(updates)) == {f"blocks/{name}/kernel/{part}" for part in "ab"
                                   for name in ("qkv", "out", "mlp_in", "mlp_out", "modulation")}
    merge_lora = lora.merge_lora(params | {LORA: updates}, ALPHA / RANK)
    assert LORA not in merge_lora
    jax.tree.map(np.testing.assert_array_equal, merge_lora, params)
    a = paths(updates)["blocks/mlp_out/kernel/a"]
    assert a.shape == (1, 128, RANK) and abs(a.std() * np.sqrt(128) - 1) < 0.2


def test_the_product_by_hand(home):
    """W x + alpha / r A (B x) for a vector x, float64."""
    model, params = network(toy_config(home))
    draw = np.random.default_rng(0)
    updates = jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), jnp.float32),
                           lora.init(model, params, RANK, jax.random.key(0)))
    merge_lora = lora.merge_lora(params | {LORA: updates}, ALPHA / RANK)["blocks"]
    for name, inputs in (("qkv", 32), ("out", 32), ("mlp_in", 32), ("mlp_out", 128)):
        a, b = (np.asarray(updates["blocks"][name]["kernel"][part][0], np.float64) for part in "ab")
        old, new = (np.asarray(tree[name]["kernel"][0], np.float64) for tree in (params["blocks"], merge_lora))
        x = draw.normal(size=inputs)
        expected = x @ old.reshape(inputs, -1) + ALPHA / RANK * (x @ a) @ b
        np.testing.assert_allclose(x @ new.reshape(inputs, -1), expected, rtol=1e-4, atol=1e-3)
    assert np.array_equal(merge_lora["norm1"]["scale"], params["blocks"]["norm1"]["scale"])


def test_updates_are_merged_in_the_order_of_their_names():
    """Whatever the hash seed of this process."""
    kernels = {f"kernel{i}": jnp.zeros((1, 2, i + 3)) for i in range(8)}
    updates = {name: {"a": jnp.zeros((1, 2, RANK)), "b": jnp.zeros((1, RANK, x.shape[2]))}
               for name, x in kernels.items()}
    program = jax.make_jaxpr(lora.merge_lora)(kernels | {LORA: updates}, 1.0)
    products = [equation.outvars[0].aval.shape for equation in program.eqns
                if equation.primitive.name == "dot_general"]
    assert [sorted(shape)[-1] for shape in products] == [x.shape[2] for x in kernels.values()]


@pytest.mark.ci_slow
def test_only_updates_are_trained(runs):
    base, updated, _ = runs
    old, new = paths(restore(base, "ema", None, None).params), paths(stored(updated))
    for path, x in new.items():
        if path.startswith(f"{LORA}/"):
            assert np.any(x != 0), path
        else:
            assert np.array_equal(x, old[path]), path
    with Checkpoints(updated, 1, read_only=True) as checkpoints:
        record = checkpoints._record(3)["leaves"]
    moments = [path for path in record["opt"] if "/mu/" in path or "/nu/" in path]
    assert moments and all(f"/{LORA}/" in path for path in moments) and "ema" not in record


@pytest.mark.ci_slow
def test_evaluation_reads_the_merged_weights(home, runs):
    """The NLL that training gave, from weights merged by hand."""
    _, updated, result = runs
    params = stored(updated)
    by_hand = paths({name: x for name, x in params.items() if name != LORA})
    for path in {key.rpartition("/")[0] for key in paths(params[LORA])}:
        a, b = (paths(params[LORA])[f"{path}/{part}"].astype(np.float64) for part in "ab")
        by_hand[path] = by_hand[path] + ALPHA / RANK * (a @ b).reshape(by_hand[path].shape)
    run = evaluate.open_run(str(updated))
    for path, x in paths(run.params).items():
        np.testing.assert_allclose(x, by_hand[path], rtol=1e-5, atol=1e-6)
    rows = RowsWithBytes(prepare(run.config.data, "valid", 4, run.tokenizer), run.tokenizer)
    found = run.evaluator.run(run.params, rows, estimator="exact", draws=1, seed=0)
    assert found["nll"] == pytest.approx(result["valid_nll"], rel=0.05)


@pytest.mark.ci_slow
def test_a_stopped_run_goes_on_and_is_a_start_itself(home, runs, tmp_path):
    base, updated, _ = runs
    changes = CHANGES | {"train.init_from": str(base)}
    for steps in (1, 3):
        train(toy_config(home, changes | {"train.steps": steps}), str(tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, stored(tmp_path / "run"), stored(updated))
    train(toy_config(home, {"train.init_from": str(updated), "train.steps": 1, "optim.lr": 1e-12,
                            "optim.ema_decay": 0.0}),
          str(tmp_path / "again"))
    merge_lora, again = (paths(restore(x, "params", None, None).params) for x in (updated, tmp_path / "again"))
    for path in merge_lora:
        np.testing.assert_allclose(again[path], merge_lora[path], atol=1e-8)


def test_what_does_not_go_with_updates_is_refused(home):
    for changes in ({}, {"train.init_from": "x", "optim.ema_decay": 0.9},
                    {"train.init_from": "x", "optim.ema_decay": 0.0, "noise.adaptive_noise": "counts"}):
        with pytest.raises(UserError, match="train.lora_rank=2 trains updates of weights that are there: it needs"):
            toy_config(home, {"train.lora_rank": 2} | changes)

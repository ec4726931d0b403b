"""One network at several block sizes: who sees whom in each row, losses, likelihood, texts, the choice of a size."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import some
from toy_evaluation import evaluated
from toy_lm import CONTEXT, MASK, make_ids, make_lm, masked
from toy_runs import toy_config, write_text

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion.mixed import Mixed
from bd3lm_jax.evaluation import block_sizes
from bd3lm_jax.likelihood.estimators import make
from bd3lm_jax.models import forward
from bd3lm_jax.models.forward import RowBlockSizes
from bd3lm_jax.scoring.score import row_losses, score
from bd3lm_jax.training.train import train

SIZES, LENGTH = (1, 2, 4), 8
MIXED = Mixed(block_size=4, sizes=SIZES, schedule="loglinear", corruption="exact_count", complement=False, eps=1e-3)
SECTION = {"kind": "mixed", **dataclasses.asdict(MIXED)}


@pytest.mark.parametrize("backend", some(["dense", "blocked"], 0))
def test_a_token_of_each_row_depends_on_what_its_block_size_allows(backend):
    """Every clean and every noised token is changed in a row of its own: whose output moves, against BD3-LM's rules."""
    lm = make_lm(masked(4))
    execution = dataclasses.replace(forward.DEFAULT_EXECUTION, backend=backend)
    base, noise_samples = make_ids(2, LENGTH)
    clean, noised, sizes = (np.repeat(x, 1 + 2 * LENGTH, axis=0) for x in (
        np.tile(base, (3, 1)), np.tile(noise_samples, (3, 1)), np.array(SIZES)))
    changed = np.tile(np.arange(1 + 2 * LENGTH) - 1, 3)  # -1: nothing; then clean tokens, then noised ones
    for row, token in enumerate(changed):
        stream = clean if token < LENGTH else noised
        if token >= 0:
            stream[row, token % LENGTH] = (stream[row, token % LENGTH] + 1) % MASK
    position, segment = forward.single_document_rows(clean)
    h = jax.jit(lambda: forward.two_stream(
        lm.model, lm.params, noised[:, None], jnp.asarray(clean), position, segment, block_size=4,
        sizes=RowBlockSizes(jnp.asarray(sizes), 1), execution=execution))()
    h = np.asarray(h).reshape(3, 1 + 2 * LENGTH, LENGTH, -1)
    moved = np.abs(h[:, 1:] - h[:, :1]).max(-1) > 1e-5
    assert not np.any((np.abs(h[:, 1:] - h[:, :1]).max(-1) > 1e-6) & ~moved)
    token, i = np.arange(LENGTH)[:, None], np.arange(LENGTH)
    for size, of_size in zip(SIZES, moved):
        np.testing.assert_array_equal(of_size[:LENGTH], token // size < i // size)
        np.testing.assert_array_equal(of_size[LENGTH:], token // size == i // size)


@pytest.mark.ci_slow
def test_the_loss_of_a_row_is_that_of_a_batch_of_its_size():
    """Of a network that is told the levels, which come for every smallest block."""
    lm = make_lm(masked(4), time_conditioning=True)
    x0, (position, segment) = make_ids(6, LENGTH), forward.single_document_rows(make_ids(6, LENGTH))
    key = jax.random.key(5)

    def losses(objective, noised):
        rows = {"tokens": x0, "positions": position, "segments": segment}
        scored = score(lm.model, lm.params, objective, noised, rows, forward.DEFAULT_EXECUTION)
        return (row_losses(lm.model, lm.params, scored, MASK, 0) * scored.weight_BxMxC).sum((1, 2))

    noised = MIXED.corrupt(key, x0, segment, 2, MASK, 3)
    found = np.asarray(jax.jit(losses, static_argnums=0)(MIXED, noised))
    sizes = np.asarray(noised.size_B)
    assert set(sizes) == set(SIZES)
    for size in SIZES:
        alone = MIXED.at(size).corrupt(jax.random.split(key)[1], x0, segment, 2, MASK, 3)
        expected = np.asarray(jax.jit(losses, static_argnums=0)(masked(size), alone))
        np.testing.assert_allclose(found[sizes == size], expected[sizes == size], rtol=1e-4)


@pytest.mark.ci_slow
def test_a_model_of_several_sizes_is_at_each_the_model_of_that_size():
    """Likelihood and texts are those of the same weights in a model of one size."""
    mixed, alone, tokens = make_lm(MIXED), make_lm(masked(2)), make_ids(2, 8)
    here, there = (lm.nll(tokens) for lm in (mixed.at_block_size(2), alone))
    np.testing.assert_allclose(here.per_token, there.per_token, rtol=1e-5)
    texts = [lm.generate(num=2, length=CONTEXT, seed=1, **more)
             for lm, more in ((mixed, {"block_size": 2}), (alone, {}))]
    assert [text.tokens for text in texts[0]] == [text.tokens for text in texts[1]]
    assert mixed.config.block_size == 4 and mixed.at_block_size(4).config.diffusion == masked(4)
    assert mixed.at_block_size(2) is mixed.at_block_size(2)
    for lm, size, words in ((mixed, 3, "block_size is 3, expected one of 1, 2, 4"),
                            (make_lm(masked(4)), 2, "block_size is 2, expected 4")):
        with pytest.raises(UserError, match=words):
            lm.generate(num=1, length=8, block_size=size)


def test_its_own_loss_is_no_estimator():
    with pytest.raises(UserError, match="no bound on the likelihood for this model of kind 'mixed': use exact_count"):
        make("native", make_lm(MIXED).config)


@pytest.mark.parametrize(("within", "best"), [(0.0, 2), (0.01, 2), (0.05, 4), (0.2, 8)])
def test_the_largest_size_near_the_best_is_recommended(within, best):
    rows = [{"block_size": size, "nll": nll} for size, nll in ((1, 2.01), (2, 2.0), (4, 2.08), (8, 2.3))]
    assert block_sizes.recommended(rows, within) == best


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    home = tmp_path_factory.mktemp("mixed")
    write_text(home / "text.txt", 80)
    config = toy_config(home, {"diffusion": SECTION, "train.steps": 3, "train.noise_samples": 2,
                               "compute.microbatch": 4})
    return str(home / "run"), train(config, str(home / "run"))


@pytest.mark.ci_slow
def test_a_run_with_several_sizes_trains_and_gives_the_curve(run):
    workdir, result = run
    assert result["train_nll"] is None and np.isfinite(result["valid_nll"])
    found = block_sizes.curve(workdir, split="valid")
    assert [row["block_size"] for row in found["rows"]] == [1, 2, 4]
    assert found["recommended"] in SIZES and found["rows"][0]["estimator"] == "nll"
    assert found["rows"][2]["nll"] == pytest.approx(result["valid_nll"], rel=1e-5)
    assert found["rows"][0]["nfe_per_token"] >= 1
    same = evaluated(workdir, block_size=2)
    assert same["nll"] == pytest.approx(found["rows"][1]["nll"], rel=1e-6)


def test_one_size_makes_no_curve():
    config = toy_config(Path("unused"))
    assert config.trained_block_sizes == (4,) and config.at_trained_block_size(4) is config
    with pytest.raises(UserError, match="block_size is 2, expected 4, what the model was trained with"):
        config.at_trained_block_size(2)


@pytest.mark.parametrize(("changes", "words"), [
    ({"diffusion": SECTION | {"sizes": (1, 3), "block_size": 1}}, "blocks of 3 tokens, which do not divide"),
    ({"diffusion": SECTION | {"block_size": 2}, "data.packing": "pack"}, "largest of diffusion.sizes, 4"),
    ({"diffusion": SECTION, "noise.adaptive_noise": "counts"}, "diffusion.kind='mixed' does not have"),
    ({"diffusion": SECTION, "train.block_sizes": ((0, 4),)}, "no effect with diffusion.kind='mixed'"),
])
def test_bad_configs(changes, words):
    with pytest.raises(UserError, match=words):
        toy_config(Path("unused"), changes)

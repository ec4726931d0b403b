"""A curriculum of block sizes: each step is that of its size, each program traced once, a resumed run the same."""

from pathlib import Path

import jax
import numpy as np
import pytest
from toy_runs import toy_config, write_text

from bd3lm_jax.checkpoints import rundir
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.log import read_metrics
from bd3lm_jax.data.loader import Loader
from bd3lm_jax.data.prepare import prepare, prepare_tokenizer
from bd3lm_jax.parallel import sharding
from bd3lm_jax.scoring.score import SpecialIds
from bd3lm_jax.training import program
from bd3lm_jax.training.program import Program
from bd3lm_jax.training.train import train

PAIRS = ((0, 1), (3, 4))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    directory = tmp_path_factory.mktemp("curriculum")
    write_text(directory / "text.txt", 80)
    return directory


@pytest.fixture(scope="module")
def whole(home):
    """Six steps that nothing disturbed, and how often a step was traced, by block size."""
    traces, original = [], program.make_step

    def counting(config, *others):
        step = original(config, *others)
        return lambda state, batch: traces.append(config.block_size) or step(state, batch)

    program.make_step = counting
    try:
        train(toy_config(home, {"train.block_sizes": PAIRS}), str(home / "whole"))
    finally:
        program.make_step = original
    return home / "whole", traces


def losses(workdir):
    return [line["train/loss"] for line in read_metrics(workdir)]


@pytest.mark.ci_slow
def test_each_size_is_traced_once(whole):
    assert sorted(whole[1]) == [1, 4]


def test_metrics_say_the_size_of_the_step(whole):
    assert [line["train/block_size"] for line in read_metrics(whole[0])] == [1, 1, 1, 4, 4, 4]


def test_every_step_is_that_of_a_run_of_its_block_size(home, whole):
    """The steps of two runs without curriculum, one after the other on one state."""
    expected, state = [], None
    for size, steps in ((1, range(3)), (4, range(3, 6))):
        config = toy_config(home, {"diffusion.block_size": size})
        tokenizer = prepare_tokenizer(config.data)
        config = rundir.resolve(config, tokenizer)
        mesh = sharding.make_mesh(config.mesh)
        built = Program.of(config, SpecialIds(tokenizer.mask_id, tokenizer.end_id), mesh, np.float32)
        loader = Loader(prepare(config.data, "train", size, tokenizer), config.train.batch_size, config.seed, None)
        with jax.set_mesh(mesh):
            state, step = state or built.initial_state(), built.step()
            for i in steps:
                state, metrics = step(state, loader.get(i)[1])
                expected.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses(whole[0]), expected, rtol=1e-6)
    assert len({round(loss, 4) for loss in expected}) == 6


@pytest.mark.ci_slow
def test_a_run_that_was_stopped_before_and_after_the_switch_goes_on_the_same(home, whole, tmp_path):
    for steps in (2, 4, 6):
        train(toy_config(home, {"train.block_sizes": PAIRS, "train.steps": steps}), str(tmp_path / "run"))
    assert losses(tmp_path / "run") == losses(whole[0])


def test_a_curriculum_is_read_back_and_decides_what_is_learned(home, whole):
    config = rundir.read(whole[0])[0]
    assert config.train.block_sizes == PAIRS and config.block_size == 4
    assert [config.block_size_at(step) for step in (0, 2, 3, 99)] == [1, 1, 4, 4]
    assert toy_config(home).block_size_at(5) == 4
    with pytest.raises(UserError, match="train.block_sizes"):
        train(toy_config(home), str(whole[0]))


@pytest.mark.parametrize(("changes", "words"), [
    ({"train.block_sizes": ((0, 5), (3, 4))}, "blocks of 5 tokens, which do not divide data.seq_len=32"),
    ({"train.block_sizes": ((0, 1), (3, 8))}, "ends with blocks of 8 tokens, .* diffusion.block_size=4"),
    ({"train.block_sizes": ((1, 1), (3, 4))}, "begin at step 0"),
    ({"train.block_sizes": ((0, 1), (3, 2), (3, 4))}, "the steps rising"),
    ({"train.block_sizes": ((0, 1, 2), (3, 4))}, "expected pairs"),
    ({"train.block_sizes": ((0, 0), (3, 4))}, "expected pairs"),
    ({"train.block_sizes": (0, 4)}, "train.block_sizes"),
    ({"train.block_sizes": ((0, 8), (3, 4)), "data.packing": "pack"}, "documents begin at multiples of"),
    ({"train.block_sizes": PAIRS, "noise.adaptive_noise": "counts"},
     "noise.adaptive_noise='counts' learns about blocks of one size"),
    ({"train.block_sizes": PAIRS, "diffusion.count_probs": (1.0, 1.0, 1.0, 2.0)}, "count_probs is for blocks of one"),
    ({"train.block_sizes": ((0, 1),), "diffusion": {"kind": "ar", "bos": True}}, "no effect with diffusion.kind='ar'"),
])
def test_bad_curricula(changes, words):
    with pytest.raises(UserError, match=words) as error:
        toy_config(Path("unused"), changes)
    assert "\n" not in str(error.value)

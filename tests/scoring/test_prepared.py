"""What an objective does to a batch before it is noised, seen from outside: on what the loss of a step depends."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_runs import END, LENGTH, MASK, network, quick_jit, toy_config

from bd3lm_jax.core.state import TrainState
from bd3lm_jax.models import forward
from bd3lm_jax.scoring.score import SpecialIds
from bd3lm_jax.training.step import make_step

LLADA = {"kind": "llada", "block_size": LENGTH, "complement": False, "random_length": 1.0, "sft": False,
         "normalise": "tokens"}


def measure(changes, **data):
    """`f(step, batch)`: metrics of that step of LLaDA on fixed weights, jitted."""
    changes = {"diffusion": {**LLADA, **changes}, "optim.ema_decay": 0.0} | {f"data.{key}": x for key,
                                                                             x in data.items()}
    config, tx = toy_config(Path("unused"), changes), optax.sgd(0.0)
    model, params = network(config)
    run = quick_jit(make_step(config, model, tx, SpecialIds(MASK, END)))
    state = TrainState(jnp.int32(0), params, {}, tx.init(params))
    return lambda step, batch: run(state.replace(step=jnp.int32(step)), batch)[1]


def make_batch(padding=0):
    """Rows of letters; the last `padding` tokens of the last row are not there."""
    tokens = np.random.default_rng(0).integers(97, 105, size=(4, LENGTH)).astype(np.int32)
    position, segment = (np.array(x) for x in forward.single_document_rows(tokens))
    if padding:
        tokens[-1, -padding:], position[-1, -padding:], segment[-1, -padding:] = END, 0, 0
    return {"tokens": jnp.asarray(tokens), "positions": jnp.asarray(position), "segments": jnp.asarray(segment)}


def moves_with_tokens(metrics, step, batch):
    """Whether the loss of a step changes with the tokens of column i, bool `[L]`."""
    before, tokens = float(metrics(step, batch)["loss"]), batch["tokens"]
    changed = [tokens.at[:, i].set(jnp.where(tokens[:, i] == 100, 101, 100)) for i in range(LENGTH)]
    return np.array([float(metrics(step, {**batch, "tokens": other})["loss"]) != before for other in changed])


def test_a_cut_batch_depends_on_its_beginning_alone():
    metrics, kept = measure({}), []
    for step in range(3):
        moved = moves_with_tokens(metrics, step, make_batch())
        kept.append(moved.sum())
        assert moved[0] and np.all(moved == (np.arange(LENGTH) < kept[-1]))
    assert len(set(kept)) > 1 and min(kept) < LENGTH


@pytest.mark.ci_slow
def test_padding_of_an_answer_is_learned_and_the_prompt_is_not():
    """The last row ends in padding: whatever it holds, end tokens are put there and count; prompts are context."""
    metrics = measure({"random_length": 0.0, "sft": True, "normalise": "answer"}, source="sft", packing="pad")
    batch = make_batch(padding=6)
    batch["prompt"] = jnp.broadcast_to(jnp.arange(LENGTH) < 8, batch["tokens"].shape).astype(jnp.int32)
    found = metrics(1, batch)
    same = metrics(1, {**batch, "tokens": batch["tokens"].at[-1, -6:].set(100)})
    assert float(found["loss"]) == float(same["loss"]) and found["finite"]
    assert moves_with_tokens(metrics, 1, batch)[:8].any()  # prompts are seen
    all_prompt = {**batch, "prompt": jnp.ones_like(batch["prompt"])}
    learned = [float(metrics(step, all_prompt)["masked"]) for step in range(8)]
    assert 0 < max(learned) <= 6 / (4 * LENGTH) + 1e-6  # nothing but the end tokens that padding became

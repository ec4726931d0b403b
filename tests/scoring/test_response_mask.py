"""Loss on answers alone, against sums in NumPy over the tokens of the answers."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from grids import some
from toy_runs import AR, END, LENGTH, MASK, network, quick_jit, toy_config

import bd3lm_jax
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.log import read_metrics
from bd3lm_jax.core.state import TrainState
from bd3lm_jax.diffusion import OBJECTIVES
from bd3lm_jax.scoring.score import SpecialIds
from bd3lm_jax.training import optim
from bd3lm_jax.training.step import draw_noise, make_step
from bd3lm_jax.training.train import train

SPECIAL = SpecialIds(MASK, END)
SFT = {"data.source": "sft", "data.path": "there", "data.packing": "pack"}
LLADA = {"kind": "llada", "block_size": LENGTH, "complement": False, "random_length": 0.0, "sft": True,
         "normalise": "answer"}


def batch_of(rows=3):
    """Two packed dialogues a row, then padding; prompts are runs at random places."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, END, size=(rows, LENGTH)).astype(np.int32)
    segments = np.repeat([[1, 2, 0]], rows, 0).repeat([16, 12, 4], axis=1).astype(np.int32)
    positions = np.where(segments == 2, np.arange(LENGTH) - 16, np.arange(LENGTH)).astype(np.int32)
    prompt = (np.isin(np.arange(LENGTH) % 16, range(0, 7)) & (segments > 0)).astype(np.float32)
    return {"tokens": tokens, "segments": segments, "positions": np.where(segments == 0, 0, positions),
            "prompt": prompt}


@pytest.mark.parametrize("changes", some([{}, {"diffusion": AR, "model.adaln": False}], 1), ids=["masked", "ar"])
def test_the_loss_is_the_mean_over_answers(tmp_path, changes):
    """Weights of the noise, logits of the raw passes document by document, and the sum by hand."""
    config = toy_config(tmp_path, SFT | changes)
    model, params = network(config)
    config = config.with_vocab(MASK + 1)
    batch, answers = batch_of(), None
    tx = optim.make_optimizer(config.optim, 1)
    state = TrainState(np.zeros((), np.int32), params, {}, tx.init(params))
    key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 0))[0]
    found = quick_jit(make_step(config, model, tx, SPECIAL))(state, batch)[1]
    noised = draw_noise(config, SPECIAL, key, batch, 1, {}, {})
    xt, weight = np.asarray(noised.xt_BxMxL[:, 0]), np.asarray(noised.weight_BxMxL[:, 0], np.float64)
    answers = (batch["segments"] > 0) & (batch["prompt"] == 0)
    assert not weight[~answers].any() and weight[answers].any()
    if not config.diffusion.causal:
        assert np.array_equal(xt[~answers], batch["tokens"][~answers])
    lm = bd3lm_jax.LM(config, params, None, model, LENGTH)
    total = 0.0
    for first, last in ((0, 16), (16, 28)):
        part = slice(first, last)
        args = (xt[:, part],) if config.diffusion.causal else (xt[:, part], batch["tokens"][:, part])
        logits = np.asarray(lm.logits(*args), np.float64)
        logits[..., MASK] = -np.inf
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nll = -np.take_along_axis(log_p, batch["tokens"][:, part, None], -1)[..., 0]
        total += (nll * weight[:, part] * answers[:, part]).sum()
    assert float(found["loss"]) == pytest.approx(total / answers.sum(), rel=1e-5)


def test_prompts_change_nothing_but_what_is_seen(tmp_path):
    """Without prompts the loss is that of plain text."""
    plain, sft = toy_config(tmp_path).with_vocab(MASK + 1), toy_config(tmp_path, SFT).with_vocab(MASK + 1)
    batch = batch_of()
    without = {**batch, "prompt": np.zeros_like(batch["prompt"])}
    key = jax.random.key(3)
    left = draw_noise(sft, SPECIAL, key, without, 1, {}, {})
    right = draw_noise(plain, SPECIAL, key, {name: x for name, x in batch.items() if name != "prompt"}, 1, {}, {})
    jax.tree.map(np.testing.assert_array_equal, left, right)


def dialogues(path, number=60):
    draw = np.random.default_rng(1)
    lines = []
    for _ in range(number):
        a, b = draw.integers(0, 10, size=2)
        lines.append({"prompt": f"{a}+{b}=", "response": str(a + b)})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.ci_slow
@pytest.mark.parametrize("changes", [{}, {"diffusion": LLADA, "data.packing": "pad"},
                                     {"diffusion": AR, "model.adaln": False}], ids=["blocks", "llada", "ar"])
def test_runs_on_dialogues(tmp_path, changes):
    """Prepared, trained and validated on answers: every answer with its end token, and nothing else."""
    sft = SFT | {"data.path": dialogues(tmp_path / "d.jsonl"), "train.steps": 12, "data.seq_len": 16} | changes
    if "diffusion" in changes and changes["diffusion"]["kind"] == "llada":
        sft["diffusion"] = {**LLADA, "block_size": 16}
    result = train(toy_config(tmp_path, sft), str(tmp_path / "run"))
    losses = [line["train/loss"] for line in read_metrics(tmp_path / "run")]
    assert losses[-1] < losses[0] and 0 < result["valid_nll"] < np.log(258)
    report = json.loads((tmp_path / "run" / "report.json").read_text())["valid"]
    held_out = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()][-6:]
    assert report["tokens"] == sum(len(line["response"]) + 1 for line in held_out) and report["documents"] == 6


def test_what_does_not_go_with_answers_is_refused(tmp_path):
    with pytest.raises(UserError, match="diffusion.sft=True needs to know the prompts: use data.source='sft'"):
        toy_config(tmp_path, {"diffusion": LLADA})
    with pytest.raises(UserError, match="diffusion.bos=False hides tokens of weight 0"):
        toy_config(tmp_path, SFT | {"diffusion": {"kind": "ar", "bos": False}, "model.adaln": False})
    cap = {**toy_config(tmp_path).to_dict()["diffusion"], "kind": "cap", "coefficient": 1.0}
    with pytest.raises(UserError, match="weighs a term of its own by all tokens of a row, prompts too"):
        toy_config(tmp_path, SFT | {"diffusion": cap})
    assert "prompt" in toy_config(tmp_path, SFT).batch_arrays and "llada" in OBJECTIVES
    assert dataclasses.asdict(toy_config(tmp_path, SFT).data)["source"] == "sft"

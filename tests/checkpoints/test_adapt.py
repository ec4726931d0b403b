"""Starting from foreign weights: which are taken, what is added, what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from places import GOLDEN, HF
from toy_runs import AR, END, MASK, toy_config, toy_dict, write_text
from word_tokenizer import write_tokenizer

import bd3lm_jax
from bd3lm_jax import models
from bd3lm_jax.checkpoints import adapt, hf, rundir
from bd3lm_jax.checkpoints.checkpoint import Checkpoints
from bd3lm_jax.checkpoints.restore import restore
from bd3lm_jax.config import Config
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.log import read_metrics
from bd3lm_jax.data.loader import Loader
from bd3lm_jax.data.prepare import prepare
from bd3lm_jax.data.tokenizers import ByteTokenizer, load_tokenizer
from bd3lm_jax.diffusion import AR as Autoregression
from bd3lm_jax.models import trunk
from bd3lm_jax.models.dit import DiTConfig
from bd3lm_jax.training.train import train

SAME = {"kind": "init_from"}
STILL = {"optim.lr": 1e-12, "train.steps": 1, "optim.ema_decay": 0.0}  # a step that leaves the weights where they were


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapt")
    write_text(directory / "text.txt", 80)
    return directory


@pytest.fixture(scope="module")
def ar_run(home):
    train(toy_config(home, {"diffusion": AR, "model.adaln": False, "train.steps": 4}), str(home / "ar"))
    return home / "ar"


def weights(workdir):
    return restore(workdir, "params", None, None).params


def published(directory: Path, name: str, vocab_size: int) -> Path:
    """A golden checkpoint cut to so many tokens, with the byte tokenizer beside it."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(GOLDEN / name, directory)
    config = json.loads((directory / "config.json").read_text())
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        config.pop(key, None)
    tensors = load_file(directory / "model.safetensors")
    grown = {}
    for key, x in tensors.items():
        at = [i for i, n in enumerate(x.shape) if n == config["vocab_size"]]
        if at:
            x = np.resize(x, [vocab_size if i in at else n for i, n in enumerate(x.shape)])
        grown[key] = x
    save_file(grown, directory / "model.safetensors")
    sizes = {key: vocab_size for key in ("vocab_size", "embedding_size") if key in config}
    (directory / "config.json").write_text(json.dumps(config | sizes))
    ByteTokenizer().save(directory / "tokenizer.json")
    return directory


def start(home, source, **changes):
    return toy_dict(home, {"train.init_from": str(source), **STILL, **changes}) | {"model": SAME}


def parsed(nested) -> Config:
    return Config.from_dict(adapt.resolve(nested))


@pytest.mark.ci_slow
def test_an_autoregressive_run_becomes_a_block_model(home, ar_run, tmp_path, capsys):
    """Its network, found from `train.init_from`; every weight but the row of the mask token stays as it was."""
    config = parsed(start(home, ar_run, **{"eval.rows": 0, "eval.mc_samples": 1}))
    assert config.model == rundir.read(ar_run)[0].model and not config.model.adaln
    train(config, str(tmp_path / "run"))
    before, after = read_metrics(tmp_path / "run")
    assert (before["step"], after["step"]) == (0, 1) and "train/loss" not in before
    assert before["valid/nll"] == pytest.approx(after["valid/nll"], rel=1e-6)  # the step was nothing
    old, new = restore(ar_run, "ema", None, None).params, weights(tmp_path / "run")
    table, there = np.asarray(new["embed"]["embedding"]), np.asarray(old["embed"]["embedding"])
    assert f"mask token {MASK}: a row that was never read, now the mean of 257" in capsys.readouterr().err
    others = np.arange(len(table)) != MASK
    np.testing.assert_allclose(table[others], there[others], atol=1e-9)
    np.testing.assert_allclose(new["blocks"]["qkv"]["kernel"], old["blocks"]["qkv"]["kernel"], atol=1e-9)
    mean, spread = there[:MASK].mean(0), there[:MASK].std(0)
    z = (table[MASK] - mean) / (adapt.MASK_ROW_NOISE * spread)
    assert 0.6 < z.std() < 1.5 and abs(z.mean()) < 0.6 and np.abs(z).max() < 5  # 32 normal numbers


def test_the_row_of_the_mask_token_by_its_law():
    """Mean and spread of many features against the sample moments of the table; nothing else moves."""
    draw = np.random.default_rng(0)
    table = jnp.asarray(draw.normal(3, 2, size=(8, 4000)), jnp.float32)
    params = {"kernel": table.T, "other": table, "table": table}
    found = adapt.with_mask_row(params, {"kernel": 1, "other": -1, "table": 0}, 5, 7, seed=0)
    assert np.array_equal(found["other"], table)
    rows = np.asarray(table)[[0, 1, 2, 3, 4, 6]]  # row 7 is padding
    for x in (found["table"], found["kernel"].T):
        assert np.array_equal(np.delete(x, 5, 0), np.delete(table, 5, 0))
        z = (np.asarray(x)[5] - rows.mean(0)) / (adapt.MASK_ROW_NOISE * rows.std(0))
        assert abs(z.mean()) < 4 / np.sqrt(4000) and abs(z.std() - 1) < 4 / np.sqrt(8000)
    again = adapt.with_mask_row(params, {"kernel": 1, "other": -1, "table": 0}, 5, 7, seed=1)
    assert not np.array_equal(again["table"], found["table"])


def test_the_mask_token_is_that_of_the_source(home):
    """Golden LLaDA names id 58, which need not be the last one; what masks nothing is left as it is."""
    start_from = {"train.init_from": str(HF / "llada")}
    bytes_alone = ByteTokenizer().with_mask(-1)
    assert adapt.add_mask_token(toy_config(home, start_from), ByteTokenizer()).mask_id == 58
    assert adapt.add_mask_token(toy_config(home), ByteTokenizer()).mask_id == MASK
    assert adapt.add_mask_token(toy_config(home), bytes_alone).mask_id == MASK == bytes_alone.size
    assert adapt.add_mask_token(toy_config(home, {"diffusion": AR, "model.adaln": False}), bytes_alone).mask_id == -1


def test_axes_of_the_vocabulary():
    model = models.build(DiTConfig(300, 1, 128, 1, 4, 0.0, False, 16, False, 1e4), jnp.float32)
    axes = adapt.vocabulary_axes(model)
    assert axes["embed"] == {"embedding": 0} and axes["head"]["linear"] == {"kernel": 1, "bias": 0}
    rest = {**axes["blocks"], "norm": axes["head"]["norm"]}
    assert set(jax.tree.leaves(rest)) == {-1}


@pytest.mark.ci_slow
def test_a_published_checkpoint_without_a_mask_token_gets_one(home, tmp_path, capsys):
    source = published(tmp_path / "ar", "ar", 257)
    train(parsed(start(home, source)), str(tmp_path / "run"))
    assert "mask token 257: a new row, now the mean of 257 embeddings plus noise" in capsys.readouterr().err
    config, new = rundir.read(tmp_path / "run")[0], weights(tmp_path / "run")
    assert config.model.vocab_size == 258 and not config.model.adaln
    _, old = hf.read_model(source)
    shapes = jax.eval_shape(lambda: trunk.init(models.build(config.model, jnp.float32), jax.random.key(0)))
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(lambda x: x.shape, shapes)
    np.testing.assert_allclose(new["embed"]["embedding"][:257], old["embed"]["embedding"][:257], atol=1e-9)
    np.testing.assert_allclose(new["head"]["linear"]["kernel"][:, :257], old["head"]["linear"]["kernel"][:, :257],
                               atol=1e-9)
    np.testing.assert_allclose(new["embed"]["embedding"][257], old["embed"]["embedding"][:257].mean(0), atol=0.05)


def test_padding_is_no_mask_token(home, tmp_path, capsys):
    """LLaDA that names no mask, with 257 tokens and rows up to 264: row 257 was never read, so it is drawn anew."""
    source = published(tmp_path / "llada", "hf/llada", 264)
    config = json.loads((source / "config.json").read_text())
    named = config.pop("mask_token_id")
    assert hf.read_tokenizer(source, hf.from_hf_config(write_config(source, config))).mask_id == -1
    old = np.asarray(hf.read_model(source)[1]["embed"]["embedding"])
    found = {}
    for mask_id in (None, named):
        write_config(source, config | {"mask_token_id": mask_id})
        ours = parsed(start(home, source))
        tokenizer = adapt.add_mask_token(ours, ByteTokenizer())
        model = models.build(ours.model, jnp.float32)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(jax.devices()[0])),
            jax.eval_shape(lambda: trunk.init(model, jax.random.key(0))))
        found[tokenizer.mask_id] = adapt.initial_weights(ours, model, tokenizer, abstract, None)["embed"]["embedding"]
        said = capsys.readouterr().err
        assert ("mask token 257: a row that was never read, now the mean of 257" in said) == (mask_id is None)
    np.testing.assert_array_equal(found[named], old)
    np.testing.assert_array_equal(np.delete(found[257], 257, 0), np.delete(old, 257, 0))
    z = (np.asarray(found[257])[257] - old[:257].mean(0)) / (adapt.MASK_ROW_NOISE * old[:257].std(0))
    assert 0.6 < z.std() < 1.5 and np.abs(z).max() < 5


def test_a_tokenizer_is_known_by_its_ids(home, tmp_path):
    """Its name, its layout as JSON, padding and mask say nothing of the ids; another word or end token does."""
    source = published(tmp_path / "llama", "hf/llama", 59)
    write_tokenizer(source, 59)
    content = json.loads((source / "tokenizer.json").read_text())
    other = tmp_path / "words.json"

    def check(content, end):
        other.write_text(json.dumps(content, indent=4))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
        config = parsed(start(home, source, **{"data.tokenizer": str(other)}))
        adapt.check_source(config, adapt.add_mask_token(config, load_tokenizer(other)))

    content["truncation"] = {"max_length": 8, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    check(content, "<|endoftext|>")
    vocab = content["model"]["vocab"]
    swapped = vocab | {"w3": vocab["w4"], "w4": vocab["w3"]}
    other_words = content | {"model": content["model"] | {"vocab": swapped}}
    for changed, end in ((content, "w7"), (other_words, "<|endoftext|>")):
        with pytest.raises(UserError, match="words.json' is not the tokenizer of train.init_from=.*llama: ids"):
            check(changed, end)


def write_config(directory, config):
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.ci_slow
def test_a_published_masked_model_keeps_its_mask_token(home, tmp_path):
    """MDLM -> BD3-LM: the bound of one block a row becomes that of blocks of four, with all weights as published."""
    source = published(tmp_path / "mdlm", "bd3lm_block32_is_mdlm", 258)
    train(parsed(start(home, source)), str(tmp_path / "run"))
    _, old = hf.read_model(source)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), weights(tmp_path / "run"), old)
    train(parsed(start(home, source)), str(tmp_path / "run"))  # the same command again


@pytest.mark.ci_slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_causal_model_starts_at_its_own_likelihood(home, tmp_path, name):
    """Blocks of one token with outputs one ahead: the loss of the first update is the mean NLL by the raw logits of the
    published network on the rows of that batch, behind an end token; then blocks of two are trained, whole and by
    updates of rank 2."""
    source, length = published(tmp_path / name, f"hf/{name}", 257), 24
    changes = {"data.seq_len": length, "train.batch_size": 4, "train.steps": 2, "eval.rows": 4}
    sizes = {"diffusion.block_size": 2, "train.block_sizes": ((0, 1), (1, 2)), "train.anneal_steps": 2}
    model = {"model": {**SAME, "target_shift": "block", "dropout": 0.0}}
    config = parsed(start(home, source, **changes, **sizes) | model)
    train(config, str(tmp_path / "run"))
    rows = prepare(config.data, "train", 2, ByteTokenizer())
    tokens = Loader(rows, 4, config.seed, None).get(0)[1]["tokens"]
    inputs = np.concatenate([np.full((4, 1), END), tokens[:, :-1]], axis=1)
    logits = np.asarray(bd3lm_jax.load(str(source)).logits(inputs), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, tokens[..., None], -1).mean()
    losses = [line["train/loss"] for line in read_metrics(tmp_path / "run") if line["step"]]
    assert losses[0] == pytest.approx(nll, rel=1e-5) and len(losses) == 2
    lora = {"train.lora_rank": 2, "optim.lr": 1e-2}
    result = train(parsed(start(home, source, **changes | lora) | model), str(tmp_path / "lora"))
    assert np.isfinite(result["valid_nll"]) and rundir.read(tmp_path / "lora")[0].model.kind == name


@pytest.mark.ci_slow
def test_dream_is_cut_into_blocks(home, tmp_path):
    """Its outputs stay one token ahead ("row" becomes "block"): blocks of one token begin at the loss that the same
    weights have in the published network, causal and behind an end token, as those of any causal network do."""
    source = published(tmp_path / "dream", "hf/dream", 258)
    changes = {"data.seq_len": 24, "train.batch_size": 4, "eval.rows": 4, "diffusion.block_size": 1}
    config = parsed(start(home, source, **changes) | {"model": {**SAME, "target_shift": "source"}})
    assert (hf.from_hf_config(source).model.target_shift, config.model.target_shift) == ("row", "block")
    train(config, str(tmp_path / "run"))
    plain = hf.from_hf_config(source)
    model = dataclasses.replace(plain.model, target_shift="")
    ar = bd3lm_jax.lm.published(plain._replace(model=model, objective=Autoregression(bos=True)),
                                hf.read_model(source)[1], ByteTokenizer(), "float32")
    rows = prepare(config.data, "train", 1, ByteTokenizer())
    tokens = Loader(rows, 4, config.seed, None).get(0)[1]["tokens"]
    inputs = np.concatenate([np.full((4, 1), END), tokens[:, :-1]], axis=1)
    logits = np.array(ar.logits(inputs), np.float64)
    logits[..., adapt.add_mask_token(config, ByteTokenizer()).mask_id] = -np.inf
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, tokens[..., None], -1).mean()
    assert read_metrics(tmp_path / "run")[-1]["train/loss"] == pytest.approx(nll, rel=1e-5)


@pytest.mark.ci_slow
def test_continuing_does_not_start_again(home, ar_run, tmp_path):
    config = start(home, ar_run, **{"optim.lr": 1e-2})
    train(parsed(config), str(tmp_path / "run"))
    before = weights(tmp_path / "run")
    train(parsed(config), str(tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, before, weights(tmp_path / "run"))


def test_what_does_not_fit_is_refused(home, ar_run, tmp_path):
    with pytest.raises(UserError, match="another network .model.adaln: True != False; here != there.: use model.kind"):
        train(toy_config(home, {"train.init_from": str(ar_run)}), str(tmp_path / "run"))
    with pytest.raises(UserError, match="model.kind='init_from' takes the network of train.init_from, which is ''"):
        parsed(toy_dict(home, {}) | {"model": SAME})
    with pytest.raises(UserError, match="unknown config key 'model.depth'"):
        parsed(start(home, ar_run) | {"model": {**SAME, "depth": 2}})
    source = published(tmp_path / "ar", "ar", 257)
    with pytest.raises(UserError, match="data.seq_len=64, but train.init_from=.* at most 32 tokens: shorten the rows"):
        train(parsed(start(home, source, **{"data.seq_len": 64})), str(tmp_path / "run"))
    write_tokenizer(source, 257)
    with pytest.raises(UserError, match="data.tokenizer='bytes' is not the tokenizer of train.init_from=.*: ids would "
                                        "mean other text; use data.tokenizer=.*ar$"):
        train(parsed(start(home, source)), str(tmp_path / "run"))
    small = published(tmp_path / "small", "ar", 200)
    with pytest.raises(UserError, match="model.vocab_size=200 is smaller than the 258 ids of tokenizer 'bytes'"):
        train(start(home, small), str(tmp_path / "run"))
    config = rundir.resolve(toy_config(home), ByteTokenizer())
    rundir.create_or_validate(tmp_path / "empty", config, ByteTokenizer())
    with pytest.raises(UserError, match="holds no checkpoint: train it first"):
        train(parsed(start(home, tmp_path / "empty")), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_reading_a_config_reads_no_checkpoint(home):
    nested = start(home, "nowhere/at/all")
    with pytest.raises(UserError, match="Config.from_dict reads no checkpoint: give it adapt.resolve.config."):
        Config.from_dict(nested)
    with pytest.raises(UserError, match="no run directory nowhere/at/all"):
        adapt.resolve(nested)
    with pytest.raises(UserError, match="config key 'train.steps' is 'x' .str., expected int"):
        adapt.resolve({**nested, "train": nested["train"] | {"steps": "x"}})
    plain = toy_dict(home, {})
    assert adapt.resolve(plain) is plain


def test_a_changed_network_may_drop_otherwise(home, ar_run):
    model = {**SAME, "dropout": 0.2}
    found = parsed(start(home, ar_run) | {"model": model}).model
    assert found == dataclasses.replace(rundir.read(ar_run)[0].model, dropout=0.2)
    assert Checkpoints(ar_run, 1, read_only=True).latest_step() == 4

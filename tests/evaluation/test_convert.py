"""Written checkpoints against the published files they came from, run directories both ways, nothing half-written."""

import io
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from grids import some
from places import GOLDEN
from rich.console import Console
from safetensors.numpy import load_file, save_file
from toy_runs import rewrite_config
from word_tokenizer import write_tokenizer

import bd3lm_jax
from bd3lm_jax.checkpoints import hf
from bd3lm_jax.checkpoints.published.bd3lm import CONFIG_KEYS, INV_FREQ
from bd3lm_jax.checkpoints.published.card import Origin, base_name, card
from bd3lm_jax.config import DataConfig
from bd3lm_jax.core import log
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data.chat_template import ChatTemplate
from bd3lm_jax.evaluation.convert import convert

BD3LM = ("bd3lm_block4", "bd3lm_time_conditioned", "bd3lm_block32_is_mdlm", "ar", "sedd")
OTHERS = tuple(f"hf/{name}" for name in ("llama", "qwen2", "llada", "dream", "llada2_moe", "bert", "roberta",
                                         "modernbert", "gpt2"))


def converted(source, target, **changes):
    options = {"form": "hf", "dtype": "float32", "check": 0, "max_shard": "5GB", "weights": "ema", "tokenizer": "",
               "length": 0, "allow_pickle": False}
    return convert(source, target, **options | changes)


def with_tokenizer(tmp_path, name, size, *special):
    directory = tmp_path / "source"
    shutil.copytree(GOLDEN / name, directory)
    write_tokenizer(directory, size, *special)
    return directory


def assert_same_files(ours, theirs):
    """Names, shapes, dtypes and bits, but for the frequencies of RoPE, which PyTorch rounds otherwise."""
    ours, theirs = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert (ours[name].shape, ours[name].dtype) == (x.shape, x.dtype), name
        if name == INV_FREQ:
            np.testing.assert_allclose(ours[name], x, rtol=1e-6)
        else:
            np.testing.assert_array_equal(ours[name], x, name)


@pytest.mark.parametrize("name", [*BD3LM, *OTHERS])
def test_in_out_in(tmp_path, name):
    result = converted(GOLDEN / name, tmp_path / "out")
    assert_same_files(tmp_path / "out", GOLDEN / name)
    (there, params), (here, again) = hf.read_model(GOLDEN / name), hf.read_model(tmp_path / "out")
    assert here == there
    jax.tree.map(np.testing.assert_array_equal, params, again)
    tensors = load_file(GOLDEN / name / "model.safetensors")
    assert result["tensors"] == len(tensors) and result["bytes"] == sum(x.nbytes for x in tensors.values())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", BD3LM)
def test_config_of_a_written_bd3lm(tmp_path, name):
    converted(GOLDEN / name, tmp_path / "out")
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", GOLDEN / name))
    for key in (*CONFIG_KEYS, "algo", "model_type", "architectures", "var_min", "sampling_eps_min",
                "sampling_eps_max"):
        assert ours.get(key) == theirs.get(key), key


def test_reading_writing_and_comparing_show_that_they_go_on(tmp_path, monkeypatch):
    """On a screen that moves, on which a task is one line."""
    screen = io.StringIO()
    monkeypatch.setattr(log, "_console", Console(file=screen, force_terminal=True, width=300, highlight=False,
                                                 _environ={"TERM": "xterm"}))
    converted(GOLDEN / "ar", tmp_path / "out", check=4)
    shown = screen.getvalue()
    for line in (f"reading {GOLDEN / 'ar'}", f"writing {tmp_path / 'out'}", "comparing the logits of 4 tokens"):
        assert line in shown


def test_shards(tmp_path):
    limit = 20_000
    converted(GOLDEN / "bd3lm_block4", tmp_path / "out", max_shard="0.02MB")
    tensors = load_file(GOLDEN / "bd3lm_block4" / "model.safetensors")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-{i + 1:05}-of-{len(files):05}.safetensors"
                                             for i in range(len(files))] and len(files) > 4
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    found = {}
    for file in files:
        part = load_file(file)
        assert {name: index["weight_map"][name] for name in part} == dict.fromkeys(part, file.name)
        assert len(part) == 1 or sum(x.nbytes for x in part.values()) <= limit
        found |= part
    assert found.keys() == tensors.keys()
    jax.tree.map(np.testing.assert_array_equal, hf.read_model(tmp_path / "out")[1],
                 hf.read_model(GOLDEN / "bd3lm_block4")[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes(tmp_path, dtype):
    result = converted(GOLDEN / "hf/llama", tmp_path / "out", dtype=dtype, check=16)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, x in load_file(GOLDEN / "hf/llama" / "model.safetensors").items():
        np.testing.assert_array_equal(written[name], x.astype(kind), name)
    assert 0 < result["max_difference"] < 0.05 * result["largest_logit"] and result["checked_tokens"] == 16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype


def test_overflow_names_the_tensor_and_leaves_nothing(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "hf/llama", source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1e6
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(UserError, match="tensor model.norm.weight: 32 values overflow in float16, the largest is 1"):
        converted(source, tmp_path / "out", dtype="float16")
    (tmp_path / "kept").mkdir()
    for place in ("new/newer/out", "kept/new/out"):  # directories made for the target go as well
        with pytest.raises(UserError, match="overflow in float16"):
            converted(source, tmp_path / place, dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "source"] and not any(
        (tmp_path / "kept").iterdir())
    converted(source, tmp_path / "new" / "newer" / "out", dtype="bfloat16")
    assert (tmp_path / "new" / "newer" / "out" / "config.json").exists()


@pytest.mark.parametrize("name, size", some([("bd3lm_block4", 66), ("ar", 66), ("hf/llama", 59)], 0))
def test_a_run_directory_and_back(tmp_path, name, size):
    source = with_tokenizer(tmp_path, name, size)
    result = converted(source, tmp_path / "run", form="native", check=8)
    assert result["max_difference"] == 0 and sorted(path.name for path in tmp_path.iterdir()) == ["run", "source"]
    there, here = bd3lm_jax.load(source), bd3lm_jax.load(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, there.params, here.params)
    assert (here.config.model, here.config.diffusion) == (there.config.model, there.config.diffusion)
    assert here.special == there.special and here.context == there.context
    assert (here.special.mask, here.special.end) == (66 if size == 66 else -1, size - 1)
    converted(tmp_path / "run", tmp_path / "back")
    assert_same_files(tmp_path / "back", source)
    assert hf.read_model(tmp_path / "back")[0] == hf.read_model(source)[0]
    text = "w3 w1 w4"
    tokenizers = [bd3lm_jax.load(tmp_path / part).tokenizer for part in ("source", "run", "back")]
    assert [tokenizer.encode(text).tolist() for tokenizer in tokenizers] == [[3, 1, 4]] * 3
    assert len({tokenizer.mask_id for tokenizer in tokenizers} | {there.special.mask}) == 1


def test_an_objective_and_a_form_of_ours_come_back(tmp_path):
    """Published code has no word for how a bound is estimated: config.json says it for this library."""
    source = with_tokenizer(tmp_path, "bd3lm_block4", 66)
    converted(source, tmp_path / "run", form="native")
    rewrite_config(tmp_path / "run", {"diffusion": {"corruption": "exact_count", "clip_low": 0.0, "clip_high": 1.0},
                                      "model": {"target_shift": "block"}})
    converted(tmp_path / "run", tmp_path / "out")
    found, ours = hf.from_hf_config(tmp_path / "out"), bd3lm_jax.load(tmp_path / "run").config
    assert (found.objective, found.model) == (ours.diffusion, ours.model) and found.model.target_shift == "block"
    assert load_file(tmp_path / "out" / "model.safetensors")["sampling_eps_min"] == np.float32(1e-3)


def test_the_ids_of_special_tokens_are_handed_back(tmp_path):
    """Also lists of ids, and where no generation_config.json was there."""
    source = with_tokenizer(tmp_path, "hf/llama", 59)
    config = json.loads((source / "config.json").read_text()) | {"eos_token_id": [2, 7], "pad_token_id": 3}
    (source / "config.json").write_text(json.dumps(config))
    (source / "generation_config.json").unlink()
    converted(source, tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        found = json.loads((tmp_path / "out" / name).read_text())
        assert {key: found[key] for key in hf.TOKEN_IDS} == {"bos_token_id": 1, "eos_token_id": [2, 7],
                                                             "pad_token_id": 3}
    (source / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [5]}')
    converted(source, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text())["eos_token_id"] == [5]
    converted(source, tmp_path / "run", form="native")
    converted(tmp_path / "run", tmp_path / "back")
    for name in ("config.json", "generation_config.json"):
        found = json.loads((tmp_path / "back" / name).read_text())
        assert found["eos_token_id"] == found["pad_token_id"] == 58 and "bos_token_id" not in found
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "llama"


def test_a_run_of_blocks_is_written_under_its_own_name_with_its_mask(tmp_path):
    source = with_tokenizer(tmp_path, "hf/llama", 58)
    config = json.loads((source / "config.json").read_text()) | {"block_size": 8, "mask_token_id": 58}
    (source / "config.json").write_text(json.dumps(config))  # as earlier versions wrote it
    converted(source, tmp_path / "run", form="native")
    result = converted(tmp_path / "run", tmp_path / "back", check=16)
    found = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (found["model_type"], found["mask_token_id"]) == ("bd3lm_llama", 58) and result["max_difference"] == 0
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        assert json.loads((tmp_path / "back" / name).read_text())["mask_token"] == "<|mdm_mask|>"
    again = bd3lm_jax.load(tmp_path / "back")
    assert again.special == bd3lm_jax.load(source).special and again.config.block_size == 8
    converted(tmp_path / "back", tmp_path / "third")
    assert_same_files(tmp_path / "third", source)
    assert json.loads((tmp_path / "third" / "config.json").read_text())["model_type"] == "bd3lm_llama"


def test_the_card(tmp_path):
    source = with_tokenizer(tmp_path, "bd3lm_block4", 66)
    converted(source, tmp_path / "run", form="native")
    numbers = {"nll": 4.25, "nll_ci95": [4.0, 4.5], "ppl": 70.1, "ppl_ci95": [54.6, 90.0], "bits_per_byte": 1.5,
               "bits_per_byte_ci95": [1.25, 1.75], "estimator": "exact_count", "documents": 7}
    (tmp_path / "run" / "report.json").write_text(json.dumps({"step": 0, "valid": numbers}))
    converted(tmp_path / "run", tmp_path / "named", dtype="bfloat16")
    text = (tmp_path / "named" / "README.md").read_text()
    for part in ("# named", "blocks of 4 tokens", "as bfloat16", "the austen corpus", "mask token 66",
                 "| valid | 4.2500 | 4.0000 .. 4.5000 | 70.10 | 54.60 .. 90.00 | 1.5000 | 1.2500 .. 1.7500 | "
                 "exact_count | 7 |",
                 'bd3lm_jax.load("named")'):
        assert part in text, part
    assert "None were recorded" not in text
    assert "None were recorded" in _card_of(source, tmp_path / "plain")


def test_the_card_of_figures_that_are_missing(tmp_path):
    """One validation document has no interval; weights that are not finite have no figures at all."""
    converted(with_tokenizer(tmp_path, "bd3lm_block4", 66), tmp_path / "run", form="native")
    missing = {"nll_ci95": [None, None], "ppl_ci95": [None, None], "bits_per_byte_ci95": [None, None],
               "estimator": "exact_count", "documents": 1}
    figures = {"valid": missing | {"nll": 4.25, "ppl": 70.1, "bits_per_byte": 1.5},
               "test": missing | {"nll": None, "ppl": None, "bits_per_byte": None}}
    (tmp_path / "run" / "report.json").write_text(json.dumps({"step": 0, **figures}))
    text = _card_of(tmp_path / "run", tmp_path / "out")
    assert "| valid | 4.2500 | none | 70.10 | none | 1.5000 | none | exact_count | 1 |" in text
    assert "| test | - | none | - | none | - | none | exact_count | 1 |" in text


@pytest.mark.parametrize("step, ema, weights, known", [
    (0, 0.5, "ema", True), (0, 0.5, "params", False), (0, 0.0, "params", True), (7, 0.5, "ema", False),
])
def test_figures_are_those_of_the_weights(tmp_path, step, ema, weights, known):
    """A run whose checkpoint is of step 0 and whose report speaks of the average, where one is kept, of some step."""
    converted(with_tokenizer(tmp_path, "bd3lm_block4", 66), tmp_path / "run", form="native")
    rewrite_config(tmp_path / "run", {"optim": {"ema_decay": ema}})
    numbers = {"nll": 4.25, "nll_ci95": [4.0, 4.5], "ppl": 70.1, "ppl_ci95": [54.6, 90.0], "bits_per_byte": 1.5,
               "estimator": "exact_count", "documents": 7}
    (tmp_path / "run" / "report.json").write_text(json.dumps({"step": step, "valid": numbers}))
    text = _card_of(tmp_path / "run", tmp_path / "out", weights=weights)
    assert ("| valid | 4.2500 |" in text, "None were recorded with these weights" in text) == (known, not known)


@pytest.mark.parametrize("source, rank, name, said", [
    ("", 0, "", "\nWritten from the run `run`, trained for 3 updates on the austen corpus: rows of 256 tokens of the "
     "tokenizer `bpe:2048`"),
    ("/home/someone/models/gpt2/", 0, "gpt2", "\nAdapted from `gpt2`. Written"),
    ("weights/small.gguf", 4, "small.gguf", "\nAdapted from `small.gguf` by updates of rank 4 (LoRA), merged into its "
     "weights. Written"),
    ("/cache/hub/models--org--my--model/snapshots/0a1b", 0, "org/my--model", "`org/my--model`. Written"),
])
def test_the_card_names_what_was_adapted(source, rank, name, said):
    data = DataConfig(tokenizer=source, source="text", path="/home/someone/a.txt") if name else DataConfig()
    origin = Origin("run", data, 3, {}, base_name(source) if source else "", rank)
    text = card("named", hf.from_hf_config(GOLDEN / "bd3lm_block4"), 10, "float32", origin, True)
    assert said in text and "/home" not in text and "/cache" not in text
    assert f'\nbase_model: "{name}"\n---' in text if name else "base_model" not in text


def test_an_adapted_run_names_its_source(tmp_path):
    converted(with_tokenizer(tmp_path, "bd3lm_block4", 66), tmp_path / "run", form="native")
    rewrite_config(tmp_path / "run", {"train": {"init_from": str(tmp_path / "source")}})
    text = _card_of(tmp_path / "run", tmp_path / "out")
    assert "Adapted from `source`. Written from the run `run`" in text and str(tmp_path) not in text
    assert text.startswith("---\n") and 'base_model: "source"' in text.split("---")[1]


TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("apart", [False, True])
def test_a_chat_template_is_handed_back(tmp_path, apart):
    """In tokenizer_config.json or in a file of its own: out of a directory, into a run, and out of the run again."""
    source = with_tokenizer(tmp_path, "bd3lm_block4", 66)
    config = {"eos_token": "<|endoftext|>", "bos_token": "w1"} | ({} if apart else {"chat_template": TEMPLATE})
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "added_tokens.json").write_text('{"w3": 3}')
    if apart:
        (source / "chat_template.jinja").write_text(TEMPLATE)
    converted(source, tmp_path / "copy")
    for name in ("tokenizer_config.json", "added_tokens.json", *["chat_template.jinja"] * apart):
        assert (tmp_path / "copy" / name).read_bytes() == (source / name).read_bytes()
    converted(source, tmp_path / "run", form="native")
    converted(tmp_path / "run", tmp_path / "back")
    given = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    assert {key: given[key] for key in config} == config
    assert (tmp_path / "back" / "chat_template.jinja").exists() == apart
    assert not apart or (tmp_path / "back" / "chat_template.jinja").read_text() == TEMPLATE


def test_named_chat_templates_and_the_tokens_of_a_special_tokens_map_are_handed_back(tmp_path):
    """Out of a directory, into a run, and out of the run again."""
    pytest.importorskip("jinja2")
    source = with_tokenizer(tmp_path, "bd3lm_block4", 66)
    (source / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "w1"}, "cls_token": "w2"}))
    (source / "chat_template.jinja").write_text(TEMPLATE)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("{{ cls_token }}" + TEMPLATE)
    converted(source, tmp_path / "copy")
    converted(source, tmp_path / "run", form="native")
    converted(tmp_path / "run", tmp_path / "back")
    for name in ("source", "copy", "run", "back"):
        templates = [ChatTemplate(tmp_path / name, which) for which in ("", "rag")]
        assert [x.render([{"role": "user", "content": "a"}], [(1, False)])[0] for x in templates] == [
            "w1<user>a", "w2w1<user>a"], name


def _card_of(source, target, **changes):
    converted(source, target, **changes)
    return (target / "README.md").read_text()


@pytest.mark.parametrize("name, changes, message", [
    ("hf/llama", {"form": "native"}, "brings no tokenizer, and a run directory needs one: give --tokenizer"),
    ("hf/llama", {"form": "native", "dtype": "bfloat16"}, "a run directory keeps float32"),
    ("hf/llama", {"form": "native", "tokenizer": "bytes"}, "--tokenizer=bytes has 257 ids, more than the 59"),
    ("hf/llama", {"max_shard": "5"}, "'5' is no size"),
    ("hf/llama", {"form": "gguf"}, "format is 'gguf', expected one of hf, native"),
    ("hf/llama", {"dtype": "int8"}, "dtype is 'int8', expected one of float32, bfloat16, float16"),
])
def test_bad_requests(tmp_path, name, changes, message):
    with pytest.raises(UserError, match=message):
        converted(GOLDEN / name, tmp_path / "out", **changes)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
    with pytest.raises(UserError, match="exists and is never overwritten"):
        converted(GOLDEN / "ar", tmp_path)


@pytest.mark.parametrize("change, message", [
    ({"model": {"decoder_layers": 1}}, "has no model.decoder_layers=1"),
    ({"diffusion": {"kind": "uniform", "block_size": 4, "vocab_size": -1, "eps": 1e-3}}, "does not mask tokens"),
])
def test_what_the_layout_cannot_say(tmp_path, change, message):
    source = with_tokenizer(tmp_path, "bd3lm_time_conditioned", 66)
    converted(source, tmp_path / "run", form="native")
    rewrite_config(tmp_path / "run", change)
    with pytest.raises(UserError, match=message):
        converted(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.ci_slow
def test_another_rope_base(tmp_path):
    """As `configs/tiny.py` has it: the published code rotates by the frequencies in the file."""
    source = with_tokenizer(tmp_path, "bd3lm_block4", 66)
    converted(source, tmp_path / "run", form="native")
    rewrite_config(tmp_path / "run", {"model": {"rope_theta": 100.0}})
    converted(tmp_path / "run", tmp_path / "out")
    ids = np.random.default_rng(0).integers(0, 66, (1, 32))
    run, out, first = (bd3lm_jax.load(path) for path in (tmp_path / "run", tmp_path / "out", source))
    assert out.config.model == run.config.model and out.config.model.rope_theta == 100
    np.testing.assert_array_equal(out.logits(ids), run.logits(ids))
    assert np.abs(out.logits(ids) - first.logits(ids)).max() > 1e-3
    half = out.config.model.hidden_size // out.config.model.num_heads // 2
    np.testing.assert_allclose(load_file(tmp_path / "out" / "model.safetensors")["backbone.rotary_emb.inv_freq"],
                               100.0 ** (-np.arange(half) / half), rtol=1e-6)

"""GGUF files: written here as llama.cpp's converter lays them out, read as the checkpoint they came from."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from grids import some
from places import DATA, HF, ROOT
from safetensors.numpy import load_file
from toy_gguf import gguf, written

import bd3lm_jax
from bd3lm_jax.checkpoints.published.gguf import read_tokenizer
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data.chat_template import ChatTemplate
from bd3lm_jax.evaluation.convert import convert

WORDS = ["<|endoftext|>", "a", "b", "c", "Ġ", "ab", "Ġa", "1", "2", "Ġab", "12"]
MERGES = ["a b", "Ġ a", "Ġ ab", "1 2"]


def add_tokenizer(writer, model="gpt2", pre="smollm", end=0, left_out=()):
    parts = {"model": model, "pre": pre, "token_list": WORDS, "token_types": [3] + [1] * (len(WORDS) - 1),
             "token_merges": MERGES}
    for part in parts.keys() - set(left_out):
        getattr(writer, f"add_{part}" if part.startswith("token_") else f"add_tokenizer_{part}")(parts[part])
    if "end" not in left_out:
        writer.add_eos_token_id(end)


@pytest.mark.parametrize("others", [(), ("rag",)])
def test_its_chat_templates_are_read_and_handed_on(tmp_path, others):
    """By conversion to a directory, to a run, and out of the run; what lies beside the file says less."""
    pytest.importorskip("jinja2")
    text = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    named = [{"name": "default", "template": text}, *({"name": name, "template": name + text} for name in others)]

    def change(writer):
        add_tokenizer(writer)
        writer.add_bos_token_id(5)
        writer.add_chat_template(named if others else text)

    (tmp_path / "beside").mkdir()
    path = written(tmp_path / "beside" / "model.gguf", "llama", change)
    (path.parent / "tokenizer_config.json").write_text('{"bos_token": "c", "chat_template": "of another model"}')
    options = {"dtype": "float32", "check": 0, "max_shard": "5GB", "weights": "ema", "tokenizer": "", "length": 0,
               "allow_pickle": False}
    convert(path, tmp_path / "hf", form="hf", **options)
    convert(path, tmp_path / "run", form="native", **options)
    convert(tmp_path / "run", tmp_path / "back", form="hf", **options)
    for place in (path, *(tmp_path / name for name in ("hf", "run", "back"))):
        for name in ("", *others):
            found = ChatTemplate(place, name).render([{"role": "user", "content": "1"}], [(1, False)])
            assert found == [f"{name}ab<user>1<|endoftext|>"], (place, name)


@pytest.mark.parametrize("name", some(["llama", "qwen2"], 0))
def test_logits_of_the_checkpoint(tmp_path, name):
    lm, io = bd3lm_jax.load(written(tmp_path / "model.gguf", name)), np.load(HF / name / "io.npz")
    assert lm.tokenizer is None
    assert np.abs(lm.logits(io["input_ids"]) - io["logits"]).max() <= 5e-5 * np.abs(io["logits"]).max()


def test_quantised(tmp_path):
    """Eight bits a weight: as far off as their rounding, and not at all where nothing is quantised."""
    lm, io = bd3lm_jax.load(written(tmp_path / "model.gguf", "llama", quantised=True)), np.load(
        HF / "llama" / "io.npz")
    assert 1e-4 < np.abs(lm.logits(io["input_ids"]) - io["logits"]).max() < 0.05 * np.abs(io["logits"]).max()
    exact = load_file(HF / "llama" / "model.safetensors")["model.norm.weight"]
    np.testing.assert_array_equal(lm.params["head"]["norm"]["scale"], exact)


def test_the_tokenizer(tmp_path):
    lm = bd3lm_jax.load(written(tmp_path / "model.gguf", "llama", add_tokenizer))
    assert lm.tokenizer.encode("ab ab a12").tolist() == [5, 9, 6, 7, 8]  # digits are words of their own
    assert lm.tokenizer.decode([5, 9, 6, 7, 8]) == "ab ab a12"
    assert lm.special.end == 0 and lm.special.mask == len(WORDS)  # an id that no text has
    plain = bd3lm_jax.load(written(tmp_path / "plain.gguf", "llama", lambda w: add_tokenizer(w, pre="gpt-2")))
    assert plain.tokenizer.encode("12").tolist() == [10]


@pytest.mark.ci_slow
def test_a_command_takes_its_tokenizer(tmp_path):
    """In a process of its own, where nothing but the command has imported the reader of such files."""
    path = written(tmp_path / "model.gguf", "llama", add_tokenizer)
    (tmp_path / "valid.txt").write_text("ab ab a12\n")
    done = subprocess.run([sys.executable, "-m", "launch", "prepare", "--split=valid", "--config.data.source=text",
                           f"--config.data.tokenizer={path}", f"--config.data.path={tmp_path}",
                           f"--config.data.cache_dir={tmp_path / 'cache'}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = np.load(Path(json.loads(done.stdout.splitlines()[-1])["path"]["valid"]) / "tokens.npy")
    assert rows[0, :6].tolist() == [5, 9, 6, 7, 8, 0]


def test_a_tokenizer_of_another_kind_is_left_out(tmp_path, capsys):
    lm = bd3lm_jax.load(written(tmp_path / "model.gguf", "llama", lambda w: add_tokenizer(w, "llama")))
    assert lm.tokenizer is None and "a tokenizer of kind 'llama', 'smollm' is not read" in capsys.readouterr().err


CLASSES = DATA / "tokenizers" / "classes"


@pytest.mark.parametrize("pre, architecture, layout", [
    ("gpt-2", "llama", "gpt2"), ("qwen2", "qwen2", "qwen2"), ("default", "qwen2", "qwen2"),
    ("default", "llama", "gpt2"), ("llama-bpe", "llama", "llama3"), ("llama", "llama", "sentencepiece"),
    ("deepseek-r1-qwen", "qwen2", "qwen2")])
def test_ids_of_the_class_in_transformers(tmp_path, capsys, pre, architecture, layout):
    """Each pre-tokenizer splits words in its own way; tests/data/tokenizers/classes/make.py says where ids are from."""
    golden = json.loads((CLASSES / "ids.json").read_text())
    if layout == "sentencepiece":
        tokens, scores, kinds = golden["layouts"][layout]["pieces"]
    else:
        tokens = list(json.loads((CLASSES / "vocab.json").read_text()))
        tokens.append("<|endoftext|>")
        kinds = [1] * (len(tokens) - 1) + [3]

    def add(writer):
        writer.add_tokenizer_model("llama" if layout == "sentencepiece" else "gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_eos_token_id(len(tokens) - 1 if layout != "sentencepiece" else 2)
        if layout == "sentencepiece":
            writer.add_token_scores(scores)
        else:
            writer.add_tokenizer_pre(pre)
            writer.add_token_merges((CLASSES / "merges.txt").read_text().splitlines()[1:])

    path = written(tmp_path / "model.gguf", architecture, add)
    tokenizer = read_tokenizer(path)
    for text, expected in zip(golden["texts"], golden["layouts"][layout]["ids"], strict=True):
        if "<" not in text:  # of special tokens the file has only the end
            assert tokenizer.encode(text).tolist() == expected, text
    unnamed = (pre, architecture) == ("default", "llama")
    assert ("does not name how its tokenizer splits words" in capsys.readouterr().err) == unnamed


def test_the_mask_of_a_file(tmp_path):
    def add(writer, mask):
        add_tokenizer(writer)
        writer.add_mask_token_id(mask)

    assert read_tokenizer(written(tmp_path / "a.gguf", "llama", lambda writer: add(writer, 3))).mask_id == 3
    with pytest.raises(UserError, match="the mask token is 11 .tokenizer.ggml.mask_token_id., expected one of the 11"):
        read_tokenizer(written(tmp_path / "b.gguf", "llama", lambda writer: add(writer, 11)))


def test_bad_files(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"no such thing")
    with pytest.raises(UserError, match="cannot read .*model.gguf .*expected a GGUF file"):
        bd3lm_jax.load(path)
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="general.architecture is 'mamba', supported: llama, qwen2, qwen3"):
        bd3lm_jax.load(path)


@pytest.mark.parametrize("how, message", [
    ({"left_out": ["model.embed_tokens"]}, "tensor token_embd.weight is missing"),
    ({"left_out": ["model.norm"]}, "Tensors missing: model.norm.weight"),
    ({"change": lambda w: w.add_tensor("nodot", np.ones(4, np.float32))}, "tensor 'nodot' is not known: take the s"),
    ({"change": lambda w: w.add_tensor("blk.0.a.b.weight", np.ones(4, np.float32))}, "tensor 'blk.0.a.b.weight' is"),
    ({"change": lambda w: w.add_tensor("output.bias", np.ones(4, np.float32))}, "unexpected: lm_head.bias"),
    ({"change": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)}, "rope scaling 'yarn', supported: none"),
    ({"change": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)}, "llama.rope.scaling.factor is miss"),
    ({"change": lambda w: w.add_string("llama.attention.key_length", "8")}, "key_length is '8', expected int"),
    ({"change": lambda w: w.add_key_length(7)}, "head_dim is 7, expected an even number"),
    ({"change": lambda w: add_tokenizer(w, left_out=["token_list"])}, "key tokenizer.ggml.tokens is missing"),
    ({"change": lambda w: add_tokenizer(w, left_out=["token_merges"])}, "key tokenizer.ggml.merges is missing"),
    ({"change": lambda w: add_tokenizer(w, left_out=["end"])}, r"names no end token \(tokenizer.ggml.eos_token_id"),
    ({"change": lambda w: add_tokenizer(w, end=11)}, "the end token is 11 .* expected one of the 11 ids of"),
])
def test_what_is_wrong_in_a_file(tmp_path, how, message):
    with pytest.raises(UserError, match=message) as error:
        bd3lm_jax.load(written(tmp_path / "model.gguf", "llama", **how))
    assert str(tmp_path / "model.gguf") in str(error.value) or "expected an even" in message


def test_zero_heads(tmp_path):
    path = written(tmp_path / "model.gguf", "llama")
    key, content = b"llama.attention.head_count", bytearray(path.read_bytes())
    at = content.index(key) + len(key) + 4  # behind the type of the value
    content[at:at + 4] = bytes(4)
    path.write_bytes(content)
    with pytest.raises(UserError, match="head_count is 0, .* expected at least 1"):
        bd3lm_jax.load(path)


def test_truncated_files(tmp_path):
    """In the values of the last tensor, among the names of tensors, in the keys, in the magic; nothing at all."""
    path = written(tmp_path / "model.gguf", "llama", add_tokenizer)
    content = path.read_bytes()
    for size in (len(content) - 40, content.index(b"blk.1.attn_q") + 20, content.index(b"tokens") + 40, 100, 3, 0):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match="cannot read .*model.gguf .*: download it again; expected a GGUF file"):
            bd3lm_jax.load(path)


def llama3_factors(head_dim, theta, factor):
    """What Llama 3.1 divides the frequencies by: 1 for wavelengths under 2048, `factor` above 8192."""
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (8192 / wavelength - 1) / 3
    return np.select([wavelength < 2048, wavelength > 8192], [1, factor], 1 / ((1 - smooth) / factor + smooth))


@pytest.mark.ci_slow
def test_factors_of_llama_3(tmp_path):
    """The network is that of the config.json that says the same."""
    theta, factor, form = 3e5, 32.0, json.loads((HF / "llama" / "config.json").read_text())
    factors = llama3_factors(8, theta, factor).astype(np.float32)
    assert factors[0] == 1 and 1 < factors[2] < factor == factors[3]
    found = bd3lm_jax.load(written(tmp_path / "model.gguf", "llama", theta=theta,
                                   change=lambda w: w.add_tensor("rope_freqs.weight", factors)))
    form["rope_parameters"] = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0,
                               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    (tmp_path / "config.json").write_text(json.dumps(form))
    (tmp_path / "model.safetensors").write_bytes((HF / "llama" / "model.safetensors").read_bytes())
    same = bd3lm_jax.load(tmp_path)
    assert found.config.model.rope_scaling == same.config.model.rope_scaling == (32, 1, 4, 8192)
    ids = np.random.default_rng(0).integers(0, 59, size=(1, 90))
    np.testing.assert_array_equal(found.logits(ids), same.logits(ids))


@pytest.mark.parametrize("factors", [[1, 1, 2, 8], [0, 0, 0, 0], [np.nan] * 4, [1, 1, 8]])
def test_other_factors(tmp_path, factors):
    path = written(tmp_path / "model.gguf", "llama", change=lambda w: w.add_tensor(
        "rope_freqs.weight", np.array(factors, np.float32)))
    with pytest.raises(UserError, match="rope_freqs.weight is not the frequency scaling of Llama 3.1 to 3.3: take"):
        bd3lm_jax.load(path)

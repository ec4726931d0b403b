"""Published checkpoints with random damage: every tensor is read as it was, or one line says what is wrong."""

import importlib.util
import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import GOLDEN, HF
from toy_fuzz import damaged, damaged_bytes, fuzz, names, works_or_says_why, written

from bd3lm_jax.checkpoints import hf
from bd3lm_jax.checkpoints.published.tensors import INDEX_FILE, WEIGHTS_FILE, write_file
from bd3lm_jax.checkpoints.published.weights import open_directory
from bd3lm_jax.core.errors import UserError

OURS = {"kind": "masked", "block_size": 4, "schedule": "loglinear", "corruption": "bernoulli", "count_probs": [],
        "complement": False, "clip_low": 0.0, "clip_high": 1.0, "eps": 1e-3}  # as an objective is written beside them
CONFIGS = {name: json.loads((GOLDEN / name / "config.json").read_text())
           for name in ("bd3lm_block4", "sedd", *(f"hf/{path.name}" for path in sorted((HF).iterdir())))}
TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.c": np.ones(4, np.float16),
           "n": np.zeros((), np.int64)}
SIZES = st.one_of(st.integers(0, 300), st.sampled_from([2**31, 2**40, 2**63, 2**64 - 1]))


GGUF = {  # keys and values; tensors as (name, dimensions from the last one, type, offset)
    "keys": {"general.architecture": "llama", "general.alignment": 32, "llama.embedding_length": 4,
             "llama.feed_forward_length": 4, "llama.block_count": 1, "llama.attention.head_count": 2,
             "llama.attention.head_count_kv": 1, "llama.context_length": 16, "llama.rope.freq_base": 1e4,
             "llama.attention.layer_norm_rms_epsilon": 1e-5, "tokenizer.ggml.model": "gpt2",
             "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": ["<e>", "a", "b", "ab"],
             "tokenizer.ggml.token_type": [3, 1, 1, 1], "tokenizer.ggml.merges": ["a b"],
             "tokenizer.ggml.eos_token_id": 0},
    "tensors": [["token_embd.weight", [4, 4], 0, 0], ["output_norm.weight", [4], 0, 64],
                ["rope_freqs.weight", [1], 0, 96],
                *([f"blk.0.{name}.weight", size, 0, 128] for name, size in (
                    ("attn_norm", [4]), ("ffn_norm", [4]), ("attn_q", [4, 4]), ("attn_k", [4, 2]), ("attn_v", [4, 2]),
                    ("attn_output", [4, 4]), ("ffn_gate", [4, 4]), ("ffn_up", [4, 4]), ("ffn_down", [4, 4])))],
}
needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoint")


@pytest.fixture(scope="module")
def whole(directory):
    """Header and data of a small safetensors file."""
    write_file(directory / WEIGHTS_FILE, TENSORS)
    data = (directory / WEIGHTS_FILE).read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8:8 + size]), data[8 + size:]


def read_all(directory):
    """The tensors of a directory; each is what its entry says."""
    found = {}
    for name, stored in open_directory(directory, False)[1].items():
        found[name] = stored.read()
        assert found[name].shape == stored.shape and found[name].dtype == stored.dtype
    return found


def file_of(header, data, size=None):
    text = json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


@fuzz(120)
@given(data=st.data())
def test_safetensors_headers(directory, whole, data):
    header, content = whole
    written(directory / WEIGHTS_FILE, file_of(data.draw(damaged(header)), content))
    works_or_says_why(lambda: read_all(directory))


@fuzz(60)
@given(data=st.data())
def test_safetensors_offsets_and_shapes(directory, whole, data):
    """Overlapping, negative, beyond the end, huge; shapes that do not fit."""
    header, content = json.loads(json.dumps(whole[0])), whole[1]
    numbers = st.one_of(st.integers(-2, 60), st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, 2**70]))
    entry = header[data.draw(st.sampled_from(sorted(TENSORS)))]
    entry["data_offsets"] = data.draw(st.lists(numbers, min_size=1, max_size=3))
    entry["shape"] = data.draw(st.one_of(st.just(entry["shape"]), st.lists(numbers, max_size=3)))
    written(directory / WEIGHTS_FILE, file_of(header, content))
    works_or_says_why(lambda: read_all(directory))


@fuzz(60)
@given(size=SIZES, rest=st.binary(max_size=60))
def test_safetensors_sizes(directory, whole, size, rest):
    written(directory / WEIGHTS_FILE, file_of(whole[0], whole[1] + rest, size))
    works_or_says_why(lambda: read_all(directory))
    written(directory / WEIGHTS_FILE, size.to_bytes(8, "little") + rest)
    works_or_says_why(lambda: read_all(directory))


@fuzz(100)
@given(data=st.data())
def test_safetensors_bytes(directory, whole, data):
    written(directory / WEIGHTS_FILE, data.draw(damaged_bytes(file_of(*whole))))
    works_or_says_why(lambda: read_all(directory))


@fuzz(80)
@given(data=st.data())
def test_index_files(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("index")
    write_file(directory / "one.safetensors", {"a": TENSORS["a"]})
    write_file(directory / "two.safetensors", {"b": TENSORS["a"]})
    index = {"metadata": {"total_size": 48}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    content = data.draw(st.one_of(damaged(index), damaged_bytes(json.dumps(index).encode()), names.map(
        lambda name: index | {"weight_map": {"a": name}})))
    written(directory / INDEX_FILE, content)
    found = works_or_says_why(lambda: read_all(directory))
    if isinstance(found, dict):
        assert set(found) <= {"a", "b"}


@fuzz(250)
@given(data=st.data())
def test_configs(directory, data):
    name = data.draw(st.sampled_from(sorted(CONFIGS)))
    source = json.dumps(CONFIGS[name]).encode()
    content = data.draw(st.one_of(damaged(CONFIGS[name]), damaged(CONFIGS[name]), damaged_bytes(source)))
    written(directory / "config.json", content)
    weights = (GOLDEN / name / WEIGHTS_FILE).read_bytes()
    (directory / WEIGHTS_FILE).write_bytes(weights)
    works_or_says_why(lambda: hf.from_hf_config(directory))
    works_or_says_why(lambda: hf.read_config(directory / "config.json"))
    works_or_says_why(lambda: hf.is_published(directory))


@fuzz(80)
@given(data=st.data())
def test_objectives_and_layouts(directory, data):
    """All the way to parameters, where the config still wants the tensors that are there."""
    name = data.draw(st.sampled_from(sorted(CONFIGS)))
    ours = {"diffusion": OURS} if data.draw(st.booleans()) else {}
    written(directory / "config.json", data.draw(damaged(CONFIGS[name] | ours)))
    (directory / WEIGHTS_FILE).write_bytes((GOLDEN / name / WEIGHTS_FILE).read_bytes())
    works_or_says_why(lambda: hf.read_model(directory))


def test_nested_too_deep(directory):
    for name, read in (("config.json", hf.is_published), ("config.json", lambda path: hf.read_config(
            path / "config.json")), (INDEX_FILE, read_all)):
        (directory / WEIGHTS_FILE).unlink(missing_ok=True)
        written(directory / name, b"[" * 100_000)
        assert isinstance(works_or_says_why(lambda: read(directory)), UserError)


def gguf_text(x):
    content = str(x).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(content)) + content


def gguf_value(x):
    """Type and value as GGUF has them: uint32, float32, bool, string, array."""
    if isinstance(x, bool):
        return 7, struct.pack("<?", x)
    if isinstance(x, int):
        return 4, struct.pack("<I", x % 2**32)
    if isinstance(x, float):
        with np.errstate(over="ignore"):
            return 6, np.array(x, "<f4").tobytes()
    if isinstance(x, list):
        items = [gguf_value(item) for item in x]
        return 9, struct.pack("<IQ", items[0][0] if items else 4, len(x)) + b"".join(item for _, item in items)
    return 8, gguf_text(x)


def gguf_of(content):
    """The bytes of a GGUF file, of whatever has the form of GGUF; numbers are cut to what their places hold."""
    keys, tensors = ([*part] for part in (content.get("keys") or (), content.get("tensors") or ()))
    header = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(keys))]
    for key in keys:
        kind, value = gguf_value(content["keys"][key])
        header.append(gguf_text(key) + struct.pack("<I", kind) + value)
    for tensor in tensors:
        name, sizes, kind, offset = (*tensor, "", [], 0, 0)[:4] if isinstance(tensor, list) else (tensor, [], 0, 0)
        sizes = [size for size in sizes if isinstance(size, int)] if isinstance(sizes, list) else []
        kind, offset = (x if isinstance(x, int) else 0 for x in (kind, offset))
        header.append(gguf_text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *(size % 2**64 for size in sizes),
                                                    kind % 2**32, offset % 2**64))
    header = b"".join(header)
    return header + bytes(-len(header) % 32) + np.ones(64, "<f4").tobytes()


def read_gguf(path):
    described, params = hf.read_model(path)
    return params, hf.read_tokenizer(path, described)


@needs_gguf
def test_the_undamaged_gguf_file(directory):
    written(directory / "model.gguf", gguf_of(GGUF))
    params, tokenizer = read_gguf(directory / "model.gguf")
    assert params["blocks"]["q"]["kernel"].shape == (1, 4, 2, 2) and tokenizer.encode("ab").tolist() == [3]


@needs_gguf
@fuzz(100)
@given(data=st.data())
def test_gguf_headers(directory, data):
    content = data.draw(damaged(GGUF).filter(lambda x: isinstance(x.get("keys") or {}, dict)
                                             and isinstance(x.get("tensors") or [], list)))
    written(directory / "model.gguf", gguf_of(content))
    works_or_says_why(lambda: read_gguf(directory / "model.gguf"))


@needs_gguf
@fuzz(200)
@given(data=st.data())
def test_gguf_bytes(directory, data):
    whole = gguf_of(GGUF)
    content = data.draw(st.one_of(damaged_bytes(whole), st.integers(0, len(whole)).map(lambda size: whole[:size])))
    written(directory / "model.gguf", content)
    works_or_says_why(lambda: read_gguf(directory / "model.gguf"))

"""What is read from files: several with an index, pickles, averages, dtypes, meshes; a clear error for each damage."""

import json
import re
import shutil
import sys
import types

import jax
import ml_dtypes
import numpy as np
import pytest
from places import GOLDEN, HF
from safetensors.numpy import load_file, save_file
from toy_runs import run_python

import bd3lm_jax
from bd3lm_jax.checkpoints import hf
from bd3lm_jax.checkpoints.published.pickles import BUFFERS
from bd3lm_jax.core.errors import UserError

SOURCE = GOLDEN / "bd3lm_block4"
NORM = "backbone.output_layer.norm_final.weight"


def tensors_of(path=SOURCE):
    return load_file(path / "model.safetensors")


def config_in(tmp_path, name="bd3lm_block4"):
    shutil.copy(GOLDEN / name / "config.json", tmp_path)
    return tmp_path


def split(tmp_path, change=lambda files, index: None):
    """The source in three files with an index; `change(files, index)` edits both before they are written."""
    config_in(tmp_path)
    tensors = tensors_of()
    files = {f"part{k}.safetensors": {name: x for i, (name, x) in enumerate(tensors.items()) if i % 3 == k}
             for k in range(3)}
    index = {name: file for file, part in files.items() for name in part}
    change(files, index)
    for file, part in files.items():
        save_file(part, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return tmp_path


def assert_same(params, others):
    jax.tree.map(np.testing.assert_array_equal, params, others)


def test_an_index_of_files(tmp_path):
    assert_same(hf.read_model(split(tmp_path))[1], hf.read_model(SOURCE)[1])


def twice(files, index):
    files["part2.safetensors"][NORM] = files[index[NORM]][NORM]
    index[NORM] = index[NORM]


def lost(files, index):
    del files[index[NORM]][NORM]


@pytest.mark.parametrize("change, message", [
    (lambda files, index: files.pop("part1.safetensors"), "names part1.safetensors, which is not there: download"),
    (twice, f"tensor {NORM} is in two files, part[01].safetensors and part2.safetensors"),
    (lost, rf"names tensors that are not in their files: {NORM} \(part"),
    (lambda files, index: files["part1.safetensors"].update(other=np.zeros(1)), "unexpected: other$"),
])
def test_wrong_indices(tmp_path, change, message):
    with pytest.raises(UserError, match=message) as error:
        hf.read_model(split(tmp_path, change))
    assert "\n" not in str(error.value)


def test_unreadable_indices(tmp_path):
    index = split(tmp_path) / "model.safetensors.index.json"
    for content in ("{", "[]", "{}"):
        index.write_text(content)
        with pytest.raises(UserError, match="cannot read .*index.json .*expected a weight_map"):
            hf.read_model(tmp_path)


def test_a_truncated_part(tmp_path):
    part = split(tmp_path) / "part1.safetensors"
    part.write_bytes(part.read_bytes()[:-8])
    with pytest.raises(UserError, match="cannot read .*part1.safetensors"):
        hf.read_model(tmp_path)


def test_parameters_in_bfloat16_are_the_rounded_ones():
    exact, rounded = (hf.read_model(SOURCE, dtype=dtype)[1] for dtype in ("float32", "bfloat16"))
    assert_same(jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), exact), rounded)
    lm = bd3lm_jax.load(SOURCE, dtype="bfloat16")
    io = np.load(SOURCE / "io.npz")
    difference = np.abs(lm.logits(io["xt"], io["x0"]) - io["logits"]).max()
    assert 1e-4 < difference < 0.05 * np.abs(io["logits"]).max()
    with pytest.raises(UserError, match="dtype is 'int8', expected one of float32, bfloat16"):
        hf.read_model(SOURCE, dtype="int8")


def stored_as(tmp_path, dtype, width):
    """The final norm with another dtype in the header: the safetensors package writes only NumPy's."""
    raw = (SOURCE / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8:8 + size]), raw[8 + size:]
    count, offset = header[NORM]["shape"][0] * width, 0
    for name, entry in header.items():
        start, stop = entry.get("data_offsets", (0, 0))
        if name == NORM:
            data = data[:start] + data[start:start + count] + data[stop:]
            entry |= {"dtype": dtype, "data_offsets": [start, start + count]}
            cut, offset = start, count - (stop - start)
    for name, entry in header.items():
        if name != NORM and entry.get("data_offsets", (0, 0))[0] > cut:
            entry["data_offsets"] = [at + offset for at in entry["data_offsets"]]
    text = json.dumps(header).encode()
    (config_in(tmp_path) / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("dtype, width, message", [
    ("F8_E4M3", 1, rf"tensor {NORM} \(F8_E4M3\) has a dtype that is not supported \(quantised weights\?\), "
     "expected one of F64, F32"),
    ("I32", 4, rf"tensors that are no floating-point numbers: {NORM} \(int32\)"),
])
def test_other_dtypes_are_refused(tmp_path, dtype, width, message):
    stored_as(tmp_path, dtype, width)
    with pytest.raises(UserError, match=message):
        hf.read_model(tmp_path)


def test_averages_are_taken_unless_asked_otherwise(tmp_path):
    """Every parameter has one; the frequencies of RoPE and the limits of the clip are no parameters."""
    tensors = tensors_of()
    averaged = {"ema." + name: x + 1 for name, x in tensors.items() if not name.endswith(BUFFERS)}
    save_file(tensors | averaged, config_in(tmp_path) / "model.safetensors")
    plain = hf.read_model(SOURCE)[1]
    ema = hf.read_model(tmp_path)[1]
    np.testing.assert_array_equal(ema["head"]["norm"]["scale"], plain["head"]["norm"]["scale"] + 1)
    ids = slice(hf.from_hf_config(SOURCE).model.vocab_size)  # padding stays 0
    np.testing.assert_array_equal(ema["embed"]["embedding"][ids], plain["embed"]["embedding"][ids] + 1)
    assert_same(hf.read_model(tmp_path, weights="params")[1], plain)
    save_file(tensors | {"ema.other": np.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="averaged tensors without the plain ones: ema.other"):
        hf.read_model(tmp_path)


def test_averages_of_a_part_of_the_network_are_refused(tmp_path):
    tensors = tensors_of()
    averaged = {"ema." + name: x + 1 for name, x in tensors.items() if not name.endswith(BUFFERS)}
    save_file(tensors | {"ema." + NORM: averaged["ema." + NORM]}, config_in(tmp_path) / "model.safetensors")
    names = sorted(name for name in tensors if name != NORM and not name.endswith(BUFFERS))
    said = f"missing for {', '.join(names[:6])} and {len(names) - 6} more: take the others, weights='params'"
    with pytest.raises(UserError, match=re.escape(said)):
        hf.read_model(tmp_path)
    del averaged["ema." + NORM]
    save_file(tensors | averaged, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"missing for {re.escape(NORM)}: take"):
        hf.read_model(tmp_path)
    assert_same(hf.read_model(tmp_path, weights="params")[1], hf.read_model(SOURCE)[1])


class FakeTensor:
    """What `torch.load` gives for an array."""

    dtype = "torch.float32"

    def __init__(self, x):
        self.x, self.shape = x, x.shape

    def detach(self):
        return self

    def numpy(self):
        return self.x


def pickled(tmp_path, monkeypatch, content, suffix=".ckpt"):
    """A directory with a pickle, and a stand-in for torch that finds `content` in it."""
    (config_in(tmp_path) / f"model{suffix}").write_bytes(b"pickle")

    def load(path, map_location, weights_only):
        assert weights_only is True
        if isinstance(content, Exception):
            raise content
        return content
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load))
    return tmp_path


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".pth"])
def test_pickles_are_refused(tmp_path, suffix):
    (config_in(tmp_path) / f"model{suffix}").write_bytes(b"pickle")
    with pytest.raises(UserError, match=f"model{suffix} is pickled, and reading a pickle can run any program"):
        hf.read_model(tmp_path)


def test_without_torch_no_pickle(tmp_path, monkeypatch):
    (config_in(tmp_path) / "model.bin").write_bytes(b"pickle")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="needs torch: pip install torch"):
        hf.read_model(tmp_path, allow_pickle=True)


def test_pickles_of_tensors(tmp_path, monkeypatch):
    content = {name: FakeTensor(x) for name, x in tensors_of().items()}
    directory = pickled(tmp_path, monkeypatch, content, ".bin")
    assert_same(hf.read_model(directory, allow_pickle=True)[1], hf.read_model(SOURCE)[1])


def test_training_checkpoints_bring_averages_in_the_order_of_the_parameters(tmp_path, monkeypatch):
    tensors = tensors_of()
    buffers = ("backbone.rotary_emb.inv_freq", "sampling_eps_min", "sampling_eps_max")
    shadow = [FakeTensor(x * 2) for name, x in tensors.items() if name not in buffers]
    content = {"state_dict": {"_orig_mod." + name: FakeTensor(x) for name, x in tensors.items()}, "epoch": 3,
               "ema": {"decay": 0.9999, "num_updates": 5, "shadow_params": shadow}}
    directory = pickled(tmp_path, monkeypatch, content)
    plain = hf.read_model(SOURCE)[1]
    assert_same(hf.read_model(directory, allow_pickle=True)[1], jax.tree.map(lambda x: 2 * x, plain))
    assert_same(hf.read_model(directory, weights="params", allow_pickle=True)[1], plain)
    content["ema"]["shadow_params"] = shadow[1:]
    with pytest.raises(UserError, match="its average has 29 tensors that are not those of the 30 parameters"):
        hf.read_model(directory, allow_pickle=True)


@pytest.mark.parametrize("weights, beside", [
    (("pytorch_model.bin",), ("training_args.bin", "optimizer.pt", "rng_state.pth", "pytorch_model.fp16.bin")),
    (("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"), ("training_args.bin", "last.ckpt")),
    (("last.ckpt",), ("optimizer.pt", "training_args.bin")),
    (("consolidated.00.pth", "consolidated.01.pth"), ()),
])
def test_pickles_beside_the_weights_are_not_opened(tmp_path, monkeypatch, weights, beside):
    parts = list(tensors_of().items())
    content = {name: {key: FakeTensor(x) for key, x in parts[i::len(weights)]} for i, name in enumerate(weights)}
    for name in (*weights, *beside):
        (config_in(tmp_path) / name).write_bytes(b"pickle")
    load = types.SimpleNamespace(load=lambda path, map_location, weights_only: content[path.name])
    monkeypatch.setitem(sys.modules, "torch", load)
    assert_same(hf.read_model(tmp_path, allow_pickle=True)[1], hf.read_model(SOURCE)[1])


class Arguments:
    """What a trainer pickles beside the weights."""


def test_pickles_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(x.copy()) for name, x in tensors_of().items()}
    torch.save(tensors, config_in(tmp_path) / "pytorch_model.bin")
    torch.save(Arguments(), tmp_path / "training_args.bin")
    assert_same(hf.read_model(tmp_path, allow_pickle=True)[1], hf.read_model(SOURCE)[1])
    torch.save(tensors | {NORM: tensors[NORM].bfloat16()}, tmp_path / "pytorch_model.bin")
    rounded = hf.read_model(tmp_path, allow_pickle=True)[1]["head"]["norm"]["scale"]
    np.testing.assert_array_equal(rounded, tensors_of()[NORM].astype(ml_dtypes.bfloat16).astype(np.float32))
    torch.save(tensors | {"arguments": Arguments()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"cannot read .*pytorch_model.bin \(UnpicklingError: Weights only load failed"):
        hf.read_model(tmp_path, allow_pickle=True)


@pytest.mark.parametrize("content, message", [
    ([], "holds a list, expected a dict of tensors by name"),
    (RuntimeError("Weights only load failed\nlong story"), r"\(RuntimeError: Weights only load failed\): damaged, or"),
])
def test_other_pickles(tmp_path, monkeypatch, content, message):
    with pytest.raises(UserError, match=message):
        hf.read_model(pickled(tmp_path, monkeypatch, content), allow_pickle=True)


@pytest.mark.ci_slow
def test_a_mesh_holds_the_same_numbers_in_parts():
    result = run_python("""
        import sys
        import jax, numpy as np
        from bd3lm_jax import models
        from bd3lm_jax.checkpoints import hf
        from bd3lm_jax.parallel import sharding
        from bd3lm_jax.config import MeshConfig
        mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
        for path in sys.argv[1:]:
            (spec, whole), parts = hf.read_model(path)[:2], hf.read_model(path, mesh=mesh)[1]
            jax.tree.map(np.testing.assert_array_equal, whole, parts)
            expected = sharding.param_shardings(whole, mesh, models.sharding_rules(spec.model))
            jax.tree.map(lambda x, y: np.testing.assert_equal(x.sharding, y), parts, expected)
            table = parts["embed"]["embedding"]
            assert {s.data.size for s in table.addressable_shards} == {table.size // 4}
        """, SOURCE, HF / "llama", devices=4)
    assert result.returncode == 0, result.stderr


def test_nothing_but_the_parts_is_read(monkeypatch):
    """A device's part of a stack of layers needs the tensors of these layers alone."""
    from bd3lm_jax.checkpoints.published.bd3lm import layout
    from bd3lm_jax.checkpoints.published.read import _place
    from bd3lm_jax.checkpoints.published.tensors import open_file

    described, params = hf.read_model(SOURCE)
    tensors, seen = open_file(SOURCE / "model.safetensors"), []
    watched = {name: x._replace(read=lambda x=x, name=name: seen.append(name) or x.read())
               for name, x in tensors.items()}
    monkeypatch.setattr(jax, "make_array_from_callback", lambda shape, sharding, part: part(
        (slice(1, 2), *[slice(0, n) for n in shape[1:-1]], slice(0, 3))))
    leaf = layout(described.model)["blocks.mlp_in.kernel"]
    part = _place(leaf, watched, np.dtype(np.float32), object())
    np.testing.assert_array_equal(part, params["blocks"]["mlp_in"]["kernel"][1:2, :, :3])
    assert seen == ["backbone.blocks.1.mlp.0.weight"]

"""GGUF files as they lie about: in parts, in a directory, in upper case, with keys that nobody reads."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from toy_gguf import gguf, written

from bd3lm_jax.checkpoints import hf
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.evaluation.convert import convert


def in_parts(directory: Path, tmp_path: Path, number: int = 3) -> list[Path]:
    """A file taken apart as llama.cpp's gguf-split does it: all keys in the first part, a share of tensors in each."""
    written(tmp_path / "whole.gguf", "llama")
    reader, paths = gguf.GGUFReader(tmp_path / "whole.gguf"), []
    for part in range(number):
        path = directory / f"llama-{part + 1:05}-of-{number:05}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for key, field in reader.fields.items() if part == 0 else ():
            if not key.startswith(("GGUF.", "general.architecture")):
                writer.add_key_value(key, field.contents(), field.types[0])
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", number)
        for tensor in reader.tensors[part::number]:
            writer.add_tensor(tensor.name, np.asarray(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths


def test_all_parts_are_read_given_any_or_their_directory(tmp_path):
    (tmp_path / "model").mkdir()
    parts = in_parts(tmp_path / "model", tmp_path)
    plain = hf.read_model(tmp_path / "whole.gguf")
    assert hf.local(tmp_path / "model") == str(parts[0])
    for path in (parts[0], parts[2]):
        described, params = hf.read_model(path)
        assert described == plain[0]
        np.testing.assert_array_equal(params["blocks"]["down"]["kernel"], plain[1]["blocks"]["down"]["kernel"])
    lost = tmp_path / "lost.gguf"
    shutil.copy(parts[0], lost)
    with pytest.raises(UserError, match="lost.gguf is one of 3 parts and has lost its name"):
        hf.read_model(lost)
    parts[1].unlink()
    with pytest.raises(UserError, match="is one of 3 parts, and llama-00002-of-00003.gguf is not there"):
        hf.read_model(parts[0])


def test_a_directory_with_a_file_in_upper_case(tmp_path):
    (tmp_path / "model").mkdir()
    written(tmp_path / "model" / "LLAMA.GGUF", "llama")
    assert hf.is_published(tmp_path / "model" / "LLAMA.GGUF")
    assert hf.local(tmp_path / "model") == str(tmp_path / "model" / "LLAMA.GGUF")
    assert hf.read_model(hf.local(tmp_path / "model"))[0].length == 96
    shutil.copy(tmp_path / "model" / "LLAMA.GGUF", tmp_path / "model" / "b.gguf")
    with pytest.raises(UserError, match="several GGUF files .LLAMA.GGUF, b.gguf.: give the path of one"):
        hf.local(tmp_path / "model")


@pytest.mark.parametrize("change, message", [
    (lambda writer: writer.add_float32("llama.attn_logit_softcapping", 50.0), "llama.attn_logit_softcapping is 50.0"),
    (lambda writer: writer.add_uint32("llama.expert_count", 8), "llama.expert_count is 8"),
    (lambda writer: writer.add_uint32("llama.attention.sliding_window", 32), "llama.attention.sliding_window is 32"),
    (lambda writer: writer.add_uint32("llama.rope.dimension_count", 4), "llama.rope.dimension_count is 4, expected 8"),
])
def test_keys_that_change_the_computation_are_refused(change, message, tmp_path):
    written(tmp_path / "model.gguf", "llama", change)
    with pytest.raises(UserError, match=message):
        hf.from_hf_config(tmp_path / "model.gguf")


def test_neutral_keys_are_passed_over(tmp_path):
    written(tmp_path / "model.gguf", "llama", lambda writer: writer.add_uint32("llama.expert_count", 0))
    assert hf.from_hf_config(tmp_path / "model.gguf").length == 96


def test_gguf_is_not_written(tmp_path):
    with pytest.raises(UserError, match="x.gguf: GGUF files are read and not written: give a directory"):
        convert("anything", tmp_path / "x.gguf", form="hf", dtype="float32", check=0, max_shard="5GB", weights="ema",
                tokenizer="", length=0, allow_pickle=False)
    assert not (tmp_path / "x.gguf").exists()

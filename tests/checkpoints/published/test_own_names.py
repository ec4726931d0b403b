"""What a network that became a block diffusion model is called when it is given away, and its mask token."""

import json

import jax
import numpy as np
import pytest
import tokenizers
from places import HF

from bd3lm_jax.checkpoints import hf
from bd3lm_jax.checkpoints.published import write
from bd3lm_jax.data.tokenizers import tokenizer_of, train_bpe
from bd3lm_jax.diffusion import AR, Masked

FAMILIES = {  # directory -> model_type and architecture of a network of blocks, and whether it is causal as published
    "llama": ("bd3lm_llama", "LlamaForBlockDiffusion", True),
    "qwen2": ("bd3lm_qwen2", "Qwen2ForBlockDiffusion", True),
    "gpt2": ("bd3lm_gpt2", "GPT2ForBlockDiffusion", True),
    "dream": ("bd3lm_qwen2", "Qwen2ForBlockDiffusion", False),
    "llada": ("bd3lm_llada", "LLaDAForBlockDiffusion", False),
    "llada2_moe": ("bd3lm_llada2_moe", "LLaDA2MoeForBlockDiffusion", False),
    "bert": ("bd3lm_bert", "BertForBlockDiffusion", False),
    "roberta": ("bd3lm_roberta", "RobertaForBlockDiffusion", False),
    "modernbert": ("bd3lm_modernbert", "ModernBertForBlockDiffusion", False),
}


def written(target, described, params, model_type=None):
    hf.write_model(target, described, params, dtype="float32", max_shard=10**9, model_type=model_type, files={})
    return json.loads((target / "config.json").read_text())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_of_blocks_has_a_name_of_its_own_and_is_read_back(name, tmp_path):
    kind, architecture, causal = FAMILIES[name]
    described, params = hf.read_model(HF / name)
    form = json.loads((HF / name / "config.json").read_text())["model_type"]
    config = written(tmp_path / "as_published", described, params, form)
    assert config["model_type"] == form
    blocks = described._replace(objective=Masked.uniform_counts(8), mask_id=58)
    config = written(tmp_path / "blocks", blocks, params, "llada" if name == "llada" else None)
    assert (config["model_type"], config["architectures"]) == (kind, [architecture])
    again, read = hf.read_model(tmp_path / "blocks")
    assert again == blocks and hf.from_hf_config(tmp_path / "blocks") == blocks
    jax.tree.map(np.testing.assert_array_equal, read, params)
    old = config | {"model_type": kind.removeprefix("bd3lm_")}  # as earlier versions wrote it
    (tmp_path / "blocks" / "config.json").write_text(json.dumps(old))
    assert hf.from_hf_config(tmp_path / "blocks") == blocks


def test_whole_rows_of_a_causal_architecture_are_not_what_it_computes_elsewhere(tmp_path):
    described, params = hf.read_model(HF / "llama")
    rows = described._replace(objective=Masked.uniform_counts(described.length), mask_id=58)
    assert written(tmp_path / "rows", rows, params)["model_type"] == "bd3lm_llama"
    begins = described._replace(objective=AR(bos=True))
    assert written(tmp_path / "begins", begins, params)["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("gap", [0, 3])
def test_the_mask_is_a_token_in_all_files(gap, tmp_path):
    tokenizer = train_bpe("bpe:270", ["the cat sat on the mat, and the dog sat under the tree"] * 9)
    tokenizer = tokenizer.with_mask(270 + gap)
    files = write.tokenizer_files(tokenizer, masks=True)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    library = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    names = [json.loads(files[name])["mask_token"] for name in ("tokenizer_config.json", "special_tokens_map.json")]
    assert names == ["<|mdm_mask|>"] * 2 and library.token_to_id(names[0]) == 270 + gap
    assert library.encode("the<|mdm_mask|>").ids[-1] == 270 + gap
    read = tokenizer_of(tmp_path)
    assert (read.mask_id, read.end_id, read.vocab_size) == (270 + gap, tokenizer.end_id, 271 + gap)
    for text in ("the cat", "under <|mdm_mask|> it"):  # a text that spells it is text
        np.testing.assert_array_equal(read.encode(text), tokenizer.encode(text))
        assert read.decode(tokenizer.encode(text)) == text
    assert "mask_token" not in json.loads(write.tokenizer_files(tokenizer, masks=False)["tokenizer_config.json"])

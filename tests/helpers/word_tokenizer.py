"""A Hugging Face tokenizer.json of a few words, for published checkpoints with a small vocabulary."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

END = "<|endoftext|>"


def write_tokenizer(directory: Path, size: int, *special: str) -> None:
    """Ids 0.. are the words w0, w1, ..., the last ones the special tokens and, with id size - 1, the end."""
    words = [*(f"w{i}" for i in range(size - len(special) - 1)), *special, END]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))

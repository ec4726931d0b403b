"""Parts of texts as tokens and back, where a tokenizer treats the beginning of a text in its own way.

Tokenizers of the SentencePiece kind write a space before the first word and take it away when they decode: a part of a
text by itself is not what it is behind other text.
"""

import os

import numpy as np


def decode_continuation(tokenizer, before, new) -> str:
    """What the tokens `new` add to the text of the tokens `before` them: both are decoded, and that text is cut off.

    Where the new tokens complete a character, all of it is new.
    """
    before, new = (np.asarray(ids, np.int64).reshape(-1) for ids in (before, new))
    old, whole = tokenizer.decode(before), tokenizer.decode(np.concatenate([before, new]))
    return whole[len(os.path.commonprefix([old, whole])):]


def num_stable_tokens(tokenizer, ids) -> int:
    """How many of the tokens have a text that no later token changes: not the last single bytes, which may be parts of
    one character."""
    ids, single = np.asarray(ids), list(getattr(tokenizer, "byte_ids", ()))
    whole = np.flatnonzero(~np.isin(ids, single))
    return int(whole[-1]) + 1 if len(whole) else 0


def encode_continuation(tokenizer, text: str, special: bool = False) -> np.ndarray:
    """Ids of a text that follows other text, int32 [n]; special: names of special tokens in it are these tokens."""
    encode = tokenizer.encode_special if special else tokenizer.encode
    if not text or not getattr(tokenizer, "adds_space_prefix", False):
        return encode(text)
    for other in ("\n", ".", "a"):
        ids, whole = tokenizer.encode(other), encode(other + text)
        begins = len(ids) and ids.tolist() == whole[:len(ids)].tolist()
        # special tokens have no text
        if begins and (special or decode_continuation(tokenizer, ids, whole[len(ids):]) == text):
            return whole[len(ids):]
    return encode(text)

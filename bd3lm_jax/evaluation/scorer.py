"""Tokens of a text and their exact likelihood under a causal model: what scores generated texts."""

from collections.abc import Sequence

import numpy as np

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.likelihood import estimators
from bd3lm_jax.lm import LM

LINES = ("austen", "text")  # corpora with a document a line: a newline in a text is the end of a document
BATCH, BUCKET = 16, 64  # windows a pass, and the multiple of tokens they are padded to: few shapes compile


class Words:
    """What stands in for the tokens of a scorer without one: words between blanks, numbered as they come."""

    unit, first, window, stride, separator = "words", 0, None, None, ()

    def __init__(self):
        self._numbers = {}

    def encode(self, text: str) -> np.ndarray:
        return np.array([self._numbers.setdefault(word, len(self._numbers)) for word in text.split()], np.int64)

    def nats(self, texts: Sequence[np.ndarray]) -> None:
        del texts


class Scorer:
    """Exact likelihood of texts under a causal model, in its own tokens.

    window: tokens the model sees, its context. Longer texts: every `stride` tokens a window of which only the last
    `stride` tokens are scored (all of the first). first: tokens of a text that are not scored, 1 for an autoregressive
    model without beginning token, else 0.
    """

    unit = "tokens"

    def __init__(self, lm: LM, path: str, stride: int):
        """stride: 0 for half a window. Raises UserError if the model has no tokenizer, gives a bound only, or the
        stride does not go with its window."""
        lm = lm.for_estimator("nll")
        if lm.tokenizer is None:
            raise UserError(f"scorer {path} has no tokenizer, which texts need: put its tokenizer.json there")
        if not estimators.is_exact(lm.config):
            raise UserError(f"scorer {path} gives only a bound on the likelihood (block size {lm.config.block_size}), "
                            "which is no perplexity: use an autoregressive model, or one of block size 1 without time "
                            "conditioning")
        self.lm, self.path, self.window, self._tokenizer = lm, path, lm.context, lm.tokenizer
        self.first = int(not lm.config.diffusion.predicts_first_token)
        self.stride = stride or max(1, lm.context // 2)
        if not 1 <= self.stride <= self.window - self.first:
            raise UserError(f"a stride of {self.stride} tokens does not go with the scorer's window of {self.window}: "
                            f"expected 1 to {self.window - self.first}")
        self.separator = (lm.special.end,)
        self._lines = lm.data is not None and lm.data.source in LINES

    def encode(self, text: str) -> np.ndarray:
        """int32 [n]. Where the scorer's corpus has a document a line, a newline is the end token."""
        if not self._lines:
            return self._tokenizer.encode(text)
        first, *others = [self._tokenizer.encode(line) for line in text.removesuffix("\n").split("\n")]
        return np.concatenate([first, *(part for ids in others for part in (self.separator, ids))]).astype(np.int32)

    def nats(self, texts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """-log p of every token of every text, float64 [n] each; 0 for tokens that are not scored."""
        found = [np.zeros(len(ids)) for ids in texts]
        cuts = [(i, *cut) for i, ids in enumerate(texts) for cut in windows(len(ids), self.window, self.stride)]
        longest = max(stop - start for _, start, _, stop in cuts)
        rows = np.full((-(-len(cuts) // BATCH) * BATCH, min(self.window, -(-longest // BUCKET) * BUCKET)),
                       self.lm.special.end, np.int32)
        for row, (i, start, _, stop) in zip(rows, cuts):
            row[:stop - start] = texts[i][start:stop]  # what is padded comes after: no token sees it
        for at in range(0, len(cuts), BATCH):
            per_token = self.lm.nll(rows[at:at + BATCH], estimator="nll").per_token
            for nats, (i, start, scored, stop) in zip(per_token, cuts[at:at + BATCH]):
                found[i][scored:stop] = nats[scored - start:stop - start]
        return found


def windows(size: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, first token that is scored, end) of the windows over a text of `size` tokens; each is scored once."""
    count = 1 + max(0, -(-(size - window) // stride))
    return [(k * stride, 0 if k == 0 else (k - 1) * stride + window, min(k * stride + window, size))
            for k in range(count)]

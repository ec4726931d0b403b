"""What the last validation of a run found in each document, kept so that runs can be compared without scoring again."""

import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bd3lm_jax.core import files, stats
from bd3lm_jax.core.errors import RunError
from bd3lm_jax.core.log import note_once

DOCUMENTS = "documents.npz"


class Documents(NamedTuple):
    """Nats (mean over draws) and tokens of the documents of a text; text: a hash of its tokens."""

    nats_N: np.ndarray
    tokens_N: np.ndarray
    text: str


def save(workdir: str | os.PathLike, measured: Any, rows: Any) -> None:
    """Keep what `evaluate.LikelihoodResult` holds of `data.prepare.Rows`; all of it or nothing. RunError for a full
    disk."""
    path = Path(workdir) / DOCUMENTS
    text = hashlib.sha256(rows.stream().tobytes()).hexdigest()
    try:
        with files.atomic_replace(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, nats=measured.documents_UxN.mean(0), tokens=measured.tokens_N, text=np.array(text))
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; free some disk space and run the same command "
                       "again") from None


def read(workdir: str | os.PathLike) -> Documents | None:
    """None if the run has not kept any, and, with a warning, if the file is damaged."""
    path = Path(workdir) / DOCUMENTS
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # by their checksums
        if damaged:
            raise ValueError(f"{damaged} does not match its checksum")
        with np.load(path) as stored:
            found = Documents(stored["nats"], stored["tokens"], str(stored["text"]))
        if found.nats_N.ndim != 1 or found.nats_N.shape != found.tokens_N.shape:
            raise ValueError(f"arrays of shapes {found.nats_N.shape} and {found.tokens_N.shape}")
        return found
    except Exception as error:  # zipfile and numpy raise many kinds; all of them mean: not what was written
        note_once(f"warning: {path} is damaged ({type(error).__name__}) and passed over: no difference is told of this "
                  "run; the command that trained it writes it again")
        return None


def difference(candidate: Documents, baseline: Documents) -> tuple[float, float, float] | None:
    """Nats per token of one run less those of another, paired by document, with its 95 % interval: (value, low, high).

    Negative where the first is better. The spread of the documents' differences holds the noise of the draws. low and
    high are nan for fewer than `stats.MIN_DOCUMENTS` documents. None where the runs score different tokens: other texts
    or tokenizers, or autoregression without diffusion.bos.
    """
    if candidate.text != baseline.text or not np.array_equal(candidate.tokens_N, baseline.tokens_N):
        return None
    has_tokens = candidate.tokens_N > 0
    return stats.ratio_interval((candidate.nats_N - baseline.nats_N)[has_tokens], candidate.tokens_N[has_tokens])

"""Would the published antibody network take these chains for real ones? A judge for the texts of configs/sapiens.py.

    python docs/antibodies.py heavy.txt samples.json ...       # samples.json: what `python -m launch sample` printed

heavy.txt holds chains, one a line, the last ones of which were not trained on. A chain is judged by its pseudo
log-likelihood (arXiv 1910.14659, with a tenth of the residues masked at a time instead of one): nats a masked residue
under the network as it was published, in tests/data/sapiens_vh. "Accepted" are chains below the 95th percentile of real
ones. A line of JSON a group: real chains, the same with their residues shuffled, and those of each file.
"""

import json
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.special import log_softmax

import bd3lm_jax
from bd3lm_jax.generation import sample_files

JUDGE = Path(__file__).parents[1] / "tests" / "data" / "sapiens_vh"
BEGIN, END, MASK = 0, 2, 24
REAL, PARTS = 64, 10  # chains that set the limit; parts of a chain that are masked in turn
LONGEST, LETTERS = 142, set("ACDEFGHIKLMNPQRSTVWY")
MOTIF = re.compile(r"C.{10,17}W.*C.{4,32}W[GAS].[GP]T.VT")  # two cysteines, two tryptophans, the end of the J segment


def pseudo_nats(judge: bd3lm_jax.LM, chains: Sequence[str]) -> np.ndarray:
    """float64 [N]: nats a masked residue; nan for what is no chain of 20 to 142 residues."""
    found, by_length = np.full(len(chains), np.nan), defaultdict(list)
    for i, chain in enumerate(chains):
        if 20 <= len(chain) <= LONGEST and set(chain) <= LETTERS:
            by_length[len(chain)].append(i)
    for length, members in by_length.items():
        part = np.random.default_rng(0).permutation(length) % PARTS
        masked = np.pad(part == np.arange(PARTS)[:, None], ((0, 0), (1, 1)))
        for i in members:
            x0 = np.array([BEGIN, *judge.tokenizer.encode(chains[i]), END])
            log_p = log_softmax(np.asarray(judge.logits(np.where(masked, MASK, x0)), np.float64), axis=-1)
            found[i] = -np.take_along_axis(log_p, x0[None, :, None], -1)[..., 0][masked].mean()
    return found


def judged(name: str, chains: Sequence[str], nats: np.ndarray, limit: float) -> dict:
    """Figures of a group: mean nats of its chains with standard error, and the parts that pass."""
    valid = nats[~np.isnan(nats)]
    return {"name": name, "chains": len(chains), "distinct": len(set(chains)), "nats": float(valid.mean()),
            "nats_se": float(valid.std(ddof=1) / np.sqrt(len(valid))), "accepted": float(np.mean(nats <= limit)),
            "motifs": float(np.mean([MOTIF.search(chain) is not None for chain in chains])),
            "residues": float(np.mean([len(chain) for chain in chains]))}


def main(real_path: str, *sample_paths: str) -> list[dict]:
    judge, rng = bd3lm_jax.load(str(JUDGE)), np.random.default_rng(0)
    real = Path(real_path).read_text().split()[-REAL:]
    groups = {"real": real, "shuffled": ["".join(rng.permutation(list(chain))) for chain in real]}
    groups |= {path: [text.split("\n")[0] for text in sample_files.read(path).texts] for path in sample_paths}
    nats = {name: pseudo_nats(judge, chains) for name, chains in groups.items()}
    limit = np.quantile(nats["real"], 0.95)
    return [judged(name, chains, nats[name], limit) for name, chains in groups.items()]


if __name__ == "__main__":
    if not sys.argv[1:] or not all(Path(path).exists() for path in sys.argv[1:]):
        sys.exit("expected files that are there: python docs/antibodies.py heavy.txt samples.json ...")
    for line in main(*sys.argv[1:]):
        print(json.dumps(line))

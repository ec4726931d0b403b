"""docs/antibodies.py: each residue is masked once and judged by the others; real chains pass, shuffled ones do not."""

import importlib.util
import json
import types

import numpy as np
import pytest
from places import ROOT

TRASTUZUMAB = ("EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSR"
               "WGGDGFYAMDYWGQGTLVTVSS")


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("antibodies", ROOT / "docs/antibodies.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_every_residue_is_masked_once_and_judged_where_it_is_masked(page):
    """A judge that gives a residue probability 1 where it sees it, and 1 / 2 at even and 1 / 8 at odd places of a row
    where it does not."""
    seen = []

    def logits(rows):
        seen.append(rows == page.MASK)
        places = np.where(np.arange(rows.shape[1]) % 2, 1 / 8, 1 / 2)
        p = np.full((*rows.shape, 25), 1e-9)
        true = np.array([page.BEGIN, *range(4, 24), page.END])
        p[:, np.arange(22), true] = np.where(rows == page.MASK, places, 1.0)
        p[..., 3] = 1 - p.sum(-1)
        return np.log(np.maximum(p, 1e-30))

    judge = types.SimpleNamespace(logits=logits, tokenizer=types.SimpleNamespace(encode=lambda text: range(4, 24)))
    found = page.pseudo_nats(judge, ["ACDEFGHIKLMNPQRSTVWY", "ACDX" * 9, "ACD"])
    assert found[0] == pytest.approx((np.log(2) + np.log(8)) / 2, rel=1e-6) and np.isnan(found[1:]).all()
    (masked,) = seen
    np.testing.assert_array_equal(masked.sum(0), [0] + [1] * 20 + [0])


@pytest.mark.ci_slow
def test_a_published_chain_passes_and_a_shuffled_one_does_not(page, tmp_path):
    mutant = TRASTUZUMAB.replace("DTYIH", "DTYMH")
    (tmp_path / "heavy.txt").write_text(f"{TRASTUZUMAB}\n{mutant}\n")
    samples = [{"text": f"{TRASTUZUMAB}\nEVQL"}, {"text": mutant}, {"text": "A" * 60}, {"text": "B"}]
    (tmp_path / "samples.json").write_text(json.dumps({"samples": samples}))
    real, shuffled, written = page.main(str(tmp_path / "heavy.txt"), str(tmp_path / "samples.json"))
    assert 0 < real["nats"] < 1 < 2.5 < shuffled["nats"] and (real["motifs"], shuffled["accepted"]) == (1, 0)
    # Of two real chains the better one is below their 95th percentile.
    assert (written["chains"], written["distinct"], written["accepted"], written["motifs"]) == (4, 4, 0.25, 0.5)

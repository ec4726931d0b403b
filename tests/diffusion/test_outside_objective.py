"""An objective with inputs of its own, from one file outside the package: it trains, is evaluated and samples."""

import dataclasses
import importlib
import sys

import numpy as np
import pytest
from toy_lm import make_ids, make_lm, masked
from toy_runs import toy_dict, write_text

import bd3lm_jax
from bd3lm_jax.diffusion import OBJECTIVES
from bd3lm_jax.training.train import train

OUTSIDE = '''
import dataclasses
from typing import ClassVar

import jax

from bd3lm_jax.diffusion import OBJECTIVES, Masked


@dataclasses.dataclass(frozen=True)
class Smoothed(Masked):
    """The network reads every noised token as a mixture: the token, and a part of all tokens alike."""

    kind: ClassVar[str] = "smoothed"
    reads_soft_inputs: ClassVar[bool] = True
    part: float

    def inputs(self, noised, rows, vocab_size):
        token = jax.nn.one_hot(noised.xt_BxMxL, vocab_size)
        mixture = (1 - self.part) * token + self.part / vocab_size
        return super().inputs(noised, rows, vocab_size).replace(noised=mixture)


OBJECTIVES["smoothed"] = Smoothed
'''


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """The directory of the module, which is imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "smoothed.py").write_text(OUTSIDE)
    importlib.invalidate_caches()
    importlib.import_module("smoothed")
    yield tmp_path
    sys.modules.pop("smoothed", None)
    OBJECTIVES.pop("smoothed", None)


def test_its_likelihood_is_that_of_what_the_network_reads(outside):
    ids, fields = make_ids(2, 8), dataclasses.asdict(masked(4))

    def nll(objective):
        return np.asarray(make_lm(objective).nll(ids, draws=2).per_token)

    plain, mixed = nll(masked(4)), nll(OBJECTIVES["smoothed"](**fields, part=0.9))
    np.testing.assert_allclose(nll(OBJECTIVES["smoothed"](**fields, part=0.0)), plain, atol=1e-5)
    assert np.abs(mixed - plain).max() > 1e-3


def test_it_trains_is_validated_and_samples(outside):
    write_text(outside / "text.txt", 60)
    nested = toy_dict(outside, {"train.steps": 1})
    nested["diffusion"] |= {"kind": "smoothed", "part": 0.5}
    result = train(nested, outside / "run")
    assert 0 < result["train_nll"] < 10 and 0 < result["valid_nll"] < 10
    sample, = bd3lm_jax.load(outside / "run").generate(length=8)
    assert len(sample.tokens) <= 8 and sample.nfe > 0

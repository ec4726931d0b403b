"""The variants of the sampling benchmark write the same texts; only how they ask differs."""

import jax
import numpy as np
import pytest

from bd3lm_jax.diffusion import Masked
from bd3lm_jax.experiments.bench import sampling
from bd3lm_jax.generation import generation

TINY = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "vocab_size": 24}


@pytest.mark.ci_slow
def test_variants_write_the_same_texts():
    lm = sampling.make_lm(TINY, Masked.uniform_counts(4), 64)
    draw = np.random.default_rng(0)
    lm.params = jax.tree.map(lambda x: x + 0.1 * draw.normal(size=x.shape).astype(np.float32), lm.params)
    options = generation.Options()
    fused, cached, uncached = (np.asarray(sampling.sampler(lm, options, 2, wrap=wrap)())
                               for wrap in (None, sampling.separate_store, sampling.uncached))
    np.testing.assert_array_equal(cached, fused)
    np.testing.assert_array_equal(uncached, fused)
    written = [sample.tokens for sample in lm.generate(num=2, length=64)]
    assert fused.tolist() == written  # what `generate` does
    assert len({*map(tuple, written)}) == 2


@pytest.mark.ci_slow
def test_rows_of_all_variants():
    rows = sampling.run_case(TINY, 64, size=4, batch=2, rounds=1)
    assert {row["variant"] for row in rows if row["baseline"] == "ar_cached"} == {
        "ar_cached", "fused", "fused_2", "fused_split", "cached", "no_cache", "forward"}
    assert {(row["variant"], row["baseline"]) for row in rows} > {("fused", "no_cache"), ("fused", "forward")}
    assert all(row["time_ratio"] > 0 for row in rows)

"""RoBERTa diffusion: what is masked, how often, and that the step's loss is a plain mean."""

import jax
import numpy as np
import pytest
from scipy import stats

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion.roberta import RobertaDiffusion

MASK, END, SPECIAL, LENGTH = 99, 50, 60, 16
OBJECTIVE = RobertaDiffusion(block_size=LENGTH, rates=(1.0, 0.5, 0.2), protected=3, special_ids=(SPECIAL,))
IDS = np.tile(np.arange(LENGTH), (4, 1))
IDS[0, 5], IDS[1, 7], IDS[2, 8] = END, SPECIAL, MASK
SEGMENT = (np.arange(LENGTH) < np.array([16, 16, 16, 10])[:, None]).astype(np.int32)
MAY = (SEGMENT != 0) & (np.arange(LENGTH) >= 3) & ~np.isin(IDS, [MASK, END, SPECIAL])


@pytest.fixture(scope="module")
def steps():
    """Masks `[3000, 4, 2, L]`, weights and rates of many steps."""
    draw = jax.jit(jax.vmap(lambda key: OBJECTIVE.corrupt(key, IDS, SEGMENT, 2, MASK, END)))
    noised = draw(jax.random.split(jax.random.key(0), 3000))
    changed = np.asarray(noised.xt_BxMxL) != IDS[:, None]
    assert noised.capacity == LENGTH - 3
    return changed, np.asarray(noised.weight_BxMxL, np.float64), 1 - np.exp(-np.asarray(noised.sigma_BxMxK))


def test_one_rate_a_step_from_the_list(steps):
    rate = steps[2].reshape(3000, -1)
    assert np.all(rate == rate[:, :1])
    seen = [np.isclose(rate[:, 0], r, atol=1e-5).sum() for r in OBJECTIVE.rates]
    assert sum(seen) == 3000 and stats.chisquare(seen).pvalue > 1e-4


def test_masks_are_independent_and_spare_what_is_protected(steps):
    masked, _, rates = steps
    assert not masked[:, ~MAY[:, None].repeat(2, 1)].any()
    for r in (0.5, 0.2):
        at_rate = masked[np.isclose(rates[:, 0, 0, 0], r, atol=1e-5)][:, :, 0][:, MAY]
        counts, n = at_rate.sum(1), MAY.sum()
        low, high = np.quantile(counts, [0.05, 0.95]).astype(int)
        seen = [(counts < low).sum(), *((counts == k).sum() for k in range(low, high + 1)), (counts > high).sum()]
        law = stats.binom(n, r)
        expected = [law.cdf(low - 1), *law.pmf(np.arange(low, high + 1)), law.sf(high)]
        assert stats.chisquare(seen, len(counts) * np.array(expected)).pvalue > 1e-4
    assert masked[np.isclose(rates[:, 0, 0, 0], 1.0, atol=1e-5)][:, :, 0][:, MAY].all()


def test_the_loss_of_a_step_is_the_mean_over_masked_tokens(steps):
    nats = np.random.default_rng(0).exponential(size=(4, 2, LENGTH))
    for masked, weight in zip(steps[0][:20], steps[1][:20]):
        step = (weight * nats).sum() / (2 * SEGMENT.sum())
        assert step == pytest.approx(nats[masked].mean(), rel=1e-5)
    assert not OBJECTIVE.is_bound


@pytest.mark.parametrize(("changes", "message"), [
    ({"rates": (0.5, 0.0)}, "expected mask rates above 0 and up to 1, .*: 0.0 is none"),
    ({"rates": (1.2,)}, "1.2 is none"),
    ({"rates": ()}, "expected mask rates"),
    ({"protected": -1}, "protected is -1"),
    ({"special_ids": (-5,)}, "special_ids"),
])
def test_bad_input(changes, message):
    given = {"block_size": 4, "rates": (1.0,), "protected": 0, "special_ids": (), **changes}
    with pytest.raises(UserError, match=message) as error:
        RobertaDiffusion(**given)
    assert "\n" not in str(error.value)


def test_a_row_that_is_all_protected_is_refused():
    objective = RobertaDiffusion(block_size=4, rates=(1.0,), protected=16, special_ids=())
    with pytest.raises(UserError, match="protected=16 leaves none of the 16 tokens"):
        objective.corrupt(jax.random.key(0), IDS, SEGMENT, 1, MASK, END)

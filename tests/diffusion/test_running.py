"""Running losses by token id against a plain loop."""

import jax.numpy as jnp
import numpy as np

from bd3lm_jax.diffusion.running import RunningLoss


def test_dense_ids_are_those_of_a_slow_loop():
    rng, schedule = np.random.default_rng(0), RunningLoss(vocab_size=12, decay=0.5)
    state, nats, masked_ = schedule.init_state(), np.zeros(12), np.zeros(12)
    np.testing.assert_array_equal(schedule.density(state, jnp.arange(12)[None]), 0)  # uniform masks at first
    for _ in range(4):
        tokens, masked = rng.integers(0, 10, (3, 8)), rng.random((3, 2, 8)) < 0.4
        losses = rng.exponential(size=(3, 2, 8)) * (1 + tokens[:, None])
        batch_statistics = schedule.batch_statistics(jnp.float32(losses), jnp.asarray(masked), jnp.asarray(tokens))
        state = schedule.update_state(state, batch_statistics)
        nats, masked_ = nats / 2, masked_ / 2
        for row, view, place in np.argwhere(masked):
            nats[tokens[row, place]] += losses[row, view, place]
            masked_[tokens[row, place]] += 1
    mean = nats.sum() / masked_.sum()
    dense = [n > 0 and (s + mean) / (n + 1) > mean for s, n in zip(nats, masked_)]
    assert 0 < sum(dense) < 10 and not any(dense[10:])
    np.testing.assert_array_equal(schedule.density(state, jnp.arange(12)[None])[0], np.float32(dense))
    assert schedule.as_metrics(state) == {"dense_ids": [np.float32(np.mean(dense))]}

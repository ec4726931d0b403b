import jax
import jax.numpy as jnp

from bd3lm_jax.core.state import TrainState


def test_state_is_a_pytree_that_an_empty_average_leaves_out():
    state = TrainState(step=jnp.int32(3), params={"kernel": jnp.ones(2)}, ema={}, opt_state=(jnp.zeros(2),))
    names = [jax.tree_util.keystr(path, simple=True, separator="/")
             for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    assert names == ["step", "params/kernel", "opt_state/0"]


def test_state_passes_through_jit_as_a_state():
    state = TrainState(step=jnp.int32(3), params={"kernel": jnp.ones(2)}, ema={}, opt_state=())
    after = jax.jit(lambda s: s.replace(step=s.step + 1))(state)
    assert isinstance(after, TrainState) and int(after.step) == 4 and after.ema == {}

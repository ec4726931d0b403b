"""What a rematerialised layer keeps of attention."""

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params
from oracle import streams_for, two_stream_spec

from bd3lm_jax.attention.blocked import blocked_attention
from bd3lm_jax.attention.gpu import gpu_attention
from bd3lm_jax.attention.merged import SAVED


def products(jaxpr) -> int:
    """Matrix products in a program, those of its loop bodies counted once."""
    inner = sum(map(products, (x for eqn in jaxpr.eqns for x in jaxprs_in_params(eqn.params))))
    return inner + sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns)


@pytest.mark.parametrize("attend", [blocked_attention, gpu_attention])
def test_saved_outputs_spare_the_second_forward_pass(attend):
    spec = two_stream_spec([[32]], 32, 4)

    def layer(streams):
        return sum(jnp.sum(x) for x in attend(spec, *jax.tree.map(jnp.sin, streams), None))

    def count(function):
        return products(jax.make_jaxpr(jax.grad(function))(streams_for(spec, 1, 1, 1, True)).jaxpr)

    forward = products(jax.make_jaxpr(layer)(streams_for(spec, 1, 1, 1, True)).jaxpr)
    saving = jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names(SAVED))
    assert count(saving) == count(layer)
    assert count(jax.checkpoint(layer)) == count(layer) + forward

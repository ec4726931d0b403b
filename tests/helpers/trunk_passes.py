"""The pass of the trunk that given streams go through, by one name."""

from bd3lm_jax.models import trunk


def run_pass(model, params, noised, clean, *, rule="block_causal", cache=None, write_at=None, dropout_keys=None,
             **options):
    """`trunk.prefill` without a noised stream, else `trunk.two_streams` without a cache and `trunk.decode` with one."""
    if noised is None:
        return trunk.prefill(model, params, clean, cache, write_at, rule=rule, dropout_keys=dropout_keys, **options)
    assert rule == "block_causal"
    if cache is None:
        return trunk.two_streams(model, params, noised, clean, dropout_keys=dropout_keys, **options)
    assert dropout_keys is None
    return trunk.decode(model, params, noised, clean, cache, write_at, **options)

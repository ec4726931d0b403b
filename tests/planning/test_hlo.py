"""Traffic of compiled programs whose collectives are known, and of text as other compilers write it."""

import json

import pytest
from toy_runs import run_python

from bd3lm_jax.planning import hlo

EXPLICIT = """
import json, functools, jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from bd3lm_jax.planning import hlo

mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

def body(x):
    def step(x, _):
        return jax.lax.psum(x, "b") * 0.1, jax.lax.all_gather(x[:4], "a").sum()
    x, sums = jax.lax.scan(step, x, length=5)
    moved = jax.lax.ppermute(x, "b", [(i, (i + 1) % 4) for i in range(4)])
    turned = jax.lax.all_to_all(x, "b", 0, 0, tiled=True)
    return moved + turned + sums.sum()

f = jax.shard_map(body, mesh=mesh, in_specs=P(("a", "b")), out_specs=P(("a", "b")), check_vma=False)
compiled = jax.jit(f).lower(jax.ShapeDtypeStruct((8 * 1000,), jnp.float32)).compile()
print(json.dumps(hlo.communication(compiled.as_text())))
"""

# The same calls as TPU programs write them: asynchronous, tiled layouts, loops that count up to a constant.
TPU = """HloModule jit_step, is_scheduled=true

%add (x: bf16[], y: bf16[]) -> bf16[] {
  ROOT %sum = bf16[] add(%x, %y)
}

%all-reduce-scatter.7 (input.7: bf16[512,128]) -> bf16[512,32] {
  %input.7 = bf16[512,128]{0,1:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.2 = bf16[512,128]{0,1:T(8,128)} all-reduce(%input.7), channel_id=9, \
replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %dynamic-slice.1 = bf16[512,32]{0,1:T(8,128)} dynamic-slice(%all-reduce.2), dynamic_slice_sizes={512,32}
}

%fused.start (p: bf16[4,124]) -> bf16[16,124] {
  ROOT %all-gather.1 = bf16[16,124]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=5, replica_groups=[2,4]<=[8]
}

%fused.done (p: bf16[4,124]) -> bf16[16,124] {
  ROOT %all-gather.2 = bf16[16,124]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=5, replica_groups=[2,4]<=[8]
}

%cond (param: (s32[], bf16[4,124])) -> pred[] {
  %constant.4 = s32[]{:T(128)} constant(11)
  %get-tuple-element.5 = s32[]{:T(128)} get-tuple-element(%param), index=0
  ROOT %lt = pred[]{:T(512)} compare(%get-tuple-element.5, %constant.4), direction=LT
}

%body (param: (s32[], bf16[4,124])) -> (s32[], bf16[4,124]) {
  %fusion.1 = bf16[16,124]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%fused.start
  %fusion.2 = bf16[16,124]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%fused.done
  ROOT %tuple = (s32[], bf16[4,124]) tuple(%a, %b)
}

ENTRY %main (p0: bf16[4,124]) -> bf16[4,124] {
  %while.1 = (s32[]{:T(128)}, /*index=1*/bf16[4,124]{1,0}) while(%t), condition=%cond, body=%body
  %fusion.3 = bf16[512,32]{0,1} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.7
  %ag = (f32[10]{0}, f32[80]{0}) all-gather-start(%z), channel_id=2, \
replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([2,4]T(1,0)) {'axis_0','axis_1'}, dimensions={0}
  %agd = f32[80]{0} all-gather-done(%ag)
  ROOT %alone = f32[10]{0} all-reduce(%z), channel_id=3, replica_groups=[8,1]<=[8], to_apply=%add
}
"""


@pytest.mark.ci_slow
def test_collectives_of_a_program_on_eight_devices():
    done = run_python(EXPLICIT, devices=8)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == {
        "all-reduce": [5, 5 * 2 * 3 / 4 * 4000], "all-gather": [5, 5 * 1 / 2 * 32],
        "collective-permute": [1, 4000], "all-to-all": [1, 3 / 4 * 4000]}


def test_as_tpu_programs_are_written():
    found = hlo.communication(TPU)
    assert found == {"all-gather": (11 + 1, pytest.approx(11 * 3 / 4 * 16 * 124 * 2 + 7 / 8 * 320)),
                     "reduce-scatter": (1, pytest.approx(3 / 4 * 512 * 128 * 2))}


@pytest.mark.parametrize(("slice_size", "between"), [(4, ["all-gather"]), (2, ["all-gather", "reduce-scatter"])])
def test_what_joins_slices_is_told_apart(slice_size, between):
    """Of the calls above, on eight devices, one gathers from all of them and the others within four."""
    whole, found = hlo.communication(TPU), hlo.communication(TPU, slice_size)
    assert [kind for kind in found
            if kind.endswith(hlo.BETWEEN_SLICES)] == [kind + hlo.BETWEEN_SLICES for kind in between]
    for kind in whole:
        parts = [found[name] for name in (kind, kind + hlo.BETWEEN_SLICES) if name in found]
        assert [sum(values) for values in zip(*parts)] == pytest.approx(list(whole[kind]))
    if slice_size == 4:
        assert found["all-gather between slices"] == (1, pytest.approx(7 / 8 * 320))


SENDS = """ENTRY %main (p: bf16[4,8,128]) -> bf16[4,8,128] {
  %send.1 = (bf16[4,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) send(%p, %after-all.1), channel_id=3, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2,3}x{0:15}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send.2 = (f32[4]{0}, u32[], token[]) send(%q, %after-all.2), channel_id=4, is_host_transfer=true
}
"""


def test_what_tpus_send_to_other_slices_by_way_of_their_hosts():
    assert hlo.communication(SENDS) == {"all-reduce between slices": (1, pytest.approx(2 * 2 / 3 * 4 * 8 * 128 * 2))}


@pytest.mark.parametrize(("said", "groups"), [
    ("replica_groups={{0,3},{1,2}}, to_apply=%add", [[0, 3], [1, 2]]),
    ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ("replica_groups=[2,4]<=[8], use", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("replica_groups=[4,2]<=[2,4]T(1,0), use", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x", [[0, 2], [1, 3]]),
    ("replica_groups={}, to_apply=%add", None)])
def test_groups_as_they_are_written(said, groups):
    assert hlo._groups(f"  %x = f32[2]{{0}} all-reduce(%y), channel_id=1, {said}") == groups


def test_a_program_of_one_device_sends_nothing():
    assert hlo.communication("ENTRY %main (p: f32[2]) -> f32[2] {\n  ROOT %p = f32[2]{0} parameter(0)\n}\n") == {}

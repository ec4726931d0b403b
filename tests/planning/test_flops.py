"""FLOPs against closed forms, the compiler's account of unrolled programs, and products counted in the real step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import some
from toy_runs import quick_jit

from bd3lm_jax import models
from bd3lm_jax.diffusion.ar import AR
from bd3lm_jax.diffusion.clip import ClipSearch, CountSchedule
from bd3lm_jax.diffusion.joint import Joint
from bd3lm_jax.diffusion.masked import Masked
from bd3lm_jax.diffusion.mixed import Mixed
from bd3lm_jax.models import forward, trunk
from bd3lm_jax.models.dit import DiTConfig
from bd3lm_jax.planning import flops

PAPER = DiTConfig(vocab_size=50258, num_layers=12, hidden_size=768, num_heads=12, mlp_ratio=4, dropout=0.0, adaln=True,
                  cond_dim=128, time_conditioning=False, rope_theta=1e4)
LENGTH = 1024
SMALL = dataclasses.replace(PAPER, vocab_size=1024, num_layers=3, hidden_size=256, num_heads=4)
ROWS, SHORT = 2, 128


def paper_step(objective, noise_samples):
    return flops.train_step(PAPER, objective, batch=1, length=LENGTH, noise_samples=noise_samples)


def by_hand(clean: int, noised: int, clean_layers: int, pairs: float, scored: float) -> float:
    """A step of the paper's network: 24 D^2 a token and layer, 4 D a pair and layer, 2 D V a scored position."""
    width, vocab = 768, 50304
    layers = 24 * width**2 * (clean * clean_layers + noised * 12)
    keys_values = 4 * width**2 * clean * (12 - clean_layers)
    return 3 * (layers + keys_values + 4 * width * pairs + 2 * width * vocab * scored)


@pytest.mark.parametrize(("size", "noise_samples"), [(16, 1), (16, 2), (4, 1), (128, 3), (1024, 1)])
def test_two_streams_by_hand(size, noise_samples):
    blocks, clean = LENGTH // size, LENGTH - size
    noised_pairs = noise_samples * sum(size * (block * size + size) for block in range(blocks))
    clean_pairs = sum(size * (block + 1) * size for block in range(blocks - 1))
    scored = noise_samples * flops.scored_positions(Masked.uniform_counts(size), 1, LENGTH, noise_samples)
    expected = by_hand(clean, noise_samples * LENGTH, 11, 12 * noised_pairs + 11 * clean_pairs, scored)
    assert paper_step(Masked.uniform_counts(size), noise_samples) == pytest.approx(expected, rel=1e-3)


def test_blocks_of_several_sizes_by_hand():
    """A third of the rows each; what is scored is the most that any of them masks."""
    mixed = Mixed(block_size=16, sizes=(4, 16, 64), schedule="loglinear", corruption="exact_count", complement=False,
                  eps=1e-3)
    scored, each = flops.scored_positions(mixed, 1, LENGTH, 1), []
    for size in mixed.sizes:
        noised_pairs = sum(size * (block * size + size) for block in range(LENGTH // size))
        clean_pairs = noised_pairs - size * LENGTH
        each.append(by_hand(LENGTH - size, LENGTH, 11, 12 * noised_pairs + 11 * clean_pairs, scored))
    assert paper_step(mixed, 1) == pytest.approx(sum(each) / 3, rel=1e-3)
    assert max(each) > 1.01 * min(each)


def test_autoregressive_by_hand():
    pairs = 12 * sum(position + 1 for position in range(LENGTH))
    assert paper_step(AR(bos=True), 1) == pytest.approx(by_hand(LENGTH, 0, 12, pairs, LENGTH), rel=1e-3)


@pytest.mark.parametrize(("size", "noise_samples", "ratio"), [(4, 1, 1.222), (4, 2, 1.141), (16, 1, 1.232)])
def test_a_clean_stream_that_predicts_by_hand(size, noise_samples, ratio):
    """All clean tokens go through all layers and the head; they see half as many within their blocks."""
    joint = Joint(**dataclasses.asdict(Masked.uniform_counts(size)), ar_weight=1.0)
    noised_pairs = noise_samples * sum(size * (block * size + size) for block in range(LENGTH // size))
    pairs = 12 * (noised_pairs + sum(position + 1 for position in range(LENGTH)))
    scored = noise_samples * flops.scored_positions(joint, 1, LENGTH, noise_samples) + LENGTH
    expected = by_hand(LENGTH, noise_samples * LENGTH, 12, pairs, scored)
    found = paper_step(joint, noise_samples)
    assert found == pytest.approx(expected, rel=1e-3)
    assert found / paper_step(Masked.uniform_counts(size), noise_samples) == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize(("noise_samples", "limit"), [(1, 1.55), (2, 1.22), (3, 1.12)])
def test_a_view_costs_little_more_than_an_autoregressive_step(noise_samples, limit):
    ratio = paper_step(Masked.uniform_counts(16), noise_samples) / noise_samples / paper_step(AR(bos=True), 1)
    assert 1 < ratio <= limit


def test_forward_is_a_third_and_rows_are_alike():
    step = functools.partial(flops.train_step, SMALL, Masked.uniform_counts(16), length=SHORT, noise_samples=1)
    assert step(batch=2) == 3 * flops.forward(SMALL, Masked.uniform_counts(16), batch=2, length=SHORT, noise_samples=1)
    assert step(batch=8) == pytest.approx(4 * step(batch=2), rel=0.005)  # but for the constant adaLN


def test_clipped_noise_scores_what_it_masks():
    clipped = dataclasses.replace(Masked.uniform_counts(16), corruption="bernoulli", clip_low=0.3, clip_high=0.8)
    assert flops.scored_positions(clipped, 2, LENGTH, 1) == LENGTH // 16 * 12
    plain = dataclasses.replace(clipped, clip_low=0.0, clip_high=1.0)
    assert flops.scored_positions(plain, 2, LENGTH, 1) == flops.scored_positions(AR(bos=True), 2, LENGTH, 1) == LENGTH


@dataclasses.dataclass(frozen=True)
class Renamed(Masked):
    """An objective whose `corrupt` calls its parameters otherwise."""

    def corrupt(self, key, x0, segments, views, mask, end):
        return super().corrupt(key, x0, segments, views, mask, end)


def test_parameters_of_noise_have_any_name():
    plain = Masked.uniform_counts(16)
    renamed = Renamed(**dataclasses.asdict(plain))
    assert flops.scored_positions(renamed, 2, LENGTH, 1) == flops.scored_positions(plain, 2, LENGTH, 1)


def most_masked(objective, schedule, state, draws=20):
    """Masked tokens of the rows that mask most, among rows drawn as training draws them in a state of its noise."""
    ids = jnp.ones((4, LENGTH), jnp.int32)
    blocks = LENGTH // objective.block_size
    draw = quick_jit(lambda key: objective.corrupt(key, ids, ids, noise_samples=1, mask_id=0, end_id=0,
                                                   distribution=schedule.distribution(state, blocks)))
    return max(int((draw(jax.random.key(i)).weight_BxMxL > 0).sum(-1).max()) for i in range(draws))


@pytest.mark.parametrize("size", [4, 16])
def test_noise_from_the_data_scores_what_it_may_mask(size):
    """Counts whose loss is far above the others' are drawn as often as a count schedule lets them be."""
    counts = Masked.uniform_counts(size)
    learnt = CountSchedule(size, floor=0.1, decay=0.99)
    squares = jnp.where(jnp.arange(size) == size - 1, 1e10, 1.0)
    state = {"squares_S": squares, "blocks_S": jnp.full(size, 1e4)}
    scored = flops.scored_positions(counts, 4, LENGTH, 1, learnt)
    assert scored - size < most_masked(counts, learnt, state) <= scored
    assert scored > 1.2 * flops.scored_positions(counts, 4, LENGTH, 1)
    head = [flops.parts(SMALL, counts, batch=4, length=LENGTH, noise_samples=1, adaptive_noise=x).head
            for x in (learnt, None)]
    assert head[0] / head[1] == pytest.approx(scored / flops.scored_positions(counts, 4, LENGTH, 1), rel=1e-3)


def test_searched_clips_score_what_they_may_mask():
    clipped = dataclasses.replace(Masked.uniform_counts(16), corruption="bernoulli", clip_low=0.0, clip_high=0.9)
    search = ClipSearch(16, 0.0, 0.9, widths=(0.1,), stride=0.1)
    scored = flops.scored_positions(clipped, 4, LENGTH, 1, search)
    found = most_masked(clipped, search, search.state_for_interval(np.array([0.8, 0.9])))
    assert 0.95 * scored < found <= scored < LENGTH


def gradient(layers: int, size: int, noise_samples: int, time_conditioning: bool = False):
    """The gradient of the hidden states, unrolled, with dense attention; its abstract arguments."""
    config = dataclasses.replace(SMALL, num_layers=layers, time_conditioning=time_conditioning)
    model = models.build(config, jnp.float32)
    execution = forward.Execution("dense", "unroll", "none", one_document=True)

    def loss(params, xt_BxMxL, x0_BxL):
        position_BxL, segment_BxL = forward.single_document_rows(x0_BxL)
        sigma = jnp.ones((*xt_BxMxL.shape[:2], SHORT // size)) if time_conditioning else None
        return forward.two_stream(model, params, xt_BxMxL, x0_BxL, position_BxL, segment_BxL, block_size=size,
                                  sigma_BxMxn=sigma, execution=execution).sum()

    params = jax.eval_shape(lambda: trunk.init(model, jax.random.key(0)))
    ids = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((ROWS, noise_samples, SHORT), (ROWS, SHORT))]
    return jax.grad(loss), params, *ids


def of_a_layer(size: int, noise_samples: int, time_conditioning: bool = False) -> float:
    """What `flops` says of one more layer, with all pairs of tokens in place of those that see each other."""
    configs = [dataclasses.replace(SMALL, num_layers=layers, time_conditioning=time_conditioning) for layers in (2, 3)]
    two, three = (flops.parts(config, Masked.uniform_counts(size), batch=ROWS, length=SHORT,
                              noise_samples=noise_samples)
                  for config in configs)
    pairs = (noise_samples * SHORT + SHORT - size) ** 2
    return 3 * (three.layers - two.layers + 4 * SMALL.hidden_size * ROWS * pairs)


@pytest.mark.ci_slow
def test_a_layer_costs_what_the_compiler_counts():
    counted = []
    for layers in (2, 3):
        function, *arguments = gradient(layers, 16, 1)
        counted.append(quick_jit(function).lower(*arguments).compile().cost_analysis()["flops"])
    assert counted[1] - counted[0] == pytest.approx(of_a_layer(16, 1), rel=0.03)


@pytest.mark.parametrize(("size", "noise_samples", "time_conditioning"), some([
    (16, 1, False), (16, 2, True), (SHORT, 2, False)], 1))
def test_a_layer_costs_what_its_products_do(size, noise_samples, time_conditioning):
    two, three = (flops.count(*gradient(layers, size, noise_samples, time_conditioning)) for layers in (2, 3))
    assert three - two == pytest.approx(of_a_layer(size, noise_samples, time_conditioning), rel=0.002)


@pytest.mark.ci_slow
def test_the_output_layer_costs_what_the_compiler_counts():
    objective, model = Masked.uniform_counts(16), models.build(SMALL, jnp.float32)
    positions = flops.scored_positions(objective, ROWS, SHORT, 2)

    def loss(params, h):
        return jax.nn.log_softmax(trunk.logits(model, params, h))[..., 0].sum()

    params = jax.eval_shape(lambda: trunk.init(model, jax.random.key(0)))
    h = jax.ShapeDtypeStruct((ROWS, 2, positions, SMALL.hidden_size), jnp.float32)
    compiled = quick_jit(jax.grad(loss, argnums=(0, 1))).lower(params, h).compile()
    head = flops.parts(SMALL, objective, batch=ROWS, length=SHORT, noise_samples=2).head
    assert compiled.cost_analysis()["flops"] == pytest.approx(3 * head, rel=0.05)


def test_count_knows_how_often_loops_run():
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)

    def scanned(x):
        return jax.lax.scan(lambda y, _: (y @ y, None), x, length=5)[0]

    once = 2 * 8**3
    assert flops.count(scanned, x) == 5 * once
    assert flops.count(jax.jit(jax.checkpoint(scanned)), x) == 5 * once
    assert flops.count(lambda x: jax.lax.cond(x[0, 0] > 0, scanned, lambda x: x @ x, x), x) == 5 * once
    assert flops.count(lambda x: jnp.einsum("bij,bkj->bik", x[None], x[None, :4]), x) == 2 * 8 * 4 * 8
    with pytest.raises(ValueError, match="while"):
        flops.count(lambda x: jax.lax.while_loop(lambda y: y[0, 0] > 0, lambda y: y @ y, x), x)

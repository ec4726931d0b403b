"""Two-stream attention, forward and backward: this library's backends against the dense mask, on the same tensors.

Shapes are those of a training step: noised queries of L tokens and clean ones of L - S (nobody reads the last block).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax.attention import BACKENDS, MaskSpec, Tokens, allowed, attend
from bd3lm_jax.core import jax_settings
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.log import note
from bd3lm_jax.experiments.bench.runner import Limit, Variant, compare, compiled, row_of
from bd3lm_jax.models.forward import compute_dtype

HEAD = 64  # size of a head
PAIR_FLOPS = 12  # of a query, a key and one number of a head: two matrix products forward, four backward
FORMULA = "L^2 + L S"  # what the cost should be proportional to
NOTE = ("Ratios to the dense mask. Memory is temporary memory by the compiler's account; FLOPs are those of the matrix "
        "products that run. Growth: costs at the longest over the shortest length, over how L^2 + L S grows.")
AGAINST = ("torch",)
LIMITS = (
    Limit("L=2048, S=16, 3 heads", "blocked", "dense", "cpu_ratio", 0.15),
    Limit("L=2048, S=16, 3 heads", "blocked", "dense", "memory_ratio", 0.06),
    Limit("L=2048, S=16, 3 heads", "blocked", "torch_sdpa", "cpu_ratio", 0.45),
    Limit("12 heads", "gpu", "torch_flex", "time_ratio", 1.0),
    Limit("growth", "blocked", FORMULA, "cpu_ratio", 1.15),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a call: one row, `heads` heads of 64."""

    heads: int
    length: int
    block_size: int

    def __str__(self) -> str:
        return f"B=1, L={self.length}, S={self.block_size}, {self.heads} heads of {HEAD}"


def cases() -> list[Case]:
    if jax.default_backend() == "cpu":
        return [Case(3, length, 16) for length in (1024, 2048, 4096)]
    return [Case(12, length, size) for size in (4, 16, 128, 1024) for length in (1024, 2048, 4096, 8192)]


def run(rounds: int, against: str) -> list[dict]:
    """Rows of all cases; `splash` runs on a CPU in interpret mode at the smallest length, far slower than it is."""
    rows = []
    for index, case in enumerate(cases()):
        rows += run_case(case, rounds, against, interpret=index == 0)
    for size in sorted({case.block_size for case in cases()}):
        same = [case for case in cases() if case.block_size == size]
        rows += growth(same[0], same[-1], rows)
    return rows


def run_case(case: Case, rounds: int, against: str, interpret: bool) -> list[dict]:
    """Every backend that runs here, in turns; with against="torch" also PyTorch's. interpret: splash on a CPU too."""
    names = {"cpu": {"splash": "splash_interpret"} if interpret else {}, "gpu": {"gpu": "gpu"},
             "tpu": {"splash": "splash"}}[jax.default_backend()]
    spec, qkv, cotangents = problem(case)
    variants = []
    for backend, name in {"dense": "dense", "blocked": "blocked", **names}.items():
        try:
            variants.append(backend_variant(name, backend, case, spec, qkv, cotangents))
        except UserError as error:
            note(f"{case}: {name} left out: {error}")
    pairs = ()
    if against == "torch":
        from bd3lm_jax.experiments.bench import torch_side

        others = torch_side.attention_variants(*flat(qkv, cotangents), mask_NxN=dense_mask(spec), length=case.length,
                                               block_size=case.block_size, flops=variants[0].flops)
        pairs = [(variant.name, other.name) for other in others for variant in variants
                 if variant.name in BACKENDS.keys() - {"dense"}]
        variants += others
    return compare(str(case), variants, "dense", rounds, pairs)


def problem(case: Case) -> tuple[MaskSpec, tuple, tuple]:
    """The mask, (q, k, v) of both streams and a gradient of both outputs, random, in the dtype that training uses."""
    num_clean = case.length - case.block_size
    position = jnp.arange(case.length)[None]
    noised = Tokens(position, position // case.block_size, jnp.ones_like(position), 1)
    clean = Tokens(*(x[:, :num_clean] for x in (noised.position, noised.block, noised.segment)), noise_sample=0)
    spec = MaskSpec(rule="block_causal", block_size=case.block_size, aligned=True, one_document=True, noised=noised,
                    clean=clean, cache=None)

    @jax.jit
    def draw():
        keys = jax.random.split(jax_settings.key(0), 8)
        noised, clean = (1, 1, case.length, case.heads, HEAD), (1, num_clean, case.heads, HEAD)
        arrays = [jax.random.normal(key, shape).astype(compute_dtype("auto"))
                  for key, shape in zip(keys, 4 * [noised] + 4 * [clean])]
        return (tuple(arrays[:3]), tuple(arrays[4:7])), (arrays[3], arrays[7])

    return spec, *draw()


def backend_variant(name: str, backend: str, case: Case, spec: MaskSpec, qkv: tuple, cotangents: tuple) -> Variant:
    """Gradients of the queries, keys and values of both streams by one backend."""
    def gradients(qkv, cotangents):
        return jax.vjp(lambda noised, clean: attend(backend, spec, noised, clean, None), *qkv)[1](cotangents)

    return compiled(name, gradients, (qkv, cotangents), carries=False, flops_needed=needed_flops(case))


def needed_flops(case: Case) -> float:
    """Of forward and backward, of the L^2 pairs of tokens that see each other."""
    return float(PAIR_FLOPS * case.length ** 2 * case.heads * HEAD)


def flat(qkv: tuple, cotangents: tuple) -> list[np.ndarray]:
    """q, k, v and the gradient of the output of both streams one after the other, float32 `[B, N, H, Dh]`."""
    parts = [(noised[:, 0], clean) for noised, clean in zip((*qkv[0], cotangents[0]), (*qkv[1], cotangents[1]))]
    return [np.concatenate([np.asarray(x, np.float32) for x in part], axis=1) for part in parts]


def dense_mask(spec: MaskSpec) -> np.ndarray:
    """Who sees whom among the tokens of `flat`: bool `[N, N]`."""
    assert spec.noised is not None and spec.clean is not None
    noised, clean = (x.replace(noise_sample=jnp.full_like(x.segment, x.noise_sample))
                     for x in (spec.noised, spec.clean))
    tokens = jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), noised, clean)
    return np.asarray(allowed(spec.rule, tokens.expand(2), tokens.expand(1)))[0]


def growth(short: Case, long: Case, rows: list[dict]) -> list[dict]:
    """How the costs of each backend grow between two lengths, over how L^2 + L S grows: 1 is proportional to it."""
    pairs = [case.length * (case.length + case.block_size) for case in (short, long)]
    expected = pairs[1] / pairs[0]
    there = [{row["variant"]: row for row in rows if row["case"] == str(case) and row["baseline"] == "dense"}
             for case in (short, long)]
    return [row_of(f"growth L={short.length} -> {long.length}, S={short.block_size}", name, FORMULA, **{
        ratio: there[1][name][value] / there[0][name][value] / expected
        for ratio, value in (("time_ratio", "median_ms"), ("cpu_ratio", "cpu_ms"), ("memory_ratio", "temp_mib"))
        if there[1][name][value] is not None and there[0][name][value]})
        for name in there[0] if name in there[1]]

"""Training steps with their optimiser: this library's, as `train` runs it, against autoregression and the alternatives.

ar, mdlm (one block a row), two_stream, two_stream_views2 and two_stream_split (noised tokens in the last third of the
layers only, `model.decoder_layers`) are `step.make_step`. two_pass computes the same loss with
the clean stream in a pass of its own before the noised one. published_structure is one pass over [noised; clean] with a
dense 2L x 2L mask and the output layer on all 2L positions, as published (github.com/kuleshov-group/bd3lms).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bd3lm_jax import models
from bd3lm_jax.config import ComputeConfig, Config, DataConfig, OptimConfig, TrainConfig
from bd3lm_jax.core import jax_settings
from bd3lm_jax.core.state import TrainState
from bd3lm_jax.diffusion.ar import AR
from bd3lm_jax.diffusion.masked import Masked
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.experiments.bench.runner import Limit, Variant, compare, compiled, products
from bd3lm_jax.experiments.bench.structures import published_loss, two_pass_loss
from bd3lm_jax.models import Backbone, trunk
from bd3lm_jax.models.dit import DiTConfig
from bd3lm_jax.models.forward import compute_dtype, single_document_rows
from bd3lm_jax.planning import flops
from bd3lm_jax.scoring.score import SpecialIds
from bd3lm_jax.training import optim
from bd3lm_jax.training.step import make_step


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a training step."""

    layers: int
    width: int
    heads: int
    batch: int
    length: int
    block_size: int
    vocab: int

    def __str__(self) -> str:
        return (f"{self.layers} x {self.width}, B={self.batch}, L={self.length}, S={self.block_size}, V={self.vocab}")


SMALL = Case(layers=6, width=256, heads=4, batch=1, length=512, block_size=16, vocab=8192)
PAPER = Case(layers=12, width=768, heads=12, batch=4, length=1024, block_size=16, vocab=50258)
ACCELERATOR = dataclasses.replace(PAPER, batch=8)
COUNTED, COMPILED = "counted", "compiled only"
NOTE = ("Ratios to the autoregressive step of the same network. two_stream_views2: times and FLOPs are per noised "
        "copy (those of the step, halved), memory is that of the whole step. FLOPs: of the matrix products that run.")
AGAINST = ("torch",)
LIMITS = (
    Limit(str(SMALL), "two_stream", "ar", "cpu_ratio", 1.65),
    Limit(str(SMALL), "two_stream_views2", "ar", "cpu_ratio", 1.35),
    Limit(str(SMALL), "two_stream", "torch_published", "cpu_ratio", 0.3),
    Limit(str(ACCELERATOR), "two_stream", "ar", "time_ratio", 1.75),
    Limit(COUNTED, "two_stream", "ar", "flops_ratio", 1.55),
    Limit(COUNTED, "two_stream_views2", "ar", "flops_ratio", 1.22),
    Limit(COMPILED, "two_stream", "published_structure", "memory_ratio", 0.06),
    Limit(COMPILED, "two_stream", "published_structure", "compile_s", 60),
)


def run(rounds: int, against: str) -> list[dict]:
    """Rows of the case that is run (small on a CPU, the paper's network elsewhere) and of what is only counted and
    compiled: the paper's network, with every saving of memory against the published structure."""
    case = SMALL if jax.default_backend() == "cpu" else ACCELERATOR
    return timed(case, rounds, against) + counted(PAPER) + compiled_only(PAPER)


def timed(case: Case, rounds: int, against: str) -> list[dict]:
    """Every variant of one training step, in turns; with against="torch" also the published PyTorch network."""
    variants = [measured(name, case, remat="none", abstract=False) for name in (*OBJECTIVES, *STRUCTURES)]
    pairs = ()
    if against == "torch":
        variants.append(torch_published(case))
        pairs = (("two_stream", "torch_published"),)
    return compare(str(case), variants, "ar", rounds, pairs)


def counted(case: Case) -> list[dict]:
    """The matrix products alone, to those of `ar`."""
    variants = []
    for name in (*OBJECTIVES, *STRUCTURES):
        step, arguments = program(name, case, remat="none", abstract=True)
        variants.append(Variant(name, None, flops=products(step, *arguments), parts=_objective(name, case)[1]))
    return compare(f"{case}, {COUNTED}", variants, "ar", 0)


def compiled_only(case: Case) -> list[dict]:
    """Temporary memory and seconds of compilation: our layers computed again in the backward pass, the published
    structure as it is."""
    variants = [measured("two_stream", case, remat="full", abstract=True),
                measured("published_structure", case, remat="none", abstract=True)]
    return compare(f"{case}, {COMPILED}", variants, "published_structure", 0)


OBJECTIVES = {  # variant of this library -> objective of a case, noised copies
    "ar": (lambda case: AR(bos=True), 1),
    "mdlm": (lambda case: Masked.uniform_counts(case.length), 1),
    "two_stream": (lambda case: Masked.uniform_counts(case.block_size), 1),
    "two_stream_views2": (lambda case: Masked.uniform_counts(case.block_size), 2),
    "two_stream_split": (lambda case: Masked.uniform_counts(case.block_size), 1),
}
SPLIT = {"two_stream_split": 3}  # variants whose decoder is that part of the layers
STRUCTURES = {"two_pass": two_pass_loss, "published_structure": published_loss}  # other ways to compute `two_stream`


def _objective(name: str, case: Case) -> tuple[Any, int]:
    objective, noise_samples = OBJECTIVES.get(name, OBJECTIVES["two_stream"])
    return objective(case), noise_samples


def config_of(case: Case, name: str, remat: str) -> Config:
    """The run of a variant: no dropout, no average of the weights, constant learning rate."""
    objective, noise_samples = _objective(name, case)
    decoder_layers = max(case.layers // SPLIT[name], 1) if name in SPLIT else 0
    return Config(
        model=DiTConfig(vocab_size=case.vocab, num_layers=case.layers, hidden_size=case.width, num_heads=case.heads,
                        dropout=0.0, decoder_layers=decoder_layers),
        diffusion=objective,
        data=DataConfig(seq_len=case.length),
        optim=OptimConfig(lr=1e-3, warmup_steps=0, ema_decay=0.0),
        train=TrainConfig(steps=1, batch_size=case.batch, noise_samples=noise_samples),
        compute=ComputeConfig(remat=remat))


def measured(name: str, case: Case, remat: str, abstract: bool) -> Variant:
    """A step in JAX. abstract: compiled, not run."""
    objective, noise_samples = _objective(name, case)
    model = config_of(case, name, remat).model
    needed = flops.train_step(model, objective, batch=case.batch, length=case.length, noise_samples=noise_samples)
    return compiled(name, *program(name, case, remat, abstract), carries=True, flops_needed=needed, parts=noise_samples)


def program(name: str, case: Case, remat: str, abstract: bool) -> tuple[Callable, tuple]:
    """The training step of a variant in JAX and its arguments (their shapes alone if abstract)."""
    config = config_of(case, name, remat)
    model, tx, state, batch = setting(config, abstract)
    special = SpecialIds(mask=case.vocab - 1, end=0)
    if name in STRUCTURES:
        return _step_of(STRUCTURES[name], config, model, tx, special), (state, batch)
    return make_step(config, model, tx, special), (state, batch)


def _step_of(loss: Callable, config: Config, model: Backbone, tx: optax.GradientTransformation, special: SpecialIds):
    """As `make_step`, with another loss (see structures.py): same noise, same optimiser."""
    def step(state, batch):
        noised, tokens = noise(config, state, batch, special), batch["tokens"]

        def mean(params):
            return loss(model, params, config.diffusion, noised, tokens, special.mask) / tokens.size

        value, grads = jax.value_and_grad(mean)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), {"loss": value}

    return step


def noise(config: Config, state: TrainState, batch: dict, special: SpecialIds) -> Noised:
    """What `make_step` draws for a step."""
    key = jax.random.split(jax.random.fold_in(jax_settings.key(config.seed), state.step))[0]
    return config.diffusion.corrupt(key, batch["tokens"], batch["segments"], config.train.noise_samples,
                                    special.mask, special.end)


def setting(config: Config, abstract: bool) -> tuple[Backbone, optax.GradientTransformation, TrainState, dict]:
    """Model, optimiser, first state and a batch of random tokens (their shapes alone if abstract)."""
    model = models.build(config.model, compute_dtype(config.compute.dtype))
    tx = optim.make_optimizer(config.optim, config.train.steps)

    def make():
        params = trunk.init(model, jax_settings.key(0))
        shape = (config.train.batch_size, config.data.seq_len)
        tokens = jax.random.randint(jax_settings.key(1), shape, 0, config.model.vocab_size - 1)
        positions, segments = single_document_rows(tokens)
        batch = {"tokens": tokens, "segments": segments, "positions": positions}
        return TrainState(jnp.zeros((), jnp.int32), params, {}, tx.init(params)), batch

    return model, tx, *(jax.eval_shape(make) if abstract else jax.jit(make)())


def torch_published(case: Case) -> Variant:
    """The published network in PyTorch, with the weights and the noise of the first step of the others."""
    from bd3lm_jax.experiments.bench import torch_side

    special = SpecialIds(mask=case.vocab - 1, end=0)
    config = config_of(case, "two_stream", remat="none")
    _, _, state, batch = setting(config, abstract=False)
    noised = noise(config, state, batch, special)
    return torch_side.published_step(state.params, config.model, case.block_size, config.optim, noised.xt_BxMxL[:, 0],
                                     batch["tokens"], noised.weight_BxMxL[:, 0], special.mask)

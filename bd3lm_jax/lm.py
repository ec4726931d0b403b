"""A language model in hand: likelihood, generation and raw logits of a run directory or a published checkpoint."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax import models
from bd3lm_jax.checkpoints.published import ModelSpec
from bd3lm_jax.checkpoints.published.mapping import check_bos, check_mask
from bd3lm_jax.config import Config, DataConfig, LMConfig
from bd3lm_jax.core import jax_settings, plugins, stats
from bd3lm_jax.core.errors import UserError, command_line
from bd3lm_jax.data.tokenizers import Tokenizer
from bd3lm_jax.generation import generation, infill, stream
from bd3lm_jax.generation.generation import Sample
from bd3lm_jax.generation.options import Options, make_options
from bd3lm_jax.generation.sampling.auto_size import AUTO
from bd3lm_jax.likelihood import conditional, estimators, evaluate
from bd3lm_jax.models import Backbone, forward, trunk
from bd3lm_jax.scoring.score import SpecialIds

AUTOREGRESSIVE = "ar"  # the sampler that means the other mode of a model with two


class NLL(NamedTuple):
    """Nats. per_token `[B, L]`: entry i belongs to token i (contributions that sum to the estimate). mean and its
    ci95: per weighted token, over rows as documents (nan, nan for two rows, which tell too little), or over draws alone
    if there is only one row. total: the sum."""

    per_token: np.ndarray
    mean: float
    ci95: tuple[float, float]
    total: float


class CheckpointId(NamedTuple):
    """Which checkpoint a model is: the steps it was trained for, and the config's hash."""

    step: int
    config_sha256: str


@jax_settings.pinned()
def load(path: str | Path, weights: str = "ema", dtype: str = "float32", allow_pickle: bool = False,
         step: int | str = "latest") -> "LM":
    """The model in `path`: a run directory; a published checkpoint (a directory with config.json and safetensors, or a
    GGUF file); or, where no such path is, "organisation/name" on the Hugging Face Hub.

    weights: "ema" or "params" ("ema" falls back to the parameters where no average was kept). dtype: of the
    computation, and of the parameters of a published checkpoint: "float32" or "bfloat16". allow_pickle: of a published
    checkpoint, read pickled weights too (tensors alone; needs torch). step: of a run, "latest", "best" (the lowest
    bound of those that were validated) or a number.
    Raises UserError if there is nothing to load or it does not fit.
    """
    from bd3lm_jax.checkpoints import hf, restore

    plugins.load_installed()
    name, path = str(path), hf.local(path)
    if hf.is_published(path):
        restore.refuse_step(path, step)
        found, params = hf.read_model(path, dtype=dtype, weights=weights, allow_pickle=allow_pickle)
        return published(found, params, hf.read_tokenizer(path, found), dtype, name)
    run = restore.restore(path, weights, dtype, None, step)
    return LM(run.config, run.params, run.tokenizer, run.model, run.data.seq_len,
              CheckpointId(run.step, run.config_sha256), name=name)


def published(found: ModelSpec, params: dict, tokenizer: Tokenizer | None, dtype: str, name: str = "") -> "LM":
    """The model of a published checkpoint; its tokenizer knows the mask token (`hf.with_network_mask`)."""
    config = LMConfig(found.model, found.objective)
    return LM(config, params, tokenizer, models.build(found.model, jnp.dtype(dtype)), found.length,
              mask_id=found.mask_id if tokenizer is None else None, any_length=True, name=name)


class LM:
    """`config`, `params`, `tokenizer` (None if the checkpoint brings none) and what can be done with them.

    config: the network and its objective; of a run all of its Config. context: the most tokens a row may hold (what the
    model was trained on). trained: None if it is no run's. mask_id: -1 if there is no mask token; None for the
    tokenizer's, and without tokenizer the last one. any_length: it was trained on rows of many lengths, as published
    checkpoints are; a run only knows the rows of its config. name: for people, the path it was loaded from.
    """

    def __init__(self, config: LMConfig, params: dict[str, Any], tokenizer: Tokenizer | None, model: Backbone,
                 context: int, trained: CheckpointId | None = None, mask_id: int | None = None,
                 any_length: bool = False,
                 name: str = ""):
        self.config, self.params, self.tokenizer, self.model, self.context = config, params, tokenizer, model, context
        self.trained, self._mask_id, self._any_length, self.name = trained, mask_id, any_length, name
        self._is_resized = False

    def __repr__(self) -> str:
        model, objective = self.config.model, self.config.diffusion
        size = f"block_size={self.config.block_size}, " * (not objective.causal)
        step = f", step={self.trained.step}" if self.trained else ""
        parameters = sum(x.size for x in jax.tree.leaves(self.params))
        return (f"LM({self.name!r}, {model.kind}, {objective.kind}, parameters={parameters:,}, {size}"
                f"length={self.context}, vocab_size={model.vocab_size}{step})")

    @property
    def special(self) -> SpecialIds:
        """Mask and end token, -1 where there is none (no end token without tokenizer)."""
        if self.tokenizer is None:
            mask_id, end_id = self.config.model.vocab_size - 1, -1
        else:
            mask_id, end_id = self.tokenizer.mask_id, self.tokenizer.end_id
        return SpecialIds(mask_id if self._mask_id is None else self._mask_id, end_id)

    @property
    def data(self) -> DataConfig | None:
        """What it was trained on; None for a published checkpoint, which brings no corpus."""
        return self.config.data if isinstance(self.config, Config) else None

    def run_config(self, path: str) -> Config:
        """The config of the run in `path`. UserError for a published checkpoint, which brings no corpus."""
        if not isinstance(self.config, Config):
            raise UserError(f"{path} is a published checkpoint, which brings no corpus: give a run directory ("
                            f"{command_line('convert')} --format=native makes one)")
        return self.config

    def at_block_size(self, size: int) -> "LM":
        """This model with blocks of `size` tokens, one of those that it was trained with (`diffusion.kind="mixed"`)."""
        config = self.config.at_trained_block_size(size)
        if config is self.config:
            return self
        known = self.__dict__.setdefault("_at_sizes", {})  # each keeps its programs
        if size not in known:
            known[size] = LM(config, self.params, self.tokenizer, self.model, self.context, mask_id=self._mask_id,
                             name=self.name)
        return known[size]

    @functools.cached_property
    def autoregressive(self) -> "LM":
        """The same weights as an autoregressive model. UserError for a model that was not trained as one, too."""
        if self.config.diffusion.causal:
            return self
        config = self.config.autoregressive
        if config is None:
            raise UserError(f"sampler '{AUTOREGRESSIVE}' is for models that predict the next token, and this one is of "
                            f"kind '{self.config.diffusion.kind}': train with algo=joint, or use "
                            f"{self.config.diffusion.sampler}")
        return LM(config, self.params, self.tokenizer, self.model._replace(config=config.model), self.context,
                  self.trained, self._mask_id, self._any_length, self.name)

    def for_estimator(self, estimator: str) -> "LM":
        """This model as an estimator measures it: "nll" as an autoregressive one where it is one, too."""
        return self.autoregressive if estimator == "nll" and self.config.autoregressive else self

    def resolve_options(self, options: dict[str, Any]) -> tuple["LM", dict[str, Any]]:
        """This model as generation options name it, and the options that are left: the sampler "ar" writes
        autoregressively, and of a model with several block sizes one may be named."""
        if options.get("sampler") == AUTOREGRESSIVE:
            return self.autoregressive, {**options, "sampler": self.autoregressive.config.diffusion.sampler}
        size = options.get("block_size")
        if self.config.diffusion.kind != "mixed" or size in (None, AUTO):
            return self, options
        return self.at_block_size(size), {**options, "block_size": None}

    def at_length(self, length: int) -> "LM":
        """This model as it writes texts of `length` tokens: networks that see whole rows, and were trained on rows of
        many lengths, on as many places."""
        size = self.config.block_size
        if not self._any_length or not 0 < length < size or size != self.context:
            return self
        config, known = self._for_rows(length), self.__dict__.setdefault("_canvases", {})
        if length not in known:
            known[length] = LM(config, self.params, self.tokenizer, self.model, self.context, mask_id=self._mask_id,
                               name=self.name)
            known[length]._is_resized = True
        return known[length]

    @property
    def is_bidirectional(self) -> bool:
        """Whether one block is all that the model ever sees (MDLM, LLaDA)."""
        return self._is_resized or not self.config.diffusion.causal and self.config.block_size >= self.context

    @jax_settings.pinned()
    def logits(self, xt, x0=None, *, sigma=None) -> jax.Array:
        """Raw network output, float32 `[B, L, V]`, before SUBS.

        With x0: the two-stream pass at the model's block size. Without: a plain pass, causal for AR, else block causal.
        sigma = -log(alpha): `[B]` conditions both streams, as published; `[B, K]` the noised blocks only (clean: 0).
        Raises UserError for ids out of range and for a missing sigma on a time-conditioned model.
        """
        xt = self._check_ids(xt)
        sigma = self._check_sigma(sigma, xt.shape)
        if x0 is None:
            if self.config.model.first_noised_layer:
                raise UserError(f"model.decoder_layers={self.config.model.decoder_layers}: a split network predicts "
                                "noised blocks after clean ones and has no plain pass, give x0")
            return self._plain_logits(self.params, xt, sigma)
        x0 = self._check_ids(x0)
        if x0.shape != xt.shape:
            raise UserError(f"x0 has shape {x0.shape}, expected that of xt, {xt.shape}")
        return self._two_stream_logits(self.params, xt, x0, sigma)

    @jax_settings.pinned()
    def nll(self, tokens, *, weights=None, estimator: str = "exact_count", draws: int = 1, seed: int = 0) -> NLL:
        """Bound on the negative log-likelihood of each row (exact for AR and block size 1).

        tokens: ids `[B, L]`, any L up to the context. weights: `[B, L]`, which tokens count and how much (None: all;
        for AR without a beginning token position 0 counts 0). What has weight 0 at the beginning of a row is given,
        that is, never masked: the bound is that of the rest after this prompt. Weights of 0 behind it only count
        nothing. estimator: see `estimators.py` ("importance" learns from a whole split: `python -m launch eval`); "nll"
        of a model that also predicts the next token is the likelihood under its autoregressive mode.
        draws: independent ones.
        """
        lm = self.for_estimator(estimator)
        if lm is not self:
            return lm.nll(tokens, weights=weights, estimator=estimator)
        tokens = np.asarray(self._check_ids(tokens))
        self._check_mask()
        check_bos(self.config.diffusion, self.config.model, self.special.end)
        if (tokens == self.special.mask).any():
            raise UserError(f"the tokens hold the mask token {self.special.mask}, which is never part of a text")
        objective = self.config.diffusion
        config = self._for_rows(tokens.shape[1])
        chosen = estimators.make(estimator, config)
        if chosen.needs_pilot:
            raise UserError(f"estimator '{estimator}' learns from a split: use it with eval, and exact_count here")
        evaluate.check_draws(draws)
        batch, length = tokens.shape
        weights = np.ones((batch, length)) if weights is None else np.asarray(weights, np.float64)
        if weights.shape != tokens.shape:
            raise UserError(f"weights have shape {weights.shape}, expected that of tokens, {tokens.shape}")
        if not objective.predicts_first_token:
            weights = weights * (np.arange(length) > 0)
        scored_BxL = np.cumsum(weights != 0, axis=1) > 0
        estimates_BxUxL = self._estimates(chosen, config.diffusion, tokens, scored_BxL, draws, seed)
        estimates_BxUxL *= weights[:, None]
        per_token = estimates_BxUxL.mean(1)
        mean, low, high = stats.ratio_interval(per_token.sum(1), weights.sum(1))
        if batch == 1:
            margin = stats.mc_margin(estimates_BxUxL.sum(-1).T) / weights.sum()
            low, high = mean - margin, mean + margin
        return NLL(per_token, mean, (low, high), float(per_token.sum()))

    def _for_rows(self, length: int) -> LMConfig:
        """The config for rows of `length` tokens: a block that is longer than the row is the row, and nothing is
        padded to a context of thousands of tokens."""
        objective = self.config.diffusion
        if objective.block_size <= length or objective.block_size_is_fixed:
            return self.config
        return self.config.at_block_size(length)

    def _estimates(self, estimator, objective, tokens_BxL, scored_BxL, draws: int, seed: int) -> np.ndarray:
        """Contributions of the tokens in nats, float64 `[B, U, L]`, of U independent estimates."""
        batch, length = tokens_BxL.shape
        padded, scored = (np.pad(x, ((0, 0), (0, -length % objective.block_size))) for x in (tokens_BxL, scored_BxL))
        position, _ = forward.single_document_rows(padded)
        segment = jnp.broadcast_to(jnp.arange(padded.shape[1]) < length, padded.shape).astype(jnp.int32)
        rounds = draws if estimator.replicates > 1 else 1
        estimates = []
        for round_ in range(rounds):
            key = jax.random.fold_in(jax_settings.key(seed), round_)
            parts = [self._scores(estimator, objective)(self.params, key, index, jnp.arange(batch), padded, position,
                                                        segment, scored)[0]
                     for index in range(estimator.num_passes(1))]
            estimates.append(np.asarray(np.mean(parts, axis=0, dtype=np.float64))[..., :length])
        return np.concatenate(estimates, axis=1)

    @jax_settings.pinned()
    def generate(self, prompts=None, *, num: int = 1, length: int, **options) -> list[Sample]:
        """Write texts of `length` tokens (prompt included), or up to a stop.

        prompts: texts or lists of ids, `num` samples of each; None: `num` from nothing. options: fields of
        `options.Options` (sampler, temperature, top_k, top_p, steps, threshold, stop, window, seed, ...). Request i
        is keyed by (seed, i), whatever else is in the batch.
        """
        self._check_mask()
        lm, options = self.resolve_options(options)
        return generation.generate(lm.at_length(length), prompts, num, length, lm._options(options))

    def stream(self, prompt=None, *, length: int, **options) -> Iterator[stream.Committed | stream.Revision]:
        """The text of one prompt while it is written: `Committed(text)` stays, `Revision(text)` is the present block.

        The same tokens as `generate` writes with the same options.
        """
        self._check_mask()
        lm, options = self.resolve_options(options)
        return jax_settings.iterate(stream.watch(lm.at_length(length), prompt, length, lm._options(options)))

    @jax_settings.pinned()
    def infill(self, texts, *, draws: int = 4, **options) -> list[infill.Infill]:
        """Fill `[MASK]`, `[MASK:n]` and `[MASK:a-b]` in texts; see `infill.infill`."""
        lm, options = self.resolve_options(options)
        return infill.infill(lm, texts, lm._options(options), draws=draws)

    def _options(self, given: dict[str, Any]) -> Options:
        """With the sampler that such a model is used with, unless another one is named."""
        return make_options(**{"sampler": self.config.diffusion.sampler} | given)

    @jax_settings.pinned()
    def score(self, prompts, continuations, *, estimator: str = "exact_count", draws: int = 4, seed: int = 0,
              greedy: bool = False, batch: int = 16) -> list[conditional.Score]:
        """Log-likelihood of each continuation after its prompt: exact for AR and block size 1, else a lower bound with
        its Monte-Carlo error; see `conditional.score`."""
        return conditional.score(self.for_estimator(estimator), prompts, continuations, estimator=estimator,
                                 draws=draws, seed=seed, greedy=greedy, batch=batch)

    @jax_settings.pinned()
    def choose(self, prompt, options, *, normalise: str = "none", estimator: str = "exact_count", draws: int = 4,
               seed: int = 0, batch: int = 16) -> conditional.Choice:
        """The likeliest of several continuations under common masks; see `conditional.choose`."""
        return conditional.choose(self.for_estimator(estimator), prompt, options, normalise=normalise,
                                  estimator=estimator, draws=draws, seed=seed, batch=batch)

    def _scores(self, estimator, objective):
        """Jitted once for each estimator and objective."""
        known = self.__dict__.setdefault("_known_scores", {})
        if (estimator, objective) not in known:
            known[estimator, objective] = jax.jit(evaluate.make_scores(self.model, objective, estimator, self.special,
                                                                       forward.DEFAULT_EXECUTION, 1))
        return known[estimator, objective]

    @functools.cached_property
    def _plain_logits(self):
        objective = self.config.diffusion

        @jax.jit
        def plain(params, ids, sigma):
            length = ids.shape[1]
            size = max(min(objective.block_size, length), 1)  # a block longer than the row is the row
            ids = jnp.pad(ids, ((0, 0), (0, -length % size)))
            position, _ = forward.single_document_rows(ids)
            segment = (position < length).astype(jnp.int32)
            h = forward.one_stream(self.model, params, ids, position, segment, rule=objective.attention_rule,
                                   block_size=size, sigma_Bxn=sigma, execution=forward.DEFAULT_EXECUTION)
            return trunk.logits(self.model, params, h, sigma)[:, :length]
        return plain

    @functools.cached_property
    def _two_stream_logits(self):
        @jax.jit
        def two_stream(params, xt, x0, sigma):
            length = xt.shape[1]
            size = max(min(self.config.block_size, length), 1)
            xt, x0 = (jnp.pad(x, ((0, 0), (0, -length % size))) for x in (xt, x0))
            position, _ = forward.single_document_rows(x0)
            segment = (position < length).astype(jnp.int32)
            noised_sigma = None if sigma is None else sigma[:, None]
            clean_sigma = sigma if sigma is not None and sigma.shape[1] == 1 else None
            h = forward.two_stream(self.model, params, xt[:, None], x0, position, segment, block_size=size,
                                   rule=self.config.diffusion.attention_rule, sigma_BxMxn=noised_sigma,
                                   clean_sigma_Bx1=clean_sigma, execution=forward.DEFAULT_EXECUTION)
            return trunk.logits(self.model, params, h, noised_sigma)[:, 0, :length]
        return two_stream

    def _check_ids(self, ids) -> jax.Array:
        ids, vocab = np.asarray(ids), self.config.model.vocab_size
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise UserError(f"token ids have shape {ids.shape} and type {ids.dtype}, expected integers [batch, length]")
        if ids.size and (ids.min() < 0 or ids.max() >= vocab):
            bad_id = ids.min() if ids.min() < 0 else ids.max()
            raise UserError(f"token id {bad_id} is out of range, expected 0 to {vocab - 1}")
        if ids.shape[1] > self.context:
            raise UserError(f"rows have {ids.shape[1]} tokens, expected at most {self.context}, what the model was "
                            "trained on")
        return jnp.asarray(ids, jnp.int32)

    def _check_mask(self) -> None:
        check_mask(self.config.diffusion, self.special.mask)

    def _check_sigma(self, sigma, shape) -> jax.Array | None:
        if not trunk.is_time_conditioned(self.config.model):
            return None
        if sigma is None:
            raise UserError("this model is conditioned on the noise level: give sigma = -log(alpha), [batch] or "
                            "[batch, blocks]")
        sigma, blocks = jnp.asarray(sigma, jnp.float32), -(-shape[1] // self.config.block_size)
        if sigma.shape not in ((shape[0],), (shape[0], blocks)):
            raise UserError(f"sigma has shape {sigma.shape}, expected ({shape[0]},) or ({shape[0]}, {blocks})")
        return sigma.reshape(shape[0], -1)

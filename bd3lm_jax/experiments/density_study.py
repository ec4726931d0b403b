"""What priority masks do to trained runs: the bound on dense and on other tokens, and how masks and gradients behave.

    from bd3lm_jax.experiments.density_study import study
    study(["runs/uniform", "runs/soft", "runs/hard"], split="test", batch=16, draws=16, seed=0)

All runs are scored with the same tags, those of the first run that was trained with some (on all documents), under the
bound of uniform masks.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from bd3lm_jax.config import Config
from bd3lm_jax.core import jax_settings, log, stats
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.log import read_metrics
from bd3lm_jax.data import density
from bd3lm_jax.data.loader import Loader
from bd3lm_jax.data.prepare import prepare
from bd3lm_jax.experiments.variance import make_measure
from bd3lm_jax.likelihood.evaluate import open_run
from bd3lm_jax.likelihood.options import EstimatorOptions
from bd3lm_jax.lm import LM, load
from bd3lm_jax.models import trunk

DOMAINS = {"python_arithmetic": ("python_sources", "arithmetic")}  # sources that are scored in parts
BY_TEXT = ("python", "arithmetic")  # densities that mean the same in every part
PARTS = ("dense", "other")
SPIKE = 3  # a gradient norm so many times the median is a spike
WARM_UP = 0.1  # part of the logged steps that are left out of it


def study(workdirs: list[str], *, split: str, batch: int, draws: int, seed: int) -> list[dict[str, Any]]:
    """One row a run, also shown as tables on stderr.

    Keys: `run`, `masks` (the objective in words), `block_size`; `bounds`: by domain, "dense" and "other" with `nll`,
    `nll_ci95` (nats a token; over documents and noise) and `tokens`, None where there are none; `masked_run`: mean
    number of masked tokens in a row without a gap, of the run's own noise; `gradient`: E|g - E g|^2 of the mean loss of
    half a batch over the squared mean loss, all with the network of the first run; `grad_norm_max` of the training over
    its median, and `spikes`: the part of the logged steps above SPIKE medians (without warm-up).
    Raises UserError if no run was trained with tags, for runs of other blocks, networks or tokenizers than the first,
    an odd batch or fewer than 2 draws.
    """
    if batch < 2 or batch % 2 or draws < 2:
        raise UserError(f"batch is {batch} and draws {draws}, expected an even batch of at least 2 and 2 draws")
    runs = {workdir: load(workdir) for workdir in workdirs}
    _check(runs)
    configs = {workdir: lm.run_config(workdir) for workdir, lm in runs.items()}
    tags = _tags(list(configs.values()))
    first_dir, first = next(iter(runs.items()))
    measure, rows = jax.jit(make_measure(first, configs[first_dir])), []
    for workdir, lm in runs.items():
        log.note(f"{workdir}: scoring")
        row = {"run": workdir, "masks": describe(configs[workdir]), "block_size": lm.config.block_size,
               "bounds": _bounds(workdir, tags, split, draws=1, seed=seed)}
        rows.append(row | _noise(lm, first, measure, split, batch, draws, seed) | _norms(workdir))
    _show(rows, f"{split}, tagged by {tags}")
    return rows


def _check(runs: dict[str, LM]) -> None:
    first_dir, first = next(iter(runs.items()))
    for workdir, lm in runs.items():
        if not lm.config.diffusion.uses_mask_token or trunk.is_time_conditioned(lm.config.model):
            raise UserError(f"{workdir} predicts no masked tokens without a noise level: give masked models with "
                            "model.time_conditioning=False")
        if "density" in lm.config.diffusion.extra_batch_keys and not lm.run_config(workdir).data.density:
            raise UserError(f"{workdir} learnt its densities (noise.adaptive_noise='running_loss'), which are not "
                            "measured here: give runs with data.density")
        if _comparable(lm) != _comparable(first):
            raise UserError(f"{workdir} has another block size, network or tokenizer than {first_dir}: give runs that "
                            "differ in their masks")


def _comparable(lm: LM) -> tuple:
    """Equal for models of which only the masks they were trained with may differ."""
    return lm.config.block_size, lm.config.model, getattr(lm.tokenizer, "identity", None)


def _tags(configs: list[Config]) -> str:
    found = [config.data.density for config in configs
             if config.data.density and not density.is_continuous(config.data.density)]
    if not found:
        raise UserError("none of these runs was trained with tags (data.density, such as 'python'): give one that was")
    return found[0]


def describe(config: Config) -> str:
    """The masks of a run in words."""
    objective, words = config.diffusion, []
    if "density" in objective.extra_batch_keys:
        words = ["hard" if getattr(objective, "hard", False) else f"w={getattr(objective, 'weight', 1):g}",
                 f"{config.data.density_fraction:.0%} of documents tagged"]
        words += ["importance weights"] * objective.needs_density_tags
    words += ["pairs"] * (objective.noise_sample_multiple > 1)
    return ", ".join([objective.kind, *words])


class TaggedRows:
    """Rows in which every part of a document that lies in one row is two: its dense tokens and its others."""

    def __init__(self, rows: Any):
        """rows: prepared ones with densities."""
        self._rows, self.length, self.meta = rows, rows.length, rows.meta
        self.tokens, self.segments, self.positions, self.scored = (
            rows.tokens, rows.segments, rows.positions, rows.scored)
        ids = np.arange(len(rows))
        documents_RxL = rows.documents(ids).astype(np.int64)
        dense_RxL = rows.density(ids) >= 0.5
        keys_RxL = (documents_RxL * len(rows) + ids[:, None]) * 2 + dense_RxL
        real_RxL = documents_RxL >= 0
        units, index = np.unique(keys_RxL[real_RxL], return_inverse=True)
        self._units_RxL = np.full(documents_RxL.shape, -1, np.int32)
        self._units_RxL[real_RxL] = index
        self.dense_N, self.row_N, self.document_N = units % 2 == 1, units // 2 % len(rows), units // 2 // len(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def documents(self, row_ids: np.ndarray) -> np.ndarray:
        """int32 [n, L]: index of the part; -1 = padding."""
        return self._units_RxL[row_ids]

    def intervals(self, nats_UxN: np.ndarray, tokens_N: np.ndarray) -> dict[str, dict | None]:
        """The bound on dense and on other tokens from U estimates of every part: as in `stats.two_part_interval`."""
        found = {}
        for name, chosen in zip(PARTS, (self.dense_N, ~self.dense_N)):
            if not chosen.any():
                found[name] = None
                continue
            documents, rows = (np.unique(index[chosen], return_inverse=True)[1]
                               for index in (self.document_N, self.row_N))
            by_document, by_row = (np.array([np.bincount(index, nats) for nats in nats_UxN[:, chosen]])
                                   for index in (documents, rows))
            tokens = np.bincount(documents, tokens_N[chosen])
            nll = stats.two_part_interval(by_document, by_row, tokens).non_negative()
            found[name] = {"nll": nll.value, "nll_ci95": [nll.low, nll.high], "tokens": int(tokens_N[chosen].sum())}
        return found


def _bounds(workdir: str, tags: str, split: str, draws: int, seed: int) -> dict[str, dict]:
    run = open_run(workdir)
    data = dataclasses.replace(run.data, density=tags, density_fraction=1.0)
    parts = DOMAINS.get(data.source, (data.source,)) if tags in BY_TEXT else (data.source,)
    found = {}
    for source in parts:
        tagged = TaggedRows(
            prepare(dataclasses.replace(data, source=source), split, run.config.block_size, run.tokenizer))
        measured = run.evaluator.measure(run.params, tagged, EstimatorOptions(draws=draws, seed=seed))
        found[source] = tagged.intervals(measured.documents_UxN, measured.tokens_N)
    return found


def _noise(lm: LM, first: LM, measure, split: str, batch: int, draws: int, seed: int) -> dict[str, float]:
    """Lengths of masked runs, and the variance of the gradient."""
    objective = lm.config.diffusion
    assert lm.tokenizer is not None and lm.data is not None  # of a run
    loader = Loader(prepare(lm.data, split, lm.config.block_size, lm.tokenizer), batch, seed, None)
    noise_samples = objective.noise_sample_multiple
    draw = jax.jit(objective.corrupt, static_argnums=(3, 4, 5))
    lengths, gradients, losses = [], [], []
    for step in range(draws):
        rows = loader.get(step)[1]
        key = jax.random.fold_in(jax_settings.key(seed), step)
        needed = {name: rows.pop(name) for name in objective.extra_batch_keys}
        noised = draw(key, rows["tokens"], rows["segments"], noise_samples, lm.special.mask, lm.special.end, **needed)
        lengths.append(masked_runs(np.asarray(noised.weight_BxMxL) > 0))
        nats, gradient = measure(first.params, noised, rows)
        gradients.append(float(gradient) / noise_samples**2)
        losses.append(float(np.sum(nats * noised.weight_BxMxL)) / noise_samples / np.sum(rows["segments"] != 0))
    return {"masked_run": float(np.concatenate(lengths).mean()),
            "gradient": float(np.mean(gradients) / np.mean(losses) ** 2)}


def masked_runs(masked: np.ndarray) -> np.ndarray:
    """Lengths of all stretches of masked tokens that cannot be made longer, over the last axis of a bool array."""
    edges = np.diff(np.pad(masked.reshape(-1, masked.shape[-1]).astype(np.int8), ((0, 0), (1, 1))), axis=1)
    return np.argwhere(edges == -1)[:, 1] - np.argwhere(edges == 1)[:, 1]


def _norms(workdir: str) -> dict[str, float | None]:
    norms = [line["train/grad_norm"] for line in read_metrics(workdir) if "train/grad_norm" in line]
    norms = np.array(norms[int(WARM_UP * len(norms)):])
    if not norms.size:
        return {"grad_norm_max": None, "spikes": None}
    relative = norms / np.median(norms)
    return {"grad_norm_max": float(relative.max()), "spikes": float((relative > SPIKE).mean())}


def _show(rows: list[dict], title: str) -> None:
    def bound(part):
        return "-" if part is None else f"{part['nll']:.3f} ({stats.format_interval(part['nll_ci95'], '.3f')})"

    def number(value):
        return "-" if value is None else f"{value:.3g}"

    log.table(f"{title}: nats a token", ("run", "masks", "text", *PARTS),
              [(row["run"], row["masks"], domain, *(bound(parts[name]) for name in PARTS))
               for row in rows for domain, parts in row["bounds"].items()])
    log.table("masks and gradients", ("run", "masked run", "gradient variance", "largest norm / median", "spikes"),
              [(row["run"], *(number(row[key]) for key in ("masked_run", "gradient", "grad_norm_max", "spikes")))
               for row in rows])

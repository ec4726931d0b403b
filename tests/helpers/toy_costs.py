"""Models without a network, whose tokens cost what a function says, measured as `evaluate.Evaluator` measures them."""

import dataclasses

import numpy as np

from bd3lm_jax.config import Config
from bd3lm_jax.diffusion.ar import AR
from bd3lm_jax.likelihood.estimators import SinglePass
from bd3lm_jax.likelihood.evaluate import LikelihoodResult, LoadedRun
from configs import tiny


class Costs:
    """In place of `evaluate.Evaluator`. cost: (ids, bytes of text, both [n, L]) -> nats [n, L]."""

    def __init__(self, cost):
        self.cost = cost

    def measure(self, params, rows, options=None, **settings) -> LikelihoodResult:
        del params, options, settings
        ids = np.arange(len(rows))
        measured = LikelihoodResult(SinglePass(AR(bos=True)), 1, 0, 1, ids, self.documents)
        nats_BxL = np.where(rows.scored(ids), self.cost(rows.tokens(ids), rows.sizes(ids)), 0)
        blocks = np.zeros((*nats_BxL.shape[:1], 1, nats_BxL.shape[1]), int)
        measured.add(0, [(nats_BxL[:, None], blocks, blocks)], self.documents(rows, ids))
        return measured

    @staticmethod
    def documents(rows, ids) -> np.ndarray:
        return np.where(rows.scored(ids), rows.documents(ids), -1)


def causal_config(length: int, bos: bool, layout: str = "wrap") -> Config:
    """Of an autoregressive model of rows of so many tokens, read from *Persuasion*."""
    config = Config.from_dict(tiny.get_config("algo=ar").to_dict())
    objective = dataclasses.replace(config.diffusion, bos=bos)
    return dataclasses.replace(config, diffusion=objective,
                               data=dataclasses.replace(config.data, seq_len=length, packing=layout))


def opened(name: str, config: Config, tokenizer, cost) -> LoadedRun:
    """A model as `evaluate.open_run` gives it."""
    return LoadedRun(name, config, config.data, tokenizer, None, Costs(cost), 1, "hash")

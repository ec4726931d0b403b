"""Models of this library in lm-evaluation-harness (`pip install lm-eval`), as the model "bd3lm_jax".

The harness finds models by import alone, so start its command line through this module; everything after it is the
harness's own:

    python -m bd3lm_jax.harness --model bd3lm_jax --model_args path=runs/tiny,draws=4 --tasks arc_easy --batch_size 16

or call `bd3lm_jax.harness.register()` before `lm_eval.simple_evaluate(model="bd3lm_jax", model_args=..., ...)`.
`model_args` are the arguments of `Harness`; with the harness's `--apply_chat_template` the contexts are written by the
chat template beside the tokenizer, and its special tokens are read as such. Autoregressive models are scored exactly,
masked diffusion by the bound of `conditional.py`; options of one question share their masks. A text without context
follows an end token.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bd3lm_jax.checkpoints import hf
from bd3lm_jax.core import log
from bd3lm_jax.core.errors import UserError, nearest, one_line
from bd3lm_jax.data.chat_template import ChatTemplate
from bd3lm_jax.data.texts import decode_continuation
from bd3lm_jax.generation.options import Options, make_options
from bd3lm_jax.likelihood import conditional
from bd3lm_jax.lm import load

NAME = "bd3lm_jax"
LENGTH_STEP = 64  # texts are written to multiples of it, so that few lengths compile
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # first one given counts
NOT_MODEL_ARGUMENTS = ("stop", "seed", "forced", "sampler")  # fields of Options that are no further model argument
SAMPLER_OPTIONS = tuple(field.name for field in dataclasses.fields(Options) if field.name not in NOT_MODEL_ARGUMENTS)
GENERATION = ("until", "do_sample", *SAMPLER_OPTIONS, *LIMITS)
CONTINUE = "\ue000continue\ue001"  # marks the end of a message that is to be continued; no text holds it


class Harness:
    """What the harness asks of a model (`lm_eval.api.model.LM`).

    path: a run directory or a published checkpoint. weights: "ema" or "params". estimator, draws, seed: as in
    `conditional.score`. greedy: whether `loglikelihood` finds out if greedy decoding writes the continuation (up to S
    more passes; tasks of multiple choice do not use it; without it the answer is no). sampler: of `generate_until`,
    "" for the usual one. Every other option of `LM.generate` (steps, threshold, block_size, guidance, min_p, ...) is
    an argument too; what a task asks for itself comes first. batch_size: rows a pass, "auto" for 16. device,
    max_batch_size: given by the harness, unused.
    """

    def __init__(self, path: str = "", weights: str = "ema", estimator: str = "exact_count", draws: int = 4,
                 seed: int = 0, greedy: bool = True, sampler: str = "", batch_size: int | str = "auto",
                 max_batch_size: Any = None, device: Any = None, **options: Any):
        super().__init__()
        del max_batch_size, device
        for name in options:
            known = ("path", "weights", "estimator", "draws", "seed", "greedy", "sampler", "batch_size")
            if name not in SAMPLER_OPTIONS:
                raise UserError(f"unknown model argument '{name}': {nearest(name, (*known, *SAMPLER_OPTIONS))}")
        if not path:
            raise UserError("no model to load: give --model_args path=RUN_DIRECTORY")
        self.path, self.lm = str(path), load(str(path), weights)
        if self.lm.tokenizer is None:
            raise UserError(f"{path} has no tokenizer, and the harness asks in texts")
        self._tokenizer = self.lm.tokenizer
        self.batch = _batch_rows(batch_size)
        self.sampler, self.seed, self.options = sampler, seed, options
        make_options(**options)  # their types and ranges
        self._template: ChatTemplate | None = None
        self._chat = False
        self.scoring = {"estimator": estimator, "draws": draws, "seed": seed, "batch": self.batch}
        self.greedy, self._mc_se = greedy, []

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's caches."""
        return f"{NAME}-{self._tokenizer.identity}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the chat template that is used from now on: True for the usual one, or its name; None for
        none. The harness keeps it with the results."""
        self._chat = chat_template not in (False, None)
        if not self._chat:
            return None
        return self._read_template("" if isinstance(chat_template, bool) else chat_template).source

    def _read_template(self, name: str) -> ChatTemplate:
        self._template = ChatTemplate(hf.local(self.path), name)
        return self._template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a dialogue; without `add_generation_prompt` its last message is to be continued.

        A dialogue that the template refuses is tried again without its system messages, as the harness's own class of
        models does it. UserError if it is refused then, too, or has no others.
        """
        template, self._chat = self._template or self._read_template(""), True
        try:
            return _chat_text(template, chat_history, add_generation_prompt)
        except UserError as error:
            without_system = [message for message in chat_history if message["role"] != "system"]
            if len(without_system) in (0, len(chat_history)):
                raise
            text = _chat_text(template, without_system, add_generation_prompt)
            log.note_once(f"warning: {error}; system messages are left out")
            return text

    def _encode(self, text: str) -> np.ndarray:
        """A context; special tokens in it are meant where a template wrote it."""
        return self._tokenizer.encode_special(text) if self._chat else self._tokenizer.encode(text)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness keeps with the results; mean_mc_se: of all log-likelihoods so far, in nats."""
        mean = float(np.mean(self._mc_se)) if self._mc_se else None
        return {"path": self.path, **self.scoring, "sampler": self.sampler, **self.options, "mean_mc_se": mean}

    def loglikelihood(self, requests: Sequence, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, is greedy) of every request's (context, continuation). A context that is too long
        loses its beginning."""
        del disable_tqdm
        pairs = [self._truncate_pair(*conditional.encode_pair(self._tokenizer, *request.args, special=self._chat))
                 for request in requests]
        return [(scored.nats, bool(scored.greedy)) for scored in self._score(pairs, self.greedy)]

    def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of every request's whole text, cut into pieces by `windows`."""
        del disable_tqdm
        pieces, owners = [], []
        for owner, request in enumerate(requests):
            ids = self._tokenizer.encode(request.args[0])
            cut = list(windows(ids, self._prefix_ids(), self.lm.context))
            pieces += cut
            owners += [owner] * len(cut)
        total = np.zeros(len(requests))
        np.add.at(total, owners, [scored.nats for scored in self._score(pieces, False)])
        return total.tolist()

    def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
        """The text after every request's context, by its options: `until` (strings, not part of the answer),
        max_gen_toks (256), do_sample (else the likeliest tokens), and the options of `LM.generate`."""
        del disable_tqdm
        groups: dict[tuple, list[tuple[int, np.ndarray, int]]] = {}
        for i, request in enumerate(requests):
            context, arguments = request.args
            options, limit = self._options(arguments)
            prompt, limit = self._truncate_prompt(self._encode(context), limit)
            length = min(-(-(len(prompt) + limit) // LENGTH_STEP) * LENGTH_STEP, self.lm.context)
            groups.setdefault((length, tuple(options.items())), []).append((i, prompt, limit))
        texts = [""] * len(requests)
        for (length, options), members in groups.items():
            for first in range(0, len(members), self.batch):
                chunk = members[first:first + self.batch]
                samples = self.lm.generate([prompt for _, prompt, _ in chunk], length=length, seed=self.seed,
                                           **dict(options))
                for (i, prompt, limit), sample in zip(chunk, samples):
                    text = sample.text if len(sample.tokens) <= limit else None
                    if text is None:
                        text = decode_continuation(self._tokenizer, prompt, sample.tokens[:limit])
                    texts[i] = text
        return texts

    def _score(self, pairs: list, greedy: bool) -> list[conditional.Score]:
        prompts, continuations = zip(*pairs) if pairs else ((), ())
        scored = conditional.score(self.lm, prompts, continuations, greedy=greedy, **self.scoring)
        self._mc_se += [one.mc_se for one in scored]
        return scored

    def _prefix_ids(self) -> list[int]:
        """What a text without context begins with: the end token before it, unless the model puts one there itself or
        has learnt rows that all begin with a document."""
        objective, data = self.lm.config.diffusion, self.lm.data
        known = objective.begins_with_end_token or not objective.causal and data is not None and data.packing == "pack"
        return [] if known else [self.lm.special.end]

    def _truncate_pair(self, prompt, continuation) -> tuple[np.ndarray, np.ndarray]:
        prompt = prompt if len(prompt) else np.array(self._prefix_ids(), np.int32)
        return prompt[max(len(prompt) + len(continuation) - self.lm.context, 0):], continuation

    def _truncate_prompt(self, prompt, limit: int) -> tuple[np.ndarray, int]:
        """The end of a prompt, and the tokens that can be written after it: it gives way to them, but keeps half."""
        context = self.lm.context
        prompt = prompt if len(prompt) else np.array(self._prefix_ids(), np.int32)
        prompt = prompt[max(len(prompt) - max(context - limit, context // 2), 0):]
        return prompt, min(limit, context - len(prompt))

    def _options(self, arguments: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """Keywords of `LM.generate`, and the most tokens to write."""
        for name in arguments:
            if name not in GENERATION:
                raise UserError(f"unknown generation argument '{name}': {nearest(name, GENERATION)}")
        until = arguments.get("until") or []
        stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
        limit = int(next((arguments[name] for name in LIMITS if arguments.get(name) is not None), 256))
        sampling_arguments = ("temperature", "top_k", "top_p", "min_p")
        options: dict[str, Any] = {"temperature": 0.0, **self.options, "stop": stop}
        options |= {name: arguments[name] for name in SAMPLER_OPTIONS
                    if arguments.get(name) and name not in sampling_arguments}
        if arguments.get("do_sample"):
            options["temperature"] = float(arguments.get("temperature", self.options.get("temperature", 1.0)))
            options |= {name: arguments[name] for name in sampling_arguments[1:] if arguments.get(name)}
        confident = options["temperature"] == 0 and not self.lm.config.diffusion.causal
        return {**options, "sampler": self.sampler or ("confidence" if confident else "first_hitting")}, limit


def windows(ids, beginning: Sequence[int], context: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(prompt, continuation) pairs of at most `context` tokens together that score every token of a text once.

    The convention of the harness: the first piece fills the context, later ones follow one token that was scored
    before, and the last one is filled up with as many as fit. beginning: ids before the first piece.
    """
    ids = np.asarray(ids, np.int32)
    done = min(len(ids), context - len(beginning))
    if done:
        yield np.array(beginning, np.int32), ids[:done]
    while done < len(ids):
        end = min(done + context - 1, len(ids))
        yield ids[end - context:done], ids[done:end]
        done = end


def _batch_rows(batch_size: int | str) -> int:
    if str(batch_size).startswith("auto"):
        return 16
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise UserError(f"batch_size is {batch_size!r}, expected a positive number or auto")
    return int(batch_size)


def _chat_text(template: ChatTemplate, chat_history: list[dict[str, str]], add_generation_prompt: bool) -> str:
    if add_generation_prompt:
        return template.render(chat_history, [(len(chat_history), True)])[0]
    *others, last = chat_history
    marked = [*others, {**last, "content": last["content"].rstrip() + CONTINUE}]
    text = template.render(marked, [(len(marked), False)])[0]
    if CONTINUE not in text:
        raise UserError(f"the chat template of {template.directory} leaves the last message out: it cannot "
                        "be continued")
    rendered = text[:text.rindex(CONTINUE)]
    return rendered + last["content"][len(last["content"].rstrip()):]


@functools.cache
def register() -> type:
    """Makes "bd3lm_jax" known to lm-evaluation-harness; returns the class. UserError if it is not installed."""
    try:
        from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
        from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"lm-evaluation-harness cannot be imported ({error}): pip install lm-eval") from error
    return register_model(NAME)(type("BD3LM", (Harness, LM), {"__doc__": Harness.__doc__}))


def main() -> None:
    """The command line of the harness, with this library's models."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

        cli_evaluate()
    except UserError as error:
        print("error:", one_line(error), file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

"""Generate text with a trained model.

  python -m launch sample --workdir=runs/tiny
  python -m launch sample --workdir=runs/tiny --prompt="Anne smiled" --prompt="The captain" --seed=1 --top_p=0.9
  python -m launch sample --workdir=runs/tiny --prefer=speed            # as bench sampling --workdir=runs/tiny measured
  python -m launch sample --workdir=runs/tiny --num_samples=1 --animate --trace=trace.html     # see it write
  python -m launch sample --workdir=runs/tiny --length=2560 --sliding_window         # longer than it was trained on
  python -m launch sample --workdir=runs/tiny --constraint='[A-Z][a-z]+ (smiled|sighed)\\.'

Flags by purpose:
  what          --workdir --step --weights --num_samples --length --prompt --seed
  speed         --prefer --settings or by hand --sampler --steps --threshold --block_size --block_confidence
  choice        --temperature --top_k --top_p --min_p --repetition_penalty --guidance_scale --constraint
                --json_schema --fixed_tokens
  ends          --stop --min_length --min_entropy
  cache         --sliding_window --cache_dtype --approximate_cache
  output        --out --animate --trace --compare_traces

Result: samples (prompt_index from 0 and prompt, both null without prompts; text, num_tokens, nfe, stop), tokens_per_s,
nfe_per_token, seed, sampler (name and all settings as they were used, where they come from, and the bytes of a token in
the cache by cache_dtype).
"""

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from absl import flags

from launch.arguments import define_inputs, define_path, define_seed, define_step

TAKES_CONFIG = False
OPTIONS = ("sampler", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "steps", "threshold",
           "block_size", "block_confidence", "stop", "min_length", "min_entropy", "sliding_window", "cache_dtype",
           "approximate_cache", "guidance_scale", "constraint", "seed")  # what is given goes to LM.generate


def define(values: flags.FlagValues) -> None:
    _define_what(values)
    _define_speed(values)
    _define_choice(values)
    _define_rest(values)


def _define_what(values: flags.FlagValues) -> None:
    define_path(values, "workdir", "", "run directory, or one in Hugging Face layout")
    flags.DEFINE_enum("weights", "ema", ["ema", "params"], "averaged weights, or the last ones", flag_values=values)
    define_step(values)
    flags.DEFINE_integer("num_samples", 4, "texts, for each prompt if there are any", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("length", None, "tokens of prompt and text; by default 256, or the model's context if less",
                         lower_bound=1, flag_values=values)
    flags.DEFINE_multi_string("prompt", None, "how a text begins", flag_values=values)
    define_seed(values, "of all random choices")


def _define_speed(values: flags.FlagValues) -> None:
    flags.DEFINE_enum("prefer", None, ["quality", "balanced", "speed"], "settings measured by bench sampling, from "
                      "--settings or the run directory, else presets: first_hitting; threshold 0.9; threshold 0.6. "
                      "Flags that are given win", flag_values=values)
    define_path(values, "settings", "", "JSON file of settings, or of one such object for each --prefer",
                may_be_remote=True)
    flags.DEFINE_string("sampler", "first_hitting", "first_hitting, ancestral, ancestral_cosine; several tokens at "
                        "once: random_order, threshold, factor, entropy_bound, confidence, margin, entropy; "
                        "remdm_cap, remdm_rescale, remdm_confidence, remdm_loop; iterative; analytic (SEDD); uniform "
                        "(uniform-state diffusion); simplex (of simplex diffusion); ar (autoregressively, of a joint "
                        "model)", flag_values=values)
    flags.DEFINE_integer("steps", None, "of the sampler, a block; by default its usual ones", lower_bound=1,
                         flag_values=values)
    flags.DEFINE_float("threshold", None, "the sampler's number: probability, factor, nats, eta; by default its usual "
                       "one", lower_bound=0.0, flag_values=values)
    flags.DEFINE_string("block_size", None, "of a bidirectional model: tokens written at a time, left to right from "
                        "the end of the prompt; of one that was trained with several sizes: one of them, or auto, each "
                        "next block's by how sure the model is", flag_values=values)
    flags.DEFINE_float("block_confidence", 0.5, "of --block_size=auto: mean probability of the likeliest tokens that a "
                       "larger block needs", lower_bound=0.0, upper_bound=1.0, flag_values=values)


def _define_choice(values: flags.FlagValues) -> None:
    flags.DEFINE_float("temperature", 1.0, "below 1: likelier tokens; 0: the likeliest", lower_bound=0.0,
                       flag_values=values)
    flags.DEFINE_integer("top_k", None, "only the k likeliest tokens", lower_bound=1, flag_values=values)
    flags.DEFINE_float("top_p", None, "only the nucleus of this mass", lower_bound=0.0, upper_bound=1.0,
                       flag_values=values)
    flags.DEFINE_float("min_p", None, "only tokens at least so likely, as a part of the likeliest", lower_bound=0.0,
                       upper_bound=1.0, flag_values=values)
    flags.DEFINE_float("repetition_penalty", 1.0, "above 1: fewer tokens that were there before", lower_bound=0.0,
                       flag_values=values)
    flags.DEFINE_float("guidance_scale", 0.0, "weight of classifier-free guidance by the prompt; two passes a call",
                       flag_values=values)
    flags.DEFINE_string("constraint", None, "a regular expression that each new text matches as a whole",
                        flag_values=values)
    define_path(values, "json_schema", "", "a JSON schema (file) that each new text satisfies",
                may_be_remote=True)
    flags.DEFINE_multi_string("fixed_tokens", None, "PLACE:TEXT, what stands at a place of every text; the first "
                              "token of the prompt has place 0", flag_values=values)


def _define_rest(values: flags.FlagValues) -> None:
    flags.DEFINE_multi_string("stop", None, "a text ends before this string", flag_values=values)
    flags.DEFINE_integer("min_length", 0, "new tokens before the text may end", lower_bound=0, flag_values=values)
    flags.DEFINE_float("min_entropy", None, "give a text up whose last 256 tokens have a lower entropy (nats)",
                       lower_bound=0.0, flag_values=values)
    flags.DEFINE_bool("sliding_window", False, "texts may be longer than what the model was trained on",
                      flag_values=values)
    flags.DEFINE_string("cache_dtype", "compute", "of keys and values: float32, bfloat16, int8, or the network's own",
                        flag_values=values)
    flags.DEFINE_string("approximate_cache", "", "prefix or dual, of a bidirectional model with --block_size: faster, "
                        "with keys and values that are out of date", flag_values=values)
    define_path(values, "out", "", "write the texts to this JSONL file as well")
    flags.DEFINE_bool("animate", False, "show the texts as they are written", flag_values=values)
    define_path(values, "trace", "", "write an HTML page that shows how they were written, step by step")
    define_inputs(values, "compare_traces", "of --trace: a page of another run, to be played side by side in this one")


def main(args: flags.FlagValues) -> dict:
    from launch.arguments import required, step_of

    workdir, step = required(args, "workdir"), step_of(args)
    _check_outputs(args)
    other_traces = _traces_beside(args)
    import bd3lm_jax
    from bd3lm_jax.core.log import spinner
    from bd3lm_jax.generation import sample_files
    from bd3lm_jax.generation.options import make_options

    lm = bd3lm_jax.load(workdir, weights=args.weights, step=step)
    chosen, source = _choose(args, lm)
    name = chosen["sampler"]
    lm, chosen = lm.resolve_options(chosen)
    length, options = args.length or min(256, lm.context), make_options(**chosen)
    lm = lm.at_length(length)
    start = time.perf_counter()
    if args.animate or args.trace:
        samples = _watch(args, lm, length, options, other_traces)
    else:
        with spinner("compiling and writing"):
            samples = lm.generate(args.prompt, num=args.num_samples, length=length, **chosen)
    seconds = time.perf_counter() - start
    sampler = _sampler_settings(lm, options) | {"name": name, "source": source}
    origins = [(index, prompt) for index, prompt in enumerate(args.prompt or ()) for _ in range(args.num_samples)]
    origins = origins or [(None, None)] * len(samples)
    _print_samples(samples, origins, sampler)
    entries = [{"prompt_index": index, "prompt": prompt, "text": sample.text, "num_tokens": len(sample.tokens),
                "nfe": sample.nfe, "stop": sample.stop} for sample, (index, prompt) in zip(samples, origins)]
    if args.out:
        sample_files.write(args.out, entries)
    tokens = sum(len(sample.tokens) for sample in samples)
    return {"samples": entries, "tokens_per_s": tokens / seconds,
            "nfe_per_token": sum(sample.nfe for sample in samples) / max(1, tokens), "seed": options.seed,
            "sampler": sampler}


def _check_outputs(args: flags.FlagValues) -> None:
    """UserError, before anything is written, for a file in a directory that cannot be written."""
    from bd3lm_jax.core.errors import UserError

    for name in ("out", "trace"):
        path = args[name].value or ""
        directory = Path(path).parent
        if path and not (directory.is_dir() and os.access(directory, os.W_OK)):
            raise UserError(f"cannot write --{name}={path}: {directory} is no directory, or not yours")
        if Path(path or "file").is_dir():
            raise UserError(f"cannot write --{name}={path}: it is a directory, expected the name of a file")


def _traces_beside(args: flags.FlagValues) -> list[dict]:
    """Records of the pages of --compare_traces."""
    from bd3lm_jax.core.errors import UserError
    from bd3lm_jax.generation import trace

    if args.compare_traces and not args.trace:
        raise UserError("--compare_traces goes with --trace=FILE.html: the page on which all are shown")
    return [trace.read_html(path) for path in args.compare_traces or ()]


def _choose(args: flags.FlagValues, lm) -> tuple[dict, str]:
    """Fields of `options.Options`, and where those come from that no flag gives."""
    from bd3lm_jax.core.errors import UserError
    from bd3lm_jax.evaluation import settings

    set_options: dict[str, Any] = {name: args[name].value for name in OPTIONS if args[name].present}
    if "block_size" in set_options:
        set_options["block_size"] = _block_size(set_options["block_size"])
    if args.json_schema:
        if args.constraint is not None:
            raise UserError("--constraint and --json_schema are two constraints: give one of them")
        set_options["constraint"] = settings.read_object(args.json_schema)
    if args.fixed_tokens:
        set_options["fixed_tokens"] = _fixed_tokens(args.fixed_tokens)
    chosen, source = settings.settings_for(lm, args.workdir, args.settings, args.prefer or "")
    usual = {"seed": args.seed, "sampler": lm.config.diffusion.sampler}
    return usual | settings.merge_settings(chosen, set_options), source


def _block_size(word: str) -> int | str:
    from bd3lm_jax.core.errors import UserError
    from bd3lm_jax.generation.sampling.auto_size import AUTO

    if word != AUTO and not (word.isdecimal() and int(word) > 0):
        raise UserError(f"--block_size={word}: expected a positive whole number, or {AUTO}")
    return word if word == AUTO else int(word)


def _fixed_tokens(words: list[str]) -> dict[str, str]:
    """["12: said"] -> {"12": " said"}"""
    from bd3lm_jax.core.errors import UserError

    entries = {}
    for word in words:
        place, colon, text = word.partition(":")
        if not colon or not text or place in entries:
            raise UserError(f"--fixed_tokens={word}: expected PLACE:TEXT, each place once, e.g. "
                            "--fixed_tokens='12: said'")
        entries[place] = text
    return entries


def _watch(args: flags.FlagValues, lm, length: int, options, other_traces: list[dict]) -> list:
    """The samples, shown as they are written, and their trace."""
    from rich.console import Console

    from bd3lm_jax.generation import animate, stream, trace

    events = stream.stream(lm, args.prompt, args.num_samples, length, options)
    if args.animate:
        events = animate.animate(events, lm, Console(stderr=True, highlight=False))
    events = list(events)
    if args.trace:
        record = trace.make_record(events, lm, f"{args.workdir}, {options.sampler}")
        trace.write_html(args.trace, [record, *other_traces])
    done = [event for event in events if event.sample is not None]
    return [event.sample for event in sorted(done, key=lambda event: event.number)]


def _sampler_settings(lm, options) -> dict:
    """Every setting with the values that the sampler saw."""
    import jax.numpy as jnp

    from bd3lm_jax.evaluation import cache_cost
    from bd3lm_jax.generation.plan import make_plan, threshold_of
    from bd3lm_jax.generation.sampling.auto_size import AUTO
    plan, values = make_plan(lm, options, lm.context), dataclasses.asdict(options)
    dtype = jnp.dtype(lm.model.dtype).name if options.cache_dtype == "compute" else options.cache_dtype
    cached = not lm.is_bidirectional or options.approximate_cache
    sizes = {name: cache_cost.bytes_per_token(lm, name) for name in cache_cost.DTYPES} if cached else None
    if options.block_size != AUTO:
        del values["block_confidence"]
    values |= {"name": values.pop("sampler"), "steps": plan.settings.steps, "threshold": threshold_of(options),
               "block_size": AUTO if options.block_size == AUTO else plan.settings.window, "cache_dtype": dtype,
               "cache_bytes_per_token": sizes}
    del values["seed"]
    return values


def _print_samples(samples, origins, sampler: dict) -> None:
    """Texts and settings, for people. origins: index and text of each sample's prompt, None where there was none."""
    from bd3lm_jax.core import log

    for i, sample in enumerate(samples):
        origin = "" if origins[i][0] is None else " of prompt {} {!r}".format(*origins[i])
        log.note(f"--- sample {i}{origin}: {log.pluralize(len(sample.tokens), 'token')}, "
                 f"{log.pluralize(sample.nfe, 'network call')}, stop: "
                 f"{sample.stop}\n{sample.tokens if sample.text is None else sample.text}\n")
    log.note(f"sampler {sampler['name']}, steps {sampler['steps']}, threshold {sampler['threshold']:g}, block size "
             f"{sampler['block_size']}; {sampler['source']}")
    sizes = sampler["cache_bytes_per_token"]
    if sizes is not None:
        log.note(f"cache in {sampler['cache_dtype']}; bytes a token: "
                 + ", ".join(f"{name} {size:,}" for name, size in sizes.items()))

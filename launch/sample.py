"""Generate text with a trained model.

  python -m launch sample --workdir=runs/tiny
  python -m launch sample --workdir=runs/tiny --num=8 --length=128 --top_p=0.9
  python -m launch sample --workdir=runs/tiny --prompt="Anne smiled" --prompt="The captain" --seed=1

Result: samples (text, num_tokens, nfe, stop), tokens_per_s, nfe_per_token, seed, sampler.
"""

import time

from absl import flags

TAKES_CONFIG = False


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", "", "run directory, or one in Hugging Face layout", flag_values=values)
    flags.DEFINE_integer("num", 4, "texts, for each prompt if there are any", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("length", None, "tokens of prompt and text; by default 256, or the model's context if less",
                         lower_bound=1, flag_values=values)
    flags.DEFINE_multi_string("prompt", None, "how a text begins", flag_values=values)
    flags.DEFINE_string("sampler", "first_hitting", "first_hitting or ancestral", flag_values=values)
    flags.DEFINE_float("temperature", 1.0, "below 1: likelier tokens", lower_bound=0.0, flag_values=values)
    flags.DEFINE_integer("top_k", None, "only the k likeliest tokens", lower_bound=1, flag_values=values)
    flags.DEFINE_float("top_p", None, "only the nucleus of this mass", lower_bound=0.0, upper_bound=1.0,
                       flag_values=values)
    flags.DEFINE_integer("seed", 0, "of all random choices", lower_bound=0, flag_values=values)
    flags.DEFINE_enum("weights", "ema", ["ema", "params"], "averaged weights, or the last ones", flag_values=values)


def main(args: flags.FlagValues) -> dict:
    from launch.arguments import required

    workdir = required(args, "workdir")
    import bd3lm_jax
    from bd3lm_jax import log

    lm = bd3lm_jax.load(workdir, weights=args.weights)
    sampler = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    start = time.perf_counter()
    length = args.length or min(256, lm.context)
    samples = lm.generate(args.prompt, num=args.num, length=length, sampler=args.sampler, seed=args.seed,
                          **sampler)
    seconds = time.perf_counter() - start
    for i, sample in enumerate(samples):
        log.note(f"--- sample {i}: {len(sample.tokens)} tokens, {sample.nfe} network calls, stop: {sample.stop}\n"
                 f"{sample.tokens if sample.text is None else sample.text}\n")
    tokens = sum(len(sample.tokens) for sample in samples)
    return {
        "samples": [{"text": sample.text, "num_tokens": len(sample.tokens), "nfe": sample.nfe, "stop": sample.stop}
                    for sample in samples],
        "tokens_per_s": tokens / seconds, "nfe_per_token": sum(sample.nfe for sample in samples) / max(1, tokens),
        "seed": args.seed, "sampler": {"name": args.sampler, **sampler},
    }

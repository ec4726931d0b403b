"""Fill the holes of texts with a trained model.

  python -m launch infill --workdir=runs/tiny --text="It is a truth [MASK:5] that a single man [MASK:2-6] a wife."
  python -m launch infill --workdir=runs/tiny --file=texts.txt --temperature=0.5      # one text a line

[MASK] is one token, [MASK:5] five, [MASK:2-6] two to six, whichever makes the fixed text after the hole most likely.
A block model sees what stands behind a hole in the same block; a bidirectional one (block size = length) all of it.

Result: texts (input, text, holes (start, num_tokens, text), nfe, score), nfe, criterion (what score is; null where no
length was chosen), seed, sampler.
"""

from absl import flags

from launch.arguments import define_path, define_seed

TAKES_CONFIG = False


def define(values: flags.FlagValues) -> None:
    define_path(values, "workdir", "", "run directory, or one in Hugging Face layout")
    flags.DEFINE_multi_string("text", None, "a text with holes", flag_values=values)
    define_path(values, "file", "", "a file of such texts, one a line", may_be_remote=True)
    flags.DEFINE_string("sampler", "first_hitting", "the order of the reveals, as in sample", flag_values=values)
    flags.DEFINE_integer("steps", None, "of the sampler, a block", lower_bound=1, flag_values=values)
    flags.DEFINE_float("threshold", None, "the sampler's number", lower_bound=0.0, flag_values=values)
    flags.DEFINE_float("temperature", 1.0, "below 1: likelier tokens", lower_bound=0.0, flag_values=values)
    flags.DEFINE_integer("top_k", None, "only the k likeliest tokens", lower_bound=1, flag_values=values)
    flags.DEFINE_float("top_p", None, "only the nucleus of this mass", lower_bound=0.0, upper_bound=1.0,
                       flag_values=values)
    flags.DEFINE_integer("mc_samples", 4, "of the likelihood that chooses a length", lower_bound=1, flag_values=values)
    define_seed(values, "of all random choices")
    flags.DEFINE_enum("weights", "ema", ["ema", "params"], "averaged weights, or the last ones", flag_values=values)


def main(args: flags.FlagValues) -> dict:
    from launch.arguments import required

    workdir = required(args, "workdir")
    texts = (args.text or []) + (read_texts(args.file) if args.file else [])
    import bd3lm_jax
    from bd3lm_jax.core import log
    from bd3lm_jax.core.errors import UserError
    from bd3lm_jax.generation import infill
    from bd3lm_jax.generation.options import make_options

    if not texts:
        raise UserError(f"nothing to fill: give --text or --file, with holes: {infill.MARKERS}")
    lm = bd3lm_jax.load(workdir, weights=args.weights)
    sampler = {name: args[name].value for name in ("steps", "threshold", "temperature", "top_k", "top_p")}
    lm, chosen = lm.resolve_options({"sampler": args.sampler, "seed": args.seed, **sampler})
    options = make_options(**chosen)
    with log.spinner("compiling and filling"):
        filled = infill.infill(lm, texts, options, draws=args.mc_samples)
    for one in filled:
        log.note(one.text or "")
    return {
        "texts": [{"input": text, "text": one.text, "nfe": one.nfe, "score": one.score,
                   "holes": [{"start": span.start, "num_tokens": len(span.tokens), "text": span.text}
                             for span in one.spans]} for text, one in zip(texts, filled)],
        "nfe": sum(one.nfe for one in filled),
        "criterion": infill.CRITERION if any(one.score is not None for one in filled) else None,
        "seed": args.seed, "sampler": {"name": args.sampler, **sampler},
    }


def read_texts(path: str) -> list[str]:
    """The lines of a file, which may be packed, that are not empty. UserError if it cannot be read."""
    from bd3lm_jax.core import remote
    from bd3lm_jax.core.errors import UserError
    from bd3lm_jax.core.untrusted_files import MAX_TEXT_FILE
    from bd3lm_jax.data import text_files

    file = remote.fetch(path)
    if not file.exists():
        raise UserError(f"--file={path} does not exist: give a text file, one text with holes a line")
    return [line for _, line in text_files.lines(file, MAX_TEXT_FILE) if line.strip()]

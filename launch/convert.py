"""Read a model (run directory, Hugging Face layout, GGUF file) and write it as a run or in Hugging Face layout.

  python -m launch convert --from=runs/tiny --to=tiny-hf                        # give a trained model away
  python -m launch convert --from=runs/tiny --to=tiny-hf --dtype=bfloat16 --check=64
  python -m launch convert --from=SmolLM2-135M --to=runs/smollm2 --format=native     # as a run directory
  python -m launch convert --from=smollm2.gguf --to=smollm2-hf --dtype=bfloat16
  python -m launch convert --from=bd3lm-owt --to=runs/bd3lm --format=native --tokenizer=gpt2

--from may also be "organisation/name" on the Hugging Face Hub (needs huggingface_hub and the network). The directory
--to must not exist; it is there when it is whole, or not at all. docs/published.md says which architectures are read.

Result: tensors, bytes, path, dtype, format; with --check also checked_tokens, max_difference (of the logits before and
after), largest_logit.
"""

from typing import Any

from absl import flags

from launch.arguments import define_path

TAKES_CONFIG = False


def define(values: flags.FlagValues) -> None:
    define_path(values, "from", "", "run directory, directory in Hugging Face layout, GGUF file, or organisation/name")
    define_path(values, "to", "", "the directory to write")
    flags.DEFINE_enum("format", "hf", ["hf", "native"], "Hugging Face layout, or a run directory", flag_values=values)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "of the written parameters",
                      flag_values=values)
    flags.DEFINE_integer("check", 0, "compare the logits of so many random tokens before and after", lower_bound=0,
                         flag_values=values)
    flags.DEFINE_string("max_shard_size", "5GB", "of a safetensors file; more than that becomes several with an index",
                        flag_values=values)
    flags.DEFINE_enum("weights", "ema", ["ema", "params"], "averaged weights, or the last ones", flag_values=values)
    define_path(values, "tokenizer", "", "for a source that brings none: gpt2, bert-base-uncased, bytes, or the path "
                "of a tokenizer.json")
    flags.DEFINE_integer("length", 0, "of a run directory: tokens a row; 0: the context of the model", lower_bound=0,
                         flag_values=values)
    flags.DEFINE_boolean("allow_pickle", False, "read pickled weights (.bin, .ckpt, .pt) too: tensors alone, with "
                         "torch", flag_values=values)


def main(args: flags.FlagValues) -> dict:
    from bd3lm_jax.evaluation.convert import convert
    from launch.arguments import required

    source, target = required(args, "from"), required(args, "to")
    names = ("dtype", "check", "weights", "tokenizer", "length", "allow_pickle")
    options: dict[str, Any] = {name: args[name].value for name in names}
    return convert(source, target, form=args.format, max_shard=args.max_shard_size, **options)

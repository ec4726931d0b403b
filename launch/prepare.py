"""Tokenise and pack the corpus of a config once, ahead of time; training and evaluation read the result.

  python -m launch prepare
  python -m launch prepare --config=configs/lm1b.py --split=train,valid,test

Result: rows, tokens, hash and path, each by split.
"""

from absl import flags

TAKES_CONFIG = True


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_list("split", ["train", "valid"], "which of train, valid and test", flag_values=values)


def main(args: flags.FlagValues, config, name: str) -> dict:
    from bd3lm_jax import log
    from bd3lm_jax.data.prepare import prepare, prepare_tokenizer

    log.note(f"{name}: tokenizer {config.data.tokenizer}")
    tokenizer = prepare_tokenizer(config.data)
    rows = {}
    for split in args.split:
        def progress(documents: int, tokens: int, split: str = split) -> None:
            log.note(f"{split}: {documents:,} documents, {tokens:,} tokens")

        rows[split] = prepare(config.data, split, config.block_size, tokenizer, progress)
    log.table("Prepared rows", ["split", "rows", "tokens", "documents", "directory"],
              [[split, len(r), r.meta["tokens"], r.meta["documents"], r.path] for split, r in rows.items()])
    return {
        "rows": {split: len(r) for split, r in rows.items()},
        "tokens": {split: r.meta["tokens"] for split, r in rows.items()},
        "hash": {split: r.meta["hash"] for split, r in rows.items()},
        "path": {split: str(r.path) for split, r in rows.items()},
    }

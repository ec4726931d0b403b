"""Tokenise and pack the corpus of a config once, ahead of time; training and evaluation read the result.

  python -m launch prepare
  python -m launch prepare --config=configs/lm1b.py --split=train,valid,test --num_workers=8
  python -m launch prepare --config.data.source=mixture "--config.data.mixture=(('austen',0.7),('text:my_texts',0.3))"

A large text is kept in parts as they are done: the same command, after a kill, goes on where it was (docs/data.md).

Result: rows, tokens, hash and path, each by split; of a mixture also what the run will read of each source.
"""

from absl import flags

TAKES_CONFIG = True


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_list("split", ["train", "valid"], "which of train, valid and test", flag_values=values)
    flags.DEFINE_integer("num_workers", 1, "processes that tokenise, where a text has several parts; 1: this one, "
                         "whose tokenizer uses all cores", lower_bound=1, flag_values=values)
    flags.DEFINE_boolean("verify", False, "read what is prepared from end to end, also beyond the first GiB of a file, "
                         "which is all that other commands look at", flag_values=values)


def main(args: flags.FlagValues, config, name: str) -> dict:
    from bd3lm_jax.core import log
    from bd3lm_jax.data import manifest
    from bd3lm_jax.data.mixture import MixedRows
    from bd3lm_jax.data.prepare import prepare, prepare_tokenizer

    log.note(f"{name}: tokenizer {config.data.tokenizer}")
    tokenizer = prepare_tokenizer(config.data)
    rows, sources = {}, []
    for split in args.split:
        def progress(documents: int, tokens: int, split: str = split) -> None:
            log.note(f"{split}: {documents:,} documents, {tokens:,} tokens")

        rows[split] = prepare(config.data, split, config.block_size, tokenizer, progress, args.num_workers)
        mixed = isinstance(rows[split], MixedRows)
        for part in (rows[split].parts if mixed else [rows[split]]) if args.verify else []:
            manifest.verify(part.path)
        if mixed:
            sources = rows[split].usage(config.train.steps * config.train.batch_size)
    log.table("Prepared rows", ["split", "rows", "tokens", "documents", "directory"],
              [[split, len(r), r.meta["tokens"], r.meta["documents"], r.path] for split, r in rows.items()])
    if sources:
        log.table(f"Read in {config.train.steps} steps", ["source", "weight", "rows", "rows read", "epochs"],
                  [[x["source"], x["weight"], x["rows"], x["rows_seen"], f"{x['epochs']:.2f}"] for x in sources])
    return {
        "rows": {split: len(r) for split, r in rows.items()},
        "tokens": {split: r.meta["tokens"] for split, r in rows.items()},
        "hash": {split: r.meta["hash"] for split, r in rows.items()},
        "path": {split: str(r.path) for split, r in rows.items()},
        **({"sources": sources} if sources else {}),
    }

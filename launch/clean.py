"""Show, and with --remove delete, what nobody needs any more: what killed processes have left, damaged checkpoints.

  python -m launch clean                                   # the cache directory
  python -m launch clean --workdir=runs                    # a run, a sweep or all of them
  python -m launch clean --workdir=runs --remove

Never among it: prepared rows, tokenizers, checkpoints that can be read, and what a living process holds.

Result: leftovers (path, kind, bytes, age_s, removed), bytes, removed (bytes).
"""

from pathlib import Path

from absl import flags

from launch.arguments import define_path

TAKES_CONFIG = False


def define(values: flags.FlagValues) -> None:
    define_path(values, "workdir", "", "a run directory, or one that holds such")
    define_path(values, "cache_dir", "", "where prepared data is (data.cache_dir); by default $BD3LM_CACHE or "
                "~/.cache/bd3lm_jax, unless --workdir is given")
    flags.DEFINE_boolean("remove", False, "delete what is shown", flag_values=values)
    flags.DEFINE_float("idle_hours", 24.0, "without a change, for what a process of another host may be writing, and "
                       "for builds that were not finished", lower_bound=0.0, flag_values=values)


def main(args: flags.FlagValues) -> dict:
    from bd3lm_jax.checkpoints import clean
    from bd3lm_jax.core import log
    from bd3lm_jax.core.errors import UserError
    from bd3lm_jax.core.paths import default_cache

    directories = [Path(path) for path in (args.workdir, args.cache_dir) if path] or [default_cache()]
    for path in directories:
        if not path.is_dir() and (args.workdir or args.cache_dir):
            raise UserError(f"{path} is no directory: give that of a run, or that of prepared data")
    leftovers = sorted(clean.find([path.absolute() for path in directories], args.idle_hours * 3600))
    entries = [{"path": str(x.path), "kind": x.kind, "bytes": x.num_bytes, "age_s": round(x.age_s, 1),
                "removed": args.remove and clean.remove(x)} for x in leftovers]
    if entries:
        log.table("Left behind", ["path", "what", "bytes", "hours old", ""],
                  [[x["path"], x["kind"], f"{x['bytes']:,}", f"{x['age_s'] / 3600:.1f}",
                    "removed" if x["removed"] else "in use" if args.remove else ""] for x in entries])
    total = sum(x["bytes"] for x in entries)
    if not entries:
        log.note(f"nothing is left behind in {', '.join(map(str, directories))}")
    elif not args.remove:
        log.note(f"{total:,} bytes; the same command with --remove deletes them")
    return {"leftovers": entries, "bytes": total, "removed": sum(x["bytes"] for x in entries if x["removed"])}

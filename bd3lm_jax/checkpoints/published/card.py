"""The model card of a written checkpoint: what it is, on what it was trained, what it measured, how to load it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from bd3lm_jax.checkpoints.published.mapping import ModelSpec
from bd3lm_jax.core.errors import command_line
from bd3lm_jax.core.stats import format_interval, format_number

HEAD = """---
library_name: bd3lm_jax
pipeline_tag: text-generation
tags:
- {tag}
{base}---

# {name}

{what}
"""
HUB_CACHE = "models--"  # begins the names of its directories
LOAD = """
## How to load

```python
import bd3lm_jax

lm = bd3lm_jax.load("{name}")  # this directory
{use}
```

On the command line: `{command}`.
"""


class Origin(NamedTuple):
    """Where a model comes from. data: the data section of its run, None if it is no run's; step: updates it was trained
    for; results: split -> figures of its report (`nll`, `nll_ci95`, ...), {} for none; base: the model whose weights
    it began with, "" if they were random; lora_rank: of the updates of these, 0 if all were trained."""

    source: str
    data: Any
    step: int | None
    results: dict[str, dict]
    base: str
    lora_rank: int


def base_name(source: str) -> str:
    """What a card calls the weights in a directory or file: "organisation/name" in the cache of the Hugging Face Hub,
    else the last part of the path, as the others say nothing elsewhere."""
    path = Path(source).absolute()
    cached = [part.removeprefix(HUB_CACHE) for part in path.parts if part.startswith(HUB_CACHE)]
    return cached[-1].replace("--", "/", 1) if cached else path.name


def card(name: str, described: ModelSpec, num_params: int, dtype: str, origin: Origin, has_tokenizer: bool) -> str:
    """README.md of a directory called `name`, Markdown."""
    objective, model = described.objective, described.model
    if objective.causal:
        kind, tag = "An autoregressive language model", "autoregressive"
    elif objective.block_size >= described.length:
        kind, tag = "A diffusion language model over whole rows", "diffusion"
    else:
        kind, tag = f"A block diffusion language model with blocks of {objective.block_size} tokens", "block-diffusion"
    what = (f"{kind} (`diffusion.kind=\"{objective.kind}\"`), context {described.length} tokens. Network: "
            f"`{model.kind}`, {num_params:,} parameters stored as {dtype}: {model.num_layers} layers, "
            f"{model.hidden_size} wide, {model.num_heads} heads, vocabulary {model.vocab_size}"
            + (f", mask token {described.mask_id}." if described.mask_id >= 0 else "."))
    if objective.begins_with_end_token:
        what += " It was trained with the end token before every text: give it first."
    base = f"base_model: {json.dumps(origin.base)}\n" if origin.base else ""
    text = HEAD.format(name=name, tag=tag, what=what, base=base) + f"\n## Training\n\n{_training(origin)}\n"
    text += "\n## Results\n\n" + _results(origin.results)
    use = 'print(lm.generate(["Once"], length=64)[0].text)' if has_tokenizer else "print(lm.logits([[0, 1, 2]]).shape)"
    command = command_line(f"sample --workdir={name}" if has_tokenizer else f"convert --from={name} --to=DIR")
    return text + LOAD.format(name=name, use=use, command=command)


def _training(origin: Origin) -> str:
    if origin.data is None:
        return f"Converted from `{origin.source}`, with the weights it had; see there for its data."
    data = origin.data
    corpus_name = data.name or data.path and base_name(data.path)
    corpus = f"the {data.source} corpus" + (f" (`{corpus_name}`)" if corpus_name else "")
    rank = f" by updates of rank {origin.lora_rank} (LoRA), merged into its weights" if origin.lora_rank else ""
    origin_text = f"Adapted from `{origin.base}`{rank}. " if origin.base else ""
    return (
        f"{origin_text}Written from the run `{origin.source}`, trained for {origin.step:,} updates on {corpus}: rows "
        f"of {data.seq_len} tokens of the tokenizer `{base_name(data.tokenizer)}`, layout `{data.packing}`.")


def _results(results: dict[str, dict]) -> str:
    if not results:
        return "None were recorded with these weights.\n"
    heads = ("split", "nats a token", "95 % interval", "perplexity", "95 % interval", "bits a byte", "95 % interval",
             "estimator", "documents")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for split, found in results.items():
        bits_ci95 = found.get("bits_per_byte_ci95", (None, None))  # reports of earlier versions have none
        cells = (split, format_number(found["nll"], ".4f"), format_interval(found["nll_ci95"], ".4f"),
                 format_number(found["ppl"], ".2f"), format_interval(found["ppl_ci95"], ".2f"),
                 format_number(found["bits_per_byte"], ".4f"), format_interval(bits_ci95, ".4f"), found["estimator"],
                 str(found["documents"]))
        lines.append("| " + " | ".join(cells) + " |")
    bound = any(found["estimator"] != "nll" for found in results.values())
    footnote = "\nThe figures of a diffusion model are upper bounds; intervals are over documents and draws.\n"
    return "\n".join(lines) + "\n" + (footnote if bound else "")

"""How texts were written, as one self-contained web page: a slider over the steps, no network needed."""

import html
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

from bd3lm_jax.core import files, remote
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.log import note
from bd3lm_jax.core.typed import from_json
from bd3lm_jax.core.untrusted_files import MAX_TEXT_FILE, read_text
from bd3lm_jax.generation.stream import Event, piece
from bd3lm_jax.generation.trace_page import BESIDE, PAGE

RECORD = '<script type="application/json" id="record">', "</script>"  # what stands around a page's record


def make_record(events: Iterable[Event], lm, title: str) -> dict:
    """What the page shows, as JSON: the events of any number of texts, as changes.

    title: what wrote them. mask, end: ids. pieces: text of every id that occurs, by id. samples: number, canvas (ids of
    the whole row before anything is written), steps (block, step, nfe, revealed [[place, id, confidence], ...],
    remasked [place, ...]), and stop and nfe of the result (None if the events end before).
    """
    samples: dict[int, dict] = {}
    for event in events:
        if event.step == 0:
            samples[event.number] = {"number": event.number, "canvas": event.canvas, "steps": [], "stop": None,
                                     "nfe": None}
        sample = samples[event.number]
        if event.revealed or event.remasked:
            revealed = [[place, event.canvas[place - event.start], round(confidence, 4)]
                        for place, confidence in zip(event.revealed, event.confidence)]
            sample["steps"].append({"block": event.block, "step": event.step, "nfe": event.nfe, "revealed": revealed,
                                    "remasked": event.remasked})
        if event.sample is not None:
            sample |= {"stop": event.sample.stop, "nfe": event.sample.nfe}
    ids = {token for sample in samples.values() for token in sample["canvas"]}
    ids |= {token for sample in samples.values() for step in sample["steps"] for _, token, _ in step["revealed"]}
    return {"title": title, "mask": lm.special.mask, "end": lm.special.end,
            "pieces": {str(token): piece(lm, token) for token in sorted(ids)}, "samples": list(samples.values())}


def write_html(path: str | os.PathLike, records: Sequence[dict]) -> None:
    """The page of a record, or a page that plays several side by side; written whole or not at all. RunError if it
    cannot be."""
    pages = [_page(record) for record in records]
    if len(pages) > 1:
        frames = [f'<iframe title="{html.escape(record["title"])}" srcdoc="{html.escape(page)}"></iframe>'
                  for record, page in zip(records, pages)]
        pages = [BESIDE.replace("FRAMES", "\n".join(frames), 1)]
    with files.errors(path, "choose another --trace"):
        files.write(path, pages[0].encode())
    note(f"trace page: {path}, for a browser")


def read_html(path: str | os.PathLike) -> dict:
    """The record of a page that holds one. UserError if it is not such a page."""
    try:
        _, _, rest = read_text(remote.fetch(path), MAX_TEXT_FILE).partition(RECORD[0])
        record = from_json(rest.partition(RECORD[1])[0])
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no page that sample --trace wrote of one model ({error}): write it first") from None
    problem = _problem(record)
    if problem:
        raise UserError(f"{path} is no page that sample --trace wrote of one model ({problem}): write it first")
    return record


def _problem(record: Any) -> str:
    """What of a record is not as `make_record` makes it, "" if all is."""
    if not _has_types(record, {"title": str, "mask": int, "end": int, "pieces": dict, "samples": list}):
        return "its record lacks title, mask, end, pieces or samples"
    if not all(isinstance(text, str) for text in record["pieces"].values()):
        return "a piece is no text"
    for sample in record["samples"]:
        if not _has_types(sample, {"number": int, "canvas": list, "steps": list, "stop": str | None,
                                   "nfe": int | None}):
            return "a sample lacks number, canvas, steps, stop or nfe"
        places = range(len(sample["canvas"]))
        if not all(type(token) is int for token in sample["canvas"]):
            return f"the canvas of sample {sample['number']} holds more than ids"
        for step in sample["steps"]:
            if not _has_types(step, {"block": int, "step": int, "nfe": int, "revealed": list, "remasked": list}):
                return f"a step of sample {sample['number']} lacks block, step, nfe, revealed or remasked"
            drawn = all(isinstance(one, list) and len(one) == 3 and type(one[0]) is type(one[1]) is int
                        and type(one[2]) in (int, float) and one[0] in places for one in step["revealed"])
            if not drawn or not all(type(place) is int and place in places for place in step["remasked"]):
                return f"a step of sample {sample['number']} names a place that is not there"
    return ""


def _has_types(value: Any, kinds: dict[str, Any]) -> bool:
    return isinstance(value, dict) and all(
        key in value and isinstance(value[key], kind) and not isinstance(value[key], bool)
        for key, kind in kinds.items())


def _page(record: dict) -> str:
    data = json.dumps(record, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":  # nothing in the data can end the script element
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    return PAGE.replace("RECORD", data, 1)

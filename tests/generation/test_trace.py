"""The page of how texts were written: read back as a browser reads it."""

import json
import types
from html.parser import HTMLParser

import pytest
from toy_lm import END, LETTERS, MASK, Letters, make_lm

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.generation import stream, trace
from bd3lm_jax.generation.generation import Sample
from bd3lm_jax.generation.options import make_options
from bd3lm_jax.generation.stream import Event
from bd3lm_jax.scoring.score import SpecialIds

HOSTILE = ["</script><script>alert(1)</script>", "<!--", "\u2028", '"', "\\u003c", "&lt;", "<img src=http://x>", "é"]


class Page(HTMLParser):
    """Elements with their attributes, and what the scripts hold."""

    def __init__(self):
        super().__init__()
        self.elements, self.scripts, self.inside = [], [], ""

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data


class Signs(Letters):
    def decode(self, ids):
        return "".join(HOSTILE[i % len(HOSTILE)] for i in ids)


def read(path):
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def event(**changes):
    return Event(**{"number": 0, "block": 0, "step": 1, "start": 0, "canvas": [], "revealed": [], "confidence": [],
                    "remasked": [], "nfe": 1, "text": "", "tentative": "", "sample": None} | changes)


EVENTS = [
    event(step=0, canvas=[5, MASK, MASK, MASK], nfe=0), event(number=3, step=0, canvas=[MASK, MASK], nfe=0),
    event(step=1, start=1, canvas=[7, MASK, END], revealed=[1, 3], confidence=[0.123456, 1.0]),
    event(number=3, step=1, canvas=[MASK, 1], revealed=[1], confidence=[0.5]),
    event(step=2, start=1, canvas=[MASK, 2, END], revealed=[2], confidence=[0.25], remasked=[1], nfe=2),
    event(step=3, block=1, start=1, canvas=[6, 2, END], revealed=[1], confidence=[0.75], nfe=3),
    event(step=4, block=1, start=1, canvas=[6, 2, END], nfe=3, sample=Sample("gc", [6, 2], 3, "end"))]
LM = types.SimpleNamespace(special=SpecialIds(MASK, END), tokenizer=LETTERS)


def test_a_record_holds_the_changes_of_every_text():
    record = trace.make_record(EVENTS, LM, "runs/x")
    assert record == {
        "title": "runs/x", "mask": MASK, "end": END,
        "pieces": {"1": "b", "2": "c", "3": "∎", "5": "f", "6": "g", "7": "h", "12": "░"},
        "samples": [
            {"number": 0, "canvas": [5, MASK, MASK, MASK], "stop": "end", "nfe": 3, "steps": [
                {"block": 0, "step": 1, "nfe": 1, "revealed": [[1, 7, 0.1235], [3, END, 1.0]], "remasked": []},
                {"block": 0, "step": 2, "nfe": 2, "revealed": [[2, 2, 0.25]], "remasked": [1]},
                {"block": 1, "step": 3, "nfe": 3, "revealed": [[1, 6, 0.75]], "remasked": []}]},
            {"number": 3, "canvas": [MASK, MASK], "stop": None, "nfe": None, "steps": [
                {"block": 0, "step": 1, "nfe": 1, "revealed": [[1, 1, 0.5]], "remasked": []}]}]}
    assert json.loads(json.dumps(record)) == record


@pytest.mark.ci_slow
def test_a_record_replays_to_the_texts():
    lm = make_lm(tokenizer=LETTERS)
    options = make_options(sampler="remdm_cap", steps=6, threshold=0.6, forbidden=[END])
    events = list(stream.stream(lm, [[1, 2]], 1, 18, options))
    sample = trace.make_record(events, lm, "")["samples"][0]
    row = list(sample["canvas"])
    for step in sample["steps"]:
        for place, token, confidence in step["revealed"]:
            assert 0 < confidence <= 1
            row[place] = token
        for place in step["remasked"]:
            row[place] = MASK
    assert row[2:] == events[-1].sample.tokens and (sample["stop"], sample["nfe"]) == ("length", events[-1].nfe)
    assert any(step["remasked"] for step in sample["steps"])


@pytest.mark.parametrize("tokenizer", [LETTERS, Signs(), None])
def test_a_page_is_self_contained_and_holds_its_record(tmp_path, tokenizer):
    record = trace.make_record(EVENTS, types.SimpleNamespace(special=LM.special, tokenizer=tokenizer), "<b>")
    trace.write_html(tmp_path / "trace.html", [record])
    page = read(tmp_path / "trace.html")
    assert json.loads(page.scripts[0]) == record
    types_of_scripts = [attributes.get("type") for tag, attributes in page.elements if tag == "script"]
    assert types_of_scripts == ["application/json", None]
    for tag, attributes in page.elements:
        assert not {"src", "href", "action", "data", "srcset"} & set(attributes), (tag, attributes)
        assert tag not in ("img", "link", "iframe", "object", "base", "form")
    source = page.scripts[1] + (tmp_path / "trace.html").read_text().split("</style>")[0]
    assert not any(word in source for word in ("http", "import", "fetch", "innerHTML", "url(", "eval"))
    assert [path.name for path in tmp_path.iterdir()] == ["trace.html"]


def test_pages_side_by_side(tmp_path):
    records = [trace.make_record(EVENTS, types.SimpleNamespace(special=LM.special, tokenizer=Signs()), title)
               for title in ("runs/a\"><script>", "runs/b")]
    for name, record in zip("ab", records):
        trace.write_html(tmp_path / f"{name}.html", [record])
    assert [trace.read_html(tmp_path / f"{name}.html") for name in "ab"] == records
    trace.write_html(tmp_path / "both.html", records)
    frames = [attributes for tag, attributes in read(tmp_path / "both.html").elements if tag == "iframe"]
    assert [frame["title"] for frame in frames] == [record["title"] for record in records]
    for frame, name in zip(frames, "ab"):
        assert frame["srcdoc"] == (tmp_path / f"{name}.html").read_text()
        assert all(f"function {called}(" in frame["srcdoc"] for called in ("show", "play"))
    (tmp_path / "other.html").write_text("<html></html>")
    for name in ("other.html", "both.html", "absent.html"):
        with pytest.raises(UserError, match="is no page that sample --trace wrote of one model"):
            trace.read_html(tmp_path / name)


def test_the_script_finds_every_element_it_asks_for(tmp_path):
    trace.write_html(tmp_path / "trace.html", [trace.make_record(EVENTS, LM, "runs/x")])
    page = read(tmp_path / "trace.html")
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    asked = {part.split('"')[0] for part in page.scripts[1].split('at("')[1:]}
    assert asked <= ids and {"slider", "play", "sample", "text"} <= asked


def test_a_page_is_small(tmp_path):
    """Changes are stored, not canvases: ten times the row costs ten times the bytes."""
    sizes = []
    for length in (100, 1000):
        events = [event(step=0, canvas=[MASK] * length)]
        events += [event(step=i + 1, canvas=[1] * (i + 1) + [MASK] * (length - i - 1), revealed=[i], confidence=[0.5])
                   for i in range(length)]
        trace.write_html(tmp_path / "trace.html", [trace.make_record(events, LM, "")])
        sizes.append((tmp_path / "trace.html").stat().st_size)
    assert sizes[0] < 25_000 and sizes[1] - sizes[0] < 100 * 900

"""What the tests with random bad input share: fixed draws, one property, and ways to damage JSON and bytes.

BD3LM_FUZZ=5000 pytest -n 0 tests/test_fuzz_texts.py hunts: as many examples a test, other ones every time
(`--hypothesis-seed` repeats them).
"""

import contextlib
import copy
import json
import os
import signal

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from bd3lm_jax.core.errors import UserError, one_line

HUNT = int(os.environ.get("BD3LM_FUZZ", 0))
SECONDS = 20  # after which a call counts as hanging


def fuzz(examples: int):
    """Settings of a test: `examples` of them, the same every time."""
    return settings(max_examples=HUNT or examples, derandomize=not HUNT, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))


class Hangs(Exception):
    pass


@contextlib.contextmanager
def _limit():
    def stop(*_):
        raise Hangs(f"nothing came back within {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def works_or_says_why(call):
    """What `call()` gives, or the UserError it raised; every other exception, and a hang, is a failure of the test."""
    with _limit():
        try:
            return call()
        except UserError as error:
            said = one_line(error)
            assert said and len(said.splitlines()) == 1 and len(said) < 2000, said
            return error


names = st.text(max_size=8)
scalars = st.one_of(st.none(), st.booleans(), st.integers(-3, 300), st.integers(), st.floats(), names,
                    st.sampled_from(["", "austen", "masked", "dit", "wrap", "bytes", "../x", "nan", "1e9", "\x00"]))
values = st.recursive(scalars, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(
    names, inner, max_size=3)), max_leaves=5)


def places(content, at=()):
    """Paths of everything inside nested dicts and lists."""
    found = [at]
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        found += places(value, (*at, key))
    return found


@st.composite
def damaged(draw, content):
    """JSON content with one to three of its parts replaced, removed, copied or renamed."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        *before, last = draw(st.sampled_from([place for place in places(content) if place] or [("x",)]))
        target = content
        for key in before:
            target = target[key]
        how = draw(st.sampled_from(["replace", "remove", "rename", "copy"]))
        if how == "remove" and isinstance(target, dict):
            target.pop(last, None)
        elif how == "rename" and isinstance(target, dict):
            target[draw(names)] = target.pop(last, None)
        elif how == "copy" and isinstance(target, dict) and target:
            target[last] = copy.deepcopy(target[draw(st.sampled_from(sorted(target)))])
        else:
            target[last] = draw(values)
    return content


@st.composite
def damaged_bytes(draw, data: bytes):
    """Bytes of which some are changed, cut off, put in or repeated."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        how = draw(st.sampled_from(["flip", "cut", "insert", "repeat", "drop"]))
        if how == "flip" and at < len(data):
            data[at] ^= draw(st.integers(1, 255))
        elif how == "cut":
            del data[at:]
        elif how == "insert":
            data[at:at] = draw(st.binary(max_size=9))
        elif how == "repeat":
            data[at:at] = data[at:at + 40]
        else:
            del data[at:at + draw(st.integers(1, 40))]
    return bytes(data)


def written(path, content) -> None:
    """JSON in a file, or bytes as they are."""
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode("utf-8", "surrogatepass"))

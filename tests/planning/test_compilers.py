"""Which TPUs are asked, and how an answer gets out of the process of their compiler (what it says: test_plan.py)."""

import sys

import pytest

from bd3lm_jax.core import hardware
from bd3lm_jax.core.errors import RunError
from bd3lm_jax.planning import compilers


@pytest.mark.parametrize(("number", "target"), [(1, "v4"), (3, None), (16, "v4"), (1024, "v4"), (2048, None)])
def test_the_tpu_that_is_asked_has_such_a_slice(number, target):
    assert compilers.tpu_for(number) == target


def test_what_a_compiler_answers_arrives():
    code = "import json; print('talk'); print(json.dumps([7, {'all-gather': [2, 5.0]}, 1.5]))"
    assert compilers._ask([sys.executable, "-c", code], "") == (7, {"all-gather": (2, 5.0)}, 1.5)


def test_the_reason_is_the_last_line_that_it_wrote():
    code = "import sys; print('no answer'); print('first', file=sys.stderr); raise ValueError('x' * 999)"
    with pytest.raises(RunError, match="^the TPU compiler failed: ValueError: x{188}$"):
        compilers._ask([sys.executable, "-c", code], "")


def test_slices_have_what_their_names_say():
    for target, shapes in compilers.SLICES.items():
        assert target in hardware.ACCELERATORS
        dimensions = {len(shape.split("x")) for shape in shapes}
        assert dimensions == ({2} if target in ("v5e", "v6e") else {3})

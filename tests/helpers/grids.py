"""Which cases of a grid the default run takes."""

from collections.abc import Iterable

import pytest


def some(cases: Iterable, *chosen: int) -> list:
    """The cases of a test, those at the places `chosen` for the default run and the others for .ci/run alone."""
    return [case if i in chosen else _in_ci(case) for i, case in enumerate(cases)]


def _in_ci(case):
    if hasattr(case, "marks"):
        return pytest.param(*case.values, marks=[*case.marks, pytest.mark.ci_slow], id=case.id)
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.ci_slow)

"""Every layout of an encoder-decoder gives the training of one process."""

from __future__ import annotations

import pytest

from tests.documents.layouts import TABLES
from tests.parallel.crossed_layouts import COMBINED, HELD_BY
from tests.parallel.layouts import Case, Row, check, ids, measure, selected

ALL = TABLES["crossed"]
QUICK = [case for case in ALL if case.name not in HELD_BY]
SLOW = [case for case in ALL if case.name in HELD_BY] + COMBINED


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> dict[str, Row]:
    return measure(selected(request, QUICK))


@pytest.fixture(scope="module")
def slow_rows(request: pytest.FixtureRequest) -> dict[str, Row]:
    return measure(selected(request, SLOW), timeout=3400)


@pytest.mark.parametrize("case", QUICK, ids=ids(QUICK))
def test_layout_equals_one_process(case: Case, rows: dict[str, Row]) -> None:
    check(case, rows[case.name])


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=ids(SLOW))
def test_larger_layout_equals_one_process(case: Case, slow_rows: dict[str, Row]) -> None:
    check(case, slow_rows[case.name])


def test_what_is_left_out_stands_among_what_is_measured() -> None:
    assert {case.name for case in ALL} >= set(HELD_BY)
    assert {case.name for case in QUICK} >= set(HELD_BY.values())

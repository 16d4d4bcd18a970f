"""Every layout gives the training of one process.

Compared are losses, global gradient norms and parameters after ten steps.
"""

from __future__ import annotations

import pytest

from tests.documents.layouts import DOCUMENT, TABLES, rows_in
from tests.parallel.context_layouts import QUICK_OF_CONTEXT
from tests.parallel.layouts import (
    HELD_BY,
    QUICK_OF_FOUR,
    STEPS,
    Case,
    Row,
    check,
    ids,
    is_quick,
    measure,
    selected,
)

ALL = [*TABLES["table"], *TABLES["context"]]
QUICK = [case for case in TABLES["table"] if is_quick(case)]
QUICK += [case for case in TABLES["context"] if case.name in QUICK_OF_CONTEXT]
SLOW = [case for case in ALL if case not in QUICK]


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


def test_documented_table_has_every_case() -> None:
    for table, cases in TABLES.items():
        assert rows_in(DOCUMENT.read_text(), table) == [(case.name, case.world) for case in cases], (
            "docs/measured/layouts.md is older than the cases: python -m tests.documents.layouts"
        )


def test_what_is_left_out_stands_among_what_is_measured() -> None:
    names = {case.name for case in ALL}
    assert names >= {*HELD_BY, *HELD_BY.values(), *QUICK_OF_FOUR}
    quick = {case.name for case in QUICK}
    for name in HELD_BY:
        holder = name
        while holder in HELD_BY:
            holder = HELD_BY[holder]
        assert holder in quick, name


def test_names_are_unique_and_steps_are_ten() -> None:
    for cases in TABLES.values():
        assert len({case.name for case in cases}) == len(cases)
    assert STEPS == 10

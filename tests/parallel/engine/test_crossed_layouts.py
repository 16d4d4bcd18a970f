"""Every layout of an encoder-decoder gives the training of one process."""

from __future__ import annotations

import pytest

from tests.documents.layouts import TABLES
from tests.parallel.crossed_layouts import COMBINED
from tests.parallel.engine.test_layouts import check, ids
from tests.parallel.layouts import Case, Row, measure

QUICK = TABLES["crossed"]


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    return measure(QUICK)


@pytest.fixture(scope="module")
def slow_rows() -> dict[str, Row]:
    return measure(COMBINED, timeout=3400)


@pytest.mark.parametrize("case", QUICK, ids=ids(QUICK))
def test_layout_equals_one_process(case: Case, rows: dict[str, Row]) -> None:
    check(case, rows[case.name])


@pytest.mark.slow
@pytest.mark.parametrize("case", COMBINED, ids=ids(COMBINED))
def test_larger_layout_equals_one_process(case: Case, slow_rows: dict[str, Row]) -> None:
    check(case, slow_rows[case.name])

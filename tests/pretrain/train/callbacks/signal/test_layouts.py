"""Signal health under every kind of parallelism is that of one process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import Group, launch
from tests.pretrain.small import small_data
from tests.pretrain.train.callbacks.signal.layouts import CUT, LAYOUTS, measured

# A largest score is of the first sample that a rank sees.
# Weights are estimated from other elements where matrices are cut.
OWN_SAMPLE = {"attention_logit_max", "update_ratio", "weight_norm"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Any]:
    folder = tmp_path_factory.mktemp("layouts")
    data, names = str(small_data(folder / "data")), list(LAYOUTS)
    one, two = launch(
        Group(1, measured, (data, str(folder / "one"), [None])),
        Group(2, measured, (data, str(folder / "two"), names)),
    )
    return {None: one[0][0], **dict(zip(names, two[0], strict=True))}


@pytest.fixture(scope="module")
def cut_rows(rows: dict[str | None, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Any]:
    folder = tmp_path_factory.mktemp("cut")
    ((two, _),) = launch(
        Group(2, measured, (str(small_data(folder / "data")), str(folder / "two"), list(CUT)))
    )
    return {None: rows[None], **dict(zip(CUT, two, strict=True))}


@pytest.mark.slow
@pytest.mark.parametrize("layout", CUT)
def test_pieces_of_sequences_measure_the_same(cut_rows: dict[str | None, Any], layout: str) -> None:
    """The late halves too, and the largest score: ranks see pieces of the same first sample."""
    test_a_layout_measures_what_one_process_measures(cut_rows, layout)
    # Of the first step: then Adam has moved biases of keys, whose gradient is nothing but rounding.
    for layer, reference in zip(cut_rows[layout][0], cut_rows[None][0], strict=True):
        assert layer["attention_logit_max"] == pytest.approx(reference["attention_logit_max"], rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_measures_what_one_process_measures(rows: dict[str | None, Any], layout: str) -> None:
    for step, expected in zip(rows[layout], rows[None], strict=True):
        for layer, reference in zip(step, expected, strict=True):
            # Under sequence parallelism no rank has the late half of the sequence.
            own = set(reference) - ({"grad_variance_late"} if "SP" in layout else set())
            assert set(layer) == own
            for key in own - OWN_SAMPLE:
                # torch.var divides by one less than the elements of a rank, here a few hundred.
                close = 5e-3 if key == "forward_variance" else 1e-4
                assert layer[key] == pytest.approx(reference[key], rel=close, abs=1e-9), key

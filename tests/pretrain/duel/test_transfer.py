"""`fathom depth-duel --transfer`: best rates over depth with and without it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from model.errors import UserError
from pretrain.config.scheme_choice import parse_variants
from pretrain.duel.grid import Cell, Grid, cell_config
from pretrain.duel.report import Duel, as_json, render, text
from pretrain.duel.results import Outcome
from pretrain.duel.transfer import doubled, optima, statements
from tests.parallel.training import run_config

RATES = (1e-3, 3e-3, 1e-2, 4e-2)


def outcomes(best: dict[tuple[str, int], float]) -> list[Outcome]:
    """Cells whose loss is a parabola in the logarithm of the rate, lowest at the given rate."""
    base = run_config({"scheme": "pre_ln"})
    variants = doubled(parse_variants("pre_ln"), base, [4, 16], RATES, "tokens")
    grid = Grid(variants, [4, 16], RATES, [0.1, 0.2], [1])
    made = []
    for cell in grid.cells():
        distance = math.log(cell.lr / best[cell.variant.text, cell.layers])
        loss = 2 + 0.1 * distance**2 + cell.warmup
        made.append(
            Outcome(cell, "learned", loss, loss, 0, 0, 0.1, 1.0, 1000, 1e3, 32, 2, [(1, 3.0), (2, loss)], [])
        )
    return made


BEST = {
    ("pre_ln", 4): 8e-3,
    ("pre_ln", 16): 4e-3,
    ("pre_ln:transfer", 4): 8e-3,
    ("pre_ln:transfer", 16): 8e-3,
}


def test_the_optimum_is_that_of_the_parabola_at_the_best_warm_up() -> None:
    found = {(one.variant, one.layers): one for one in optima(outcomes(BEST))}
    for key, rate in BEST.items():
        assert found[key].rate == pytest.approx(rate, rel=1e-9)
        assert found[key].loss == pytest.approx(2.1, rel=1e-9)
        assert not found[key].edge
    assert statements(list(found.values())) == [
        "pre_ln: from 4 to 16 layers the best rate moves by x0.50 (0.008 to 0.004).",
        "pre_ln:transfer: from 4 to 16 layers the best rate moves by x1.00 (0.008 to 0.008).",
    ]


def test_an_optimum_at_the_edge_is_said() -> None:
    first, *_ = statements(optima(outcomes(BEST | {("pre_ln", 16): 1e-4})))
    assert first.endswith("(0.008 to 0.001), at the edge of the rates tried.")


def test_a_rate_that_diverged_is_no_candidate() -> None:
    made = [replace(one, validation=math.nan) if one.cell.lr == RATES[-1] else one for one in outcomes(BEST)]
    (found, *_) = optima(made)
    assert [rate for rate, _ in found.points] == list(RATES[:-1])
    assert found.edge
    assert found.rate == RATES[-2]


def test_page_and_json_show_it(tmp_path: Path) -> None:
    base = run_config({"scheme": "pre_ln"})
    grid = Grid(doubled(parse_variants("pre_ln"), base, [4, 16], RATES, "tokens"), [4, 16], RATES, [0.1], [1])
    duel = Duel(base, grid, outcomes(BEST), 3.0, "fathom depth-duel", transfer=True)
    assert "Does the best rate carry over?" in render(duel)
    assert "the best rate moves by x0.50" in text(duel)
    shown = json.loads(json.dumps(as_json(duel)))
    rates = {(one["scheme"], one["layers"]): one["best_lr"] for one in shown["transfer"]}
    assert rates == pytest.approx(BEST)


def test_cells_with_it_carry_over_from_the_lowest_depth(tmp_path: Path) -> None:
    base = run_config({"scheme": "pre_ln"})
    plain, carried = doubled(parse_variants("b2t:branch=2"), base, [16, 4, 8], RATES, "tokens")
    models = [
        cell_config(base, Cell(variant, 16, 1e-3, 0.1, 1), "tokens", tmp_path).model
        for variant in (plain, carried)
    ]
    assert models[0].transfer.method == "none"
    assert (models[1].transfer.base_layers, models[1].transfer.base_hidden) == (4, 32)
    assert models[1].model_copy(update={"transfer": models[0].transfer}) == models[0]


@pytest.mark.parametrize(
    ("depths", "rates", "schemes", "line"),
    [
        ([4], RATES, "pre_ln", "give two depths or more"),
        ([4, 8], RATES[:2], "pre_ln", "three rates or more"),
        ([4, 8], RATES, "pre_ln:transfer.method=completep:transfer.base_layers=2", "remove it from"),
    ],
)
def test_what_gives_no_comparison_is_refused(
    depths: list[int], rates: tuple[float, ...], schemes: str, line: str
) -> None:
    with pytest.raises(UserError, match=line):
        doubled(parse_variants(schemes), run_config({"scheme": "pre_ln"}), depths, rates, "tokens")

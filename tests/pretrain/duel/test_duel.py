"""Depth duels.

The grid, cells as runs, stop and resume, what is said about the results, and the command.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from model.config import ModelConfig
from model.errors import UserError
from model.parameters.size import parameter_count
from pretrain.config.scheme_choice import parse_variant, parse_variants
from pretrain.data.manifest import load_manifest
from pretrain.data.masked.samples import target_entropy
from pretrain.duel.grid import Cell, Grid, cell_config, check_unchanged, sized
from pretrain.duel.results import Outcome, best_settings, count_bursts, count_spikes, outcome, statements
from pretrain.duel.workers import train_cell
from pretrain.train.run import prepared_config
from tests.pretrain.trained.encoders import save_encoder
from tools.research.depth_duel import _depths, command

UNIGRAM = 3.6
# ---- the grid ------------------------------------------------------------------------------------


def test_the_grid_is_a_product_with_names_of_their_own() -> None:
    grid = Grid(parse_variants("pre_ln,b2t:rescale=false"), [2, 4], [1e-3, 2e-3], [0.1, 0.5], [1, 2])
    cells = grid.cells()
    assert len(cells) == len({cell.name for cell in cells}) == 32
    assert cells[0].name == "pre_ln_2_layers_lr0.001_warmup0.1_seed1"
    assert [cell.variant.text for cell in cells[:2]] == ["pre_ln", "b2t:rescale=false"]


def test_a_cell_is_the_configured_run_on_one_process(config: Path, tmp_path: Path) -> None:
    base = prepared_config(str(config), [])
    cell = Cell(parse_variant("b2t:rescale=false:factors.bias.rate=0.5"), 5, 3e-3, 0.3, 7)
    made = cell_config(base, cell, "tokens", tmp_path)
    assert (made.model.scheme, made.model.scheme_options, made.model.num_layers) == (
        "b2t",
        {"rescale": False},
        5,
    )
    assert (made.optimizer.lr, made.schedule.warmup_steps, made.train.seed, made.train.steps) == (
        3e-3,
        3,
        7,
        10,
    )
    assert made.parallel.processes is None
    assert made.optimizer.factors.bias.rate == 0.5
    assert base.model.num_layers == 2


def test_encoders_duel_on_hidden_tokens(config: Path, tmp_path: Path) -> None:
    """The level to beat is the entropy of hidden tokens, and a scheme knows the share of masks
    whatever the configured one is.
    """
    save_encoder(tmp_path)
    path = tmp_path / "duel.yaml"
    asked = {
        "include": [str(config)],
        "model": {"family": "bert", "scheme": "b2t", "position": "rotary"},
        "data": {"corpora": [{"path": str(tmp_path / "data")}]},
    }
    path.write_text(json.dumps(asked))
    base = prepared_config(str(path), [])
    cell = Cell(parse_variant("deepscalelm_pre_ln"), 2, 3e-3, 0.3, 7)
    made = cell_config(base, cell, "tokens", tmp_path)
    assert made.model.init.mask_token_share == pytest.approx(0.15 * 0.8)
    command(str(path), ["train.steps=4"], schemes="deepscalelm_pre_ln,b2t", out=tmp_path / "out", jobs=1)
    found = json.loads((tmp_path / "out/duel.json").read_text())
    entropy = target_entropy(load_manifest(tmp_path / "data"))
    assert found["unigram_entropy"] == pytest.approx(entropy)
    assert all(math.isfinite(cell["validation_loss"]) for cell in found["cells"])


def test_equal_tokens_keeps_the_width_and_equal_parameters_the_size() -> None:
    model = ModelConfig(
        num_layers=12, hidden_size=256, num_attention_heads=16, vocab_size=1000, max_position_embeddings=64
    )
    assert sized(model, 48, "tokens").hidden_size == 256
    wanted = parameter_count(model)["total"]
    for layers in (3, 12, 48, 96):
        fitted = sized(model, layers, "parameters")
        assert fitted.num_layers == layers
        assert fitted.kv_channels == model.kv_channels
        assert parameter_count(fitted)["total"] == pytest.approx(wanted, rel=0.15)
    assert sized(model, 48, "parameters").hidden_size < 256 < sized(model, 3, "parameters").hidden_size


def test_another_depth_is_that_of_both_stacks() -> None:
    model = ModelConfig(
        family="seq2seq",
        num_layers=6,
        encoder_layers=18,
        hidden_size=64,
        num_attention_heads=8,
        vocab_size=100,
        position="sinusoidal",
    )
    assert sized(model, 12, "tokens").total_layers == 24
    fitted = sized(model, 10, "parameters")
    assert fitted.total_layers == 20
    assert parameter_count(fitted)["total"] == pytest.approx(parameter_count(model)["total"], rel=0.15)
    own = model.model_copy(update={"encoder_attention_heads": 4})
    with pytest.raises(UserError, match=r"model\.encoder_attention_heads=4 gives the encoder sizes"):
        sized(own, 12, "parameters")


def test_a_size_that_no_width_reaches_is_refused() -> None:
    model = ModelConfig(
        num_layers=2, hidden_size=64, num_attention_heads=1, vocab_size=100, max_position_embeddings=64
    )
    with pytest.raises(UserError, match="more and narrower heads"):
        sized(model, 5, "parameters")
    few = ModelConfig(
        num_layers=3,
        hidden_size=16,
        num_attention_heads=2,
        vocab_size=100,
        max_position_embeddings=64,
        scheme_options={"k": 5.0},
    )
    with pytest.raises(UserError, match="2 layers: .*k"):
        sized(few, 2, "parameters")


# ---- cells ---------------------------------------------------------------------------------------


def test_a_cell_of_other_settings_is_not_mixed_in(config: Path, tmp_path: Path) -> None:
    cell = Cell(parse_variant("pre_ln"), 1, 1e-2, 0.2, 1)
    train_cell(cell_config(prepared_config(str(config), ["train.steps=3"]), cell, "tokens", tmp_path))
    same = cell_config(prepared_config(str(config), ["train.steps=3"]), cell, "tokens", tmp_path)
    check_unchanged([same])
    with pytest.raises(UserError, match="other settings"):
        check_unchanged(
            [cell_config(prepared_config(str(config), ["train.steps=4"]), cell, "tokens", tmp_path)]
        )


def test_a_cell_that_diverges_is_finished_and_has_no_loss(config: Path, tmp_path: Path) -> None:
    wanted = cell_config(
        prepared_config(str(config), ["schedule.warmup_steps=0"]),
        cell := Cell(parse_variant("pre_ln"), 2, 1e30, 0.0, 1),
        "tokens",
        tmp_path,
    )
    assert train_cell(wanted).code == 77
    found = outcome(cell, wanted, UNIGRAM)
    assert found.status == "diverged"
    assert math.isnan(found.validation)


# ---- results -------------------------------------------------------------------------------------


def made(
    scheme: str,
    lr: float,
    validation: float,
    *,
    layers: int = 12,
    warmup: float = 0.1,
    seed: int = 1,
    status: str = "learned",
) -> Outcome:
    cell = Cell(parse_variant(scheme), layers, lr, warmup, seed)
    curve = [(1, 4.0), (100, validation)]
    numbers = (0, 0, 0.1, 10.0, 1000, 6000.0, 16, 100)
    return Outcome(cell, status, validation, validation, *numbers, curve)  # type: ignore[arg-type]


def test_each_scheme_is_taken_at_its_own_best() -> None:
    best = best_settings(
        [
            made("pre_ln", 1e-3, 3.0),
            made("pre_ln", 2e-3, 2.5),
            made("pre_ln", 4e-3, 2.8),
            made("b2t", 1e-3, 2.7),
            made("b2t", 2e-3, math.nan),
        ]
    )
    assert [(one.variant, one.lr, one.validation, one.edge) for one in best] == [
        ("pre_ln", 2e-3, 2.5, ""),
        ("b2t", 1e-3, 2.7, ""),
    ]
    assert [one.edge for one in best_settings([made("pre_ln", 1e-3, 3.0), made("pre_ln", 2e-3, 2.5)])] == [
        "highest rate"
    ]


def test_seeds_are_averaged_and_fewer_seeds_do_not_win() -> None:
    outcomes = [
        made("pre_ln", 1e-3, 3.0, seed=1),
        made("pre_ln", 1e-3, 2.8, seed=2),
        made("pre_ln", 2e-3, 2.0, seed=1),
    ]
    (best,) = best_settings(outcomes)
    assert (best.lr, best.validation) == (1e-3, pytest.approx(2.9))
    assert best.spread == pytest.approx(0.1)


def test_statements_name_winner_ties_losers_and_the_stuck() -> None:
    outcomes = [
        made("deepscalelm_pre_ln", 1e-3, 2.50),
        made("pre_ln", 1e-3, 2.51),
        made("b2t", 1e-3, 2.90),
        made("post_ln", 1e-3, 3.59, status="stuck"),
        made("mix_ln", 1e-3, 4.80, status="above"),
        made("deepnorm", 1e-3, math.nan, status="diverged"),
    ]
    said = " ".join(statements(outcomes, UNIGRAM))
    assert "deepscalelm_pre_ln ends lowest, at 2.500" in said
    assert "which is noise here: pre_ln." in said
    assert "b2t by 0.40" in said
    assert "12 layers: post_ln learned no more than how frequent tokens are (entropy 3.600)" in said
    assert "not yet at token frequencies (entropy 3.600) at any setting tried: mix_ln (4.800)." in said
    assert "1 cell diverged: deepnorm, 12 layers, lr 0.001" in said
    assert "6 cells of 100 steps, one seed" in said


def test_spikes_and_bursts_are_counted_once_each() -> None:
    losses = np.full(100, 2.0) + 0.01 * np.sin(np.arange(100))
    assert count_spikes(losses) == 0
    losses[[50, 51, 70]] += 1.0
    assert count_spikes(losses) == 2
    norms = np.full(100, 0.3)
    norms[40] = 10.0
    assert count_bursts(norms) == 1
    assert count_spikes(np.linspace(5, 2, 100)) == 0


def test_a_loss_that_climbs_is_divergence(config: Path, tmp_path: Path) -> None:
    from pretrain.duel.results import _status

    down = np.linspace(4, 2, 100)
    assert _status(True, 2.0, down, UNIGRAM) == "learned"
    assert _status(True, 3.55, np.full(100, 3.55), UNIGRAM) == "stuck"
    assert _status(True, 3.69, np.full(100, 3.69), UNIGRAM) == "stuck"
    assert _status(True, 3.71, np.full(100, 3.71), UNIGRAM) == "above"
    assert _status(True, 3.4, np.concatenate([down, np.linspace(2, 3.4, 50)]), UNIGRAM) == "diverged"
    assert _status(False, math.nan, down, UNIGRAM) == "unfinished"


def test_the_page_shows_every_cell_and_picture(config: Path) -> None:
    from pretrain.duel.report import Duel, as_json, render, text

    grid = Grid(parse_variants("pre_ln,b2t"), [12, 48], [1e-3, 2e-3], [0.1, 0.5], [1, 2])
    outcomes = [
        made(
            cell.variant.text,
            cell.lr,
            3.0 + 0.01 * index,
            layers=cell.layers,
            warmup=cell.warmup,
            seed=cell.seed,
        )
        for index, cell in enumerate(grid.cells()[:-1])
    ]
    outcomes.append(made("b2t", 2e-3, math.nan, layers=48, warmup=0.5, seed=2, status="unfinished"))
    duel = Duel(prepared_config(str(config), []), grid, outcomes, UNIGRAM, "fathom depth-duel x.yaml")
    page = render(duel)
    assert page.count("<svg") == 5
    assert "1 of 32 cells are not finished" in page
    assert page.count("not finished") >= 2
    assert "± seeds" in page
    assert "fathom depth-duel x.yaml" in page
    found = json.loads(json.dumps(as_json(duel), allow_nan=False))
    assert found["cells"][-1]["validation_loss"] is None
    assert {one["seeds"] for one in found["best"]} == {2}
    assert "ends lowest" in text(duel)


# ---- the command ---------------------------------------------------------------------------------


def start(config: Path, out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tools.cli", "depth-duel", str(config), "--out", str(out), *arguments]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )


def test_depths_are_whole_numbers() -> None:
    assert _depths("2,48") == [2, 48]
    for wrong in ("2.7", "2,inf", "nan"):
        with pytest.raises(UserError, match="whole numbers|named once|at most"):
            _depths(wrong)


def run_command(config: Path, *arguments: object) -> Result:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(config), *map(str, arguments)])


def test_a_report_tells_finished_from_missing_cells(config: Path, tmp_path: Path) -> None:
    options = ["train.steps=2", "--schemes", "pre_ln", "--layers", "1", "--warmups", "0"]
    out = tmp_path / "out"
    report = [*options, "--report-only", "--out", out]
    refused = run_command(config, *report)
    assert str(refused.exception).startswith(f"--out {out}: holds no cells of a duel")
    assert list(tmp_path.iterdir()) == []
    base = prepared_config(str(config), ["train.steps=2"])
    train_cell(cell_config(base, Cell(parse_variant("pre_ln"), 1, 1e-2, 0.0, 1234), "tokens", out))
    refused = run_command(config, *report, "--jobs", "5")
    assert str(refused.exception) == "--jobs 5 has no effect with --report-only: leave one of them out"
    assert [path.name for path in out.iterdir()] == ["cells"]
    done = run_command(config, *report)
    assert (done.exit_code, "1 cell of 2 steps" in done.stdout) == (0, True)
    part = run_command(config, *report, "--lrs", "1e-2,2e-2")
    assert part.exit_code == 1
    assert "1 cell not finished: pre_ln" in part.stdout
    assert "2 cells of 2 steps" in part.stdout
    none = run_command(config, *report, "--lrs", "3e-2", "--json")
    assert (none.exit_code, json.loads(none.stdout)["best"]) == (1, [])
    assert "1 cell of 2 steps" in none.stdout


@pytest.mark.slow
def test_the_command_stops_and_resumes_and_writes_its_page(config: Path, tmp_path: Path) -> None:
    options = ("--schemes", "pre_ln,b2t:rescale=false", "--layers", "1,2", "--steps", "60")
    process = start(config, tmp_path, "--jobs", "2", *options)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not list(tmp_path.glob("cells/*/cell.json")):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=250)
    done = {path.parent.name: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/cell.json")}
    assert 0 < len(done) < 4, output + errors
    assert process.returncode == 1
    assert "not finished" in (tmp_path / "duel.html").read_text()

    process = start(config, tmp_path, "--jobs", "1", "--json", *options)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert f"{len(done)} of 4 cells are finished" in errors
    assert output == (tmp_path / "duel.json").read_text()
    assert all(
        (tmp_path / "cells" / name / "cell.json").stat().st_mtime_ns == when for name, when in done.items()
    )
    found: dict[str, Any] = json.loads((tmp_path / "duel.json").read_text())
    assert len(found["cells"]) == 4
    assert {cell["status"] for cell in found["cells"]} <= {"learned", "stuck", "above"}
    assert [(one["layers"], one["settings_tried"]) for one in found["best"]] == [
        (1, 1),
        (1, 1),
        (2, 1),
        (2, 1),
    ]
    assert found["unigram_entropy"] == pytest.approx(UNIGRAM, abs=1.0)
    page = (tmp_path / "duel.html").read_text()
    assert page.count("<svg") == 3
    assert "b2t:rescale=false" in page
    assert "ends lowest" in output


def test_what_no_cell_does_is_refused_where_the_file_asks_for_it(config: Path, tmp_path: Path) -> None:
    asked = tmp_path / "asked.yaml"
    for key, given, advice in (
        ("parallel", {"processes": 2}, "train on one process each: set parallel.processes=null"),
        ("parallel", {"zero": 2}, "train on one process each: set parallel.zero=1"),
        ("checkpoint", {"load": "x"}, "begin untrained: set checkpoint.load=null"),
        ("train", {"stop_at_step": 4}, "train to their end: set train.stop_at_step=null"),
    ):
        ((name, value),) = given.items()
        asked.write_text(json.dumps({"include": [str(config)], key: given}))
        failed = run_command(asked, "--out", tmp_path / "out")
        said = f"{key}.{name}={value} has no effect in a duel, whose cells {advice}"
        assert str(failed.exception) == said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (("--schemes", "nope"), "--schemes nope is unknown"),
        (("--lrs", "1e-3,x"), "separated by commas"),
        (("--lrs", "1e-3,nan"), "named once"),
        (("--warmups", "1.5"), "below 1"),
        (("schedule.warmup_steps=90", "train.steps=60"), "warmup_steps=90 is no part of train.steps=60"),
        (("--equal", "time"), "tokens or parameters"),
        (("--lrs", "1e-40"), "--lrs 1e-40: every number must be at least 1e-30"),
        (("--layers", "2,2"), "named once"),
        (("--layers", "2,1000000"), "--layers 2,1000000: every number must be at least 1, at most 10000,"),
        (("--transfer",), "two depths or more"),
        (("--out", __file__), "duel.html: cannot write to"),
        (("log.interval=5",), "log.interval=5 has no effect in a duel, whose cells keep what the page shows"),
        (("runs_dir=x",), "runs_dir=x has no effect in a duel, whose cells have folders of their own, below"),
        (("parallel.offload.optimizer=true",), "parallel.offload.optimizer=true has no effect in a duel"),
    ],
)
def test_mistakes_are_refused_before_anything_trains(
    config: Path, tmp_path: Path, wrong: tuple[str, ...], says: str
) -> None:
    failed = run_command(config, "--out", tmp_path, *wrong)
    assert isinstance(failed.exception, UserError)
    assert says in str(failed.exception)
    assert list(tmp_path.iterdir()) == []

"""Training the cells of a duel: in one process, and by workers."""

from __future__ import annotations

import multiprocessing
import threading
import time
from pathlib import Path

import pytest

from pretrain.config.scheme_choice import parse_variant
from pretrain.duel.grid import Cell, cell_config, finished
from pretrain.duel.workers import given_devices, train_cell, train_cells
from pretrain.rundir.metrics import read_metrics
from pretrain.train.run import prepared_config


def test_cells_train_one_after_another_in_one_process_as_they_would_alone(
    config: Path, tmp_path: Path
) -> None:
    base = prepared_config(str(config), [])
    cell = Cell(parse_variant("deepscalelm_post_ln:hidden_dropout=0.2"), 2, 1e-2, 0.2, 1)
    losses = []
    for folder, first in (("alone", None), ("after", Cell(parse_variant("pre_ln"), 3, 1e-2, 0.2, 1))):
        for one in (first, cell) if first else (cell,):
            result = train_cell(cell_config(base, one, "tokens", tmp_path / folder))
            assert result.code == 0
        run = tmp_path / folder / "cells" / cell.name
        losses.append([event.loss for event in read_metrics(run / "metrics.jsonl").train])
        assert finished(run) is not None
        assert not (run / "checkpoints").exists()
    assert losses[0] == losses[1]


def test_finished_cells_are_not_trained_again(config: Path, tmp_path: Path) -> None:
    base = prepared_config(str(config), ["train.steps=2"])
    configs = [
        cell_config(base, Cell(parse_variant("pre_ln"), 1, lr, 0.0, 1), "tokens", tmp_path)
        for lr in (1e-2, 2e-2)
    ]
    for one in configs:
        train_cell(one)
    train_cells(configs, 2, pytest.fail)


@pytest.mark.parametrize(
    ("visible", "count", "names"),
    [
        (None, 2, ["0", "1"]),
        ("4,5", 2, ["4", "5"]),
        ("GPU-8a1, MIG-77", 2, ["GPU-8a1", "MIG-77"]),
        ("6,-1,7", 1, ["6"]),
        ("", 0, []),
        (None, 0, []),
    ],
)
def test_workers_take_the_gpus_that_were_given(visible: str | None, count: int, names: list[str]) -> None:
    assert given_devices(count, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == names


def test_a_killed_worker_takes_its_own_cell_along_and_no_other(config: Path, tmp_path: Path) -> None:
    base = prepared_config(str(config), ["train.steps=1000000"])
    cells = [
        cell_config(base, Cell(parse_variant("pre_ln"), 1, lr, 0.0, 1), "tokens", tmp_path)
        for lr in (1e-2, 2e-2)
    ]
    cells[1].train.steps = 2
    metrics = tmp_path / "cells" / cells[0].name / "metrics.jsonl"

    def kill() -> None:
        while not metrics.exists():
            time.sleep(0.05)
        for process in multiprocessing.active_children():
            process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    lines: list[str] = []
    train_cells(cells, 1, lines.append)
    killer.join()
    assert lines[1] == f"[0/2] {cells[0].name}: the worker was killed (out of memory?) (0 s)"
    assert lines[2].startswith(f"[1/2] {cells[1].name}: all steps are done")

"""What is removed, and what never is."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallel.checkpoint.folders import LATEST, MANIFEST, leftovers_in, step_folder, steps_in
from parallel.checkpoint.writer import doomed_steps, prune, remove


def make(folder: Path, steps: list[int], latest: int | None = None) -> None:
    for step in steps:
        (folder / step_folder(step)).mkdir()
        (folder / step_folder(step) / MANIFEST).write_text("{}")
    (folder / LATEST).write_text(step_folder(latest if latest is not None else steps[-1]))


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [
        (1, 0, [60]),
        (2, 0, [50, 60]),
        (9, 0, [10, 20, 30, 40, 50, 60]),
        (1, 20, [20, 40, 60]),
        (2, 30, [30, 50, 60]),
        (1, 7, [60]),
    ],
)
def test_rules(tmp_path: Path, keep_last: int, keep_every: int, kept: list[int]) -> None:
    steps = [10, 20, 30, 40, 50, 60]
    make(tmp_path, steps)
    assert doomed_steps(tmp_path, keep_last=keep_last, keep_every=keep_every) == [
        step for step in steps if step not in kept
    ]
    assert steps_in(tmp_path) == steps
    assert prune(tmp_path, keep_last=keep_last, keep_every=keep_every) == [
        step for step in steps if step not in kept
    ]
    assert steps_in(tmp_path) == kept
    assert not leftovers_in(tmp_path)


def test_what_latest_names_stays(tmp_path: Path) -> None:
    # After a crash before `latest` moved, the run goes on from 10.
    # It saves 15 beside an unconfirmed 20.
    make(tmp_path, [10, 15, 20], latest=15)
    assert prune(tmp_path, keep_last=1, keep_every=0) == [10]
    assert steps_in(tmp_path) == [15, 20]


def test_an_empty_folder_and_a_left_over_grave(tmp_path: Path) -> None:
    assert prune(tmp_path, keep_last=1, keep_every=0) == []
    make(tmp_path, [1, 2])
    grave = tmp_path / ".step_00000001.pruned"
    grave.mkdir()
    (grave / "half").write_text("")
    assert prune(tmp_path, keep_last=1, keep_every=0) == [1]
    assert not grave.exists()


def test_leftovers_by_age(tmp_path: Path) -> None:
    for name in (
        ".step_00000001.partial",
        ".step_00000002.replaced",
        ".step_00000003.pruned",
        ".hidden",
        "step_00000004",
    ):
        (tmp_path / name).mkdir()
    assert leftovers_in(tmp_path, older_than_s=3600) == []
    found = leftovers_in(tmp_path)
    assert [entry.name for entry in found] == [
        ".step_00000001.partial",
        ".step_00000002.replaced",
        ".step_00000003.pruned",
    ]
    remove(found)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".hidden", "step_00000004"]

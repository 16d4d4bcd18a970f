"""A writer killed at any moment leaves a loadable checkpoint.

The run goes on as if nothing had been.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from parallel.checkpoint.folders import leftovers_in, steps_in
from parallel.checkpoint.reader import open_checkpoint
from tests.distributed import Group, launch
from tests.parallel.checkpoint.kills import kills, start, time_of_saves, undisturbed

SAVES = 4


def killed_run(root: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Kills a run in folder `root` `count` times and lets it end; what each start found.

    Raises AssertionError as `kills.start` does.
    """
    plain, timing = launch(Group(2, undisturbed, (8 * count,)), Group(2, time_of_saves, (root, SAVES)))
    moments = kills(count, seed, longest=timing[0])
    until = 3
    starts = [Group(2, start, (root, plain[0], kill, until), killed=True) for kill in moments]
    *_, last = launch(*starts, Group(2, start, (root, plain[0], None, until)), timeout=120 + 20 * count)
    folder = Path(root) / "checkpoints"
    open_checkpoint(folder).verify()
    assert len(steps_in(folder)) <= 2
    assert last[0]["end"] >= until
    if last[0]["end"] > last[0]["step"]:
        assert not leftovers_in(folder), "a save removes what killed ones left"
    lines = [ast.literal_eval(line) for line in (Path(root) / "starts_0").read_text().splitlines()]
    assert len(lines) == count + 1, "every start came as far as its loop"
    return lines


def check(lines: list[dict[str, Any]]) -> None:
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps)
    assert steps[-1] > 0
    assert any(line["leftovers"] for line in lines), "no kill fell into a save: the moments are badly chosen"


@pytest.mark.slow
def test_killed_fifty_times(tmp_path: Path) -> None:
    check(killed_run(str(tmp_path), 50, seed=1))

"""What the board shows: a table of all runs, and of each the page of its report, as they are now.

Nothing is written. What has not changed since the last look is not read again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

from model.errors import UserError
from parallel.launch import slurm_client
from parallel.launch.slurm_client import Queued
from pretrain.cluster.status import RunStatus, check_root, find_runs, status_of
from pretrain.cluster.status_cells import HEADINGS, RIGHT, cells
from pretrain.report.page import template
from pretrain.report.run_charts import Chart
from pretrain.report.run_report import read_run, render, sample_charts
from pretrain.rundir.state import STATE_FILE, SUBMITTED_FILE, latest_step

FILES = ("metrics.jsonl", STATE_FILE, "config.yaml", SUBMITTED_FILE)
"""Files of a run that say how it is."""
MARKS = {
    "finished": "good",
    "failed": "bad",
    "dead": "bad",
    "damaged": "bad",
    "cancelled": "bad",
}
"""Colour of a state's mark; others are open."""
MOST_KEPT = 16
"""Runs of which reports and drawings are kept."""
Version = tuple[tuple[int, int], ...]
"""Time of the last change and size of each of a run's files, zeros where there is none."""


T = TypeVar("T")


class Latest(Generic[T]):
    """What was made of the runs that were looked at last."""

    def __init__(self) -> None:
        self._made: dict[Path, tuple[Hashable, T]] = {}

    def of(self, folder: Path, version: Hashable, make: Callable[[], T]) -> T:
        """What was made of a run's files in this version, made now if that is new."""
        known = self._made.pop(folder, None)
        if known is None or known[0] != version:
            known = version, make()
        self._made = {folder: known, **dict(list(self._made.items())[: MOST_KEPT - 1])}
        return known[1]


@dataclass(frozen=True)
class Ended:
    """How a run was that does not go on."""

    version: Version
    looked: float
    """Seconds since 1970."""
    status: RunStatus


class Board:
    """The runs at or below a folder.

    Pages are made one at a time, as drawing is not safe among threads.
    """

    def __init__(self, root: Path) -> None:
        """Raises UserError where the folder does not exist; it may hold no run yet."""
        check_root(root)
        self.root = root
        self._drawing = threading.Lock()
        self._folders: dict[str, Path] = {}
        self._ended: dict[Path, Ended] = {}
        self._reports = Latest[str]()
        self._drawn = Latest[list[Chart]]()

    def statuses(self) -> list[RunStatus]:
        """All runs. Those that have ended are read again when a file of theirs has changed."""
        self._look()
        queued = slurm_client.queue()
        folders = list(self._folders.values())
        found = [self._status(folder, queued) for folder in folders]
        ended = self._ended
        self._ended = {folder: ended[folder] for folder in folders if folder in ended}
        return found

    def table(self) -> str:
        """The table's rows as HTML."""
        return template("board_rows.html").render(**self._rows(self.statuses()))

    def index(self, interval_s: float) -> str:
        """The page of all runs, which asks for the table every so many seconds."""
        return template("board.html").render(
            root=str(self.root),
            interval=interval_s,
            headings=HEADINGS,
            **self._rows(self.statuses()),
        )

    def run(self, place: str, interval_s: float) -> str:
        """The report of a run, which looks every so many seconds whether the run has gone on.

        place: the run's folder below the root, empty for the root itself.
        Raises KeyError where no run is there, UserError where it cannot be read.
        """
        folder = self._folder(place)
        with self._drawing:
            version = version_of(folder)
            text = self._reports.of(folder, version, lambda: self._report(folder))
        follow = template("board_follow.html").render(interval=interval_s, version=word_of(version))
        return text.replace("</body>", f"{follow}</body>")

    def _report(self, folder: Path) -> str:
        """What the newest checkpoint makes of samples is drawn once for each checkpoint."""
        run = read_run(folder)
        charts = self._drawn.of(folder, latest_step(folder), lambda: sample_charts(run))
        return render(run, charts)

    def version(self, place: str) -> str:
        """A text that changes with the files of a run. Raises KeyError where no run is there."""
        return word_of(version_of(self._folder(place)))

    def _look(self) -> None:
        try:
            folders = find_runs(self.root)
        except UserError:  # none yet
            folders = []
        self._folders = {self._place(folder): folder for folder in folders}

    def _place(self, folder: Path) -> str:
        place = folder.relative_to(self.root).as_posix()
        return "" if place == "." else place

    def _folder(self, place: str) -> Path:
        folder = self._folders.get(place)
        if folder is None or not folder.is_dir():
            self._look()
            folder = self._folders[place]
        return folder

    def _status(self, folder: Path, queued: Mapping[str, Queued] | None) -> RunStatus:
        version, known, now = version_of(folder), self._ended.get(folder), time.time()
        if known is not None and known.version == version:
            age = known.status.checkpoint_age_s
            return replace(known.status, checkpoint_age_s=None if age is None else age + now - known.looked)
        status = status_of(folder, queued)
        if status.state in MARKS:
            self._ended[folder] = Ended(version, now, status)
        return status

    def _rows(self, statuses: Sequence[RunStatus]) -> dict[str, object]:
        rows = [
            {
                "place": self._place(Path(status.folder)),
                "mark": MARKS.get(status.state, "open"),
                "cells": cells(status),
                "done": 100 * min(1.0, status.step / status.total) if status.total else 0.0,
                "reason": "" if status.state == "finished" else status.reason,
            }
            for status in statuses
        ]
        return {"rows": rows, "numeric": RIGHT}


def word_of(version: Version) -> str:
    """A version as pages and their script compare it."""
    return "-".join(f"{time:x}.{size:x}" for time, size in version)


def version_of(folder: Path) -> Version:
    """What changes when a run has gone on."""
    found = []
    for name in FILES:
        try:
            looked = (folder / name).stat()
        except OSError:
            found.append((0, 0))
        else:
            found.append((looked.st_mtime_ns, looked.st_size))
    return tuple(found)

"""A real run of two processes that is killed by SIGKILL again and again, and started each time.

python -m tests.pretrain.killed --help
The ranks are forked from one process that has imported the libraries.
Their import is most of what a short start takes.
From there on each is `fathom pretrain` under a launcher.
What kills them lives here alone: a timer, or a hook on the interpreter's file events.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from parallel.checkpoint.folders import resolve, steps_in
from parallel.checkpoint.reader import open_checkpoint
from parallel.launch.exit_codes import ExitCode
from pretrain.rundir.metrics import read_metrics
from tests import forks
from tests.running import be_rank
from tools import cli

# Things a process does to files; after the start of each is a place to die.
EVENTS = (
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.listdir",
    "os.scandir",
    "shutil.rmtree",
)
INTERVAL, STEPS, WORLD = 3, 24, 2
PATIENCE = 240.0
CONFIG = """
name: killed
model: {scheme: b2t, num_layers: 3, hidden_size: 16, num_attention_heads: 2, hidden_dropout: 0.1}
optimizer: {lr: 1.0e-2}
schedule: {warmup_steps: 2}
train: {steps: STEPS, global_batch_size: 4, micro_batch_size: 2, eval_samples: 0}
checkpoint: {interval: INTERVAL, keep_last: 2}
parallel: {preflight: false}
log: {signal_interval: 0, progress: none, tensorboard: false}
""".replace("STEPS", str(STEPS)).replace("INTERVAL", str(INTERVAL))


@dataclass(frozen=True)
class Kill:
    """Where a start is killed."""

    ranks: tuple[int, ...]
    """Those that die after `seconds`; with `event`, the first of them counts."""
    asynchronous: bool
    seconds: float | None = None
    event: int | None = None
    """Rank `ranks[0]` dies at this one of its file events in the checkpoints' folder."""


@dataclass
class Row:
    """A line of the table."""

    kill: int
    asynchronous: bool
    ranks: tuple[int, ...]
    moment: str
    done: int
    """Steps taken when the processes died."""
    took: int = -1
    """Step that the next start went on from."""
    said: str = ""
    """What it found."""

    @property
    def lost(self) -> int:
        return self.done - self.took


def kills(seed: int, longest: float) -> Iterator[Kill]:
    """Random moments without end, by turns of the clock and at file events.

    They save in both ways.
    longest: seconds.
    """
    draw = random.Random(seed)
    for index in itertools.count():
        asynchronous = index % 4 >= 2
        if index % 2:
            yield Kill((draw.randrange(WORLD),), asynchronous, event=draw.randint(1, 100))
        else:
            yield Kill(
                draw.choice([(0,), (1,), (0, 1)]), asynchronous, seconds=draw.uniform(0.1, 1.0) * longest
            )


def _hook(event: int, folder: Path, note: Path) -> None:
    left = event

    def look(name: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        if name in EVENTS and args and str(args[0]).startswith(str(folder)):
            left -= 1
            if left == 0:
                what = f"{name} {Path(str(args[0])).relative_to(folder)}"
                os.write(os.open(note, os.O_CREAT | os.O_WRONLY), what.encode())
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


def _rank(rank: int, port: int, config: Path, run_dir: Path, kill: Kill | None, log: Path) -> None:
    """Becomes one rank; does not return."""
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    be_rank(rank, WORLD, port)
    if kill is not None and kill.event is not None and rank in kill.ranks:
        _hook(kill.event, run_dir / "checkpoints", run_dir.parent / "moment")
    overrides = [
        f"runs_dir={run_dir.parent}",
        f"name={run_dir.name}",
        f"checkpoint.asynchronous={str(kill is not None and kill.asynchronous).lower()}",
    ]
    forks.leave(cli.main, ["pretrain", str(config), *overrides])


def start(config: Path, run_dir: Path, kill: Kill | None, log: Path) -> list[int]:
    """One start of the run, to its end or to its kill.

    Returns the exit codes of the ranks, negative for signals.
    """
    from parallel.launch.local import reserve_port

    log.unlink(missing_ok=True)
    holder, begin = reserve_port(), time.monotonic()
    port = holder.getsockname()[1]
    ranks: dict[int, int] = {}
    for rank in range(WORLD):
        pid = os.fork()
        if pid == 0:
            _rank(rank, port, config, run_dir, kill, log)
        ranks[pid] = rank
    codes: dict[int, int] = {}
    died: float | None = None
    while ranks:
        now = time.monotonic()
        assert now - begin < PATIENCE, f"a start did not end in {PATIENCE:.0f} s: {log.read_text()[-2000:]}"
        if (
            kill is not None
            and kill.seconds is not None
            and now - begin > kill.seconds
            and not codes
            and died is None
        ):
            for pid, rank in ranks.items():
                if rank in kill.ranks:
                    os.kill(pid, signal.SIGKILL)
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[ranks.pop(pid)] = os.waitstatus_to_exitcode(status)
            died = died or now
        elif died is not None and now - died > 10:  # as a launcher does with those that do not notice
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
        else:
            time.sleep(0.01)
    holder.close()
    return [codes[rank] for rank in range(WORLD)]


def _last_step(run_dir: Path) -> int:
    """Steps taken by the newest process of a run."""
    return read_metrics(run_dir / "metrics.jsonl").step if (run_dir / "metrics.jsonl").exists() else 0


def _resumed(run_dir: Path, starts: int) -> int | None:
    """Where the newest start went on from, if it came as far as saying so.

    starts: how many there were before it.
    """
    found = read_metrics(run_dir / "metrics.jsonl").starts if (run_dir / "metrics.jsonl").exists() else ()
    return found[-1].step if len(found) > starts else None


def curve(run_dir: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of every step."""
    return {
        event.step: (event.loss, event.grad_norm) for event in read_metrics(run_dir / "metrics.jsonl").train
    }


def contents(run_dir: Path) -> dict[str, str]:
    """Checksums of what the ranks wrote into the newest checkpoint.

    Weights, moments, random states.
    """
    files = open_checkpoint(run_dir).manifest.files
    return {name: facts.xxh3_64 for name, facts in files.items() if name.endswith(".safetensors")}


class Trial:
    """A run that is killed until it is done, then another, until there were `count` kills.

    Every one must end as the undisturbed run did.
    """

    def __init__(self, config: Path, folder: Path, count: int, seed: int) -> None:
        self.config, self.folder, self.count = config, folder, count
        self.rows: list[Row] = []
        plain, begin = folder / "plain", time.monotonic()
        codes = start(config, plain, None, folder / "log")
        assert codes == [0, 0], (folder / "log").read_text()
        self.curve, self.contents = curve(plain), contents(plain)
        self.kills = kills(seed, longest=time.monotonic() - begin)
        self.round = self.starts = 0

    @property
    def run_dir(self) -> Path:
        return self.folder / f"run{self.round}"

    def run(self) -> list[Row]:
        """All kills; then lets the last run end.

        Raises AssertionError where anything is not as it must be.
        """
        while len(self.rows) < self.count:
            kill = next(self.kills)
            done = self._start(kill)
            if done is not None:
                note = self.folder / "moment"
                moment = f"`{note.read_text()}`" if note.exists() else f"after {kill.seconds:.1f} s"
                self.rows.append(Row(len(self.rows) + 1, kill.asynchronous, kill.ranks, moment, done))
                self._write()
        assert self._start(None) is None
        return self.rows

    def _start(self, kill: Kill | None) -> int | None:
        """One start. Returns the steps that were taken when it was killed.

        None where the run came to its end: the next start is another run's.
        """
        confirmed = 0
        if steps_in(self.run_dir / "checkpoints"):
            open_checkpoint(self.run_dir).verify()
            confirmed = int(resolve(self.run_dir).name.removeprefix("step_"))
        (self.folder / "moment").unlink(missing_ok=True)
        codes = start(self.config, self.run_dir, kill, self.folder / "log")
        log = (self.folder / "log").read_text() if (self.folder / "log").exists() else ""
        assert int(ExitCode.USER_ERROR) not in codes, log
        done, took = confirmed, _resumed(self.run_dir, self.starts)
        if took is not None:
            assert took == confirmed, f"step {confirmed} was the newest, {took} was taken"
            self.starts += 1
            self._took(took, log)
            done = _last_step(self.run_dir)
        if codes == [0] * WORLD:
            self._ended()
            return None
        assert kill is not None, log
        assert -signal.SIGKILL in codes, f"{codes}: {log}"
        return done

    def _took(self, took: int, log: str) -> None:
        """Completes the rows of the kills before the start that went on from `took`."""
        said = re.search(r"^\w+: (.*); (?:continuing|starting) .*$", log, re.MULTILINE)
        for row in self.rows:
            if row.took < 0:
                row.took, row.said = took, said[1] if said else ""
                bound = 2 * INTERVAL if row.asynchronous else INTERVAL
                assert 0 <= row.lost <= bound, f"kill {row.kill}: {row.lost} steps lost"

        self._write()

    def _write(self) -> None:
        (self.folder / "rows.json").write_text(
            json.dumps([asdict(row) | {"lost": row.lost} for row in self.rows])
        )

    def _ended(self) -> None:
        assert curve(self.run_dir) == self.curve
        assert contents(self.run_dir) == self.contents
        assert set(steps_in(self.run_dir / "checkpoints")) == {STEPS - INTERVAL, STEPS}
        shutil.rmtree(self.run_dir)
        self.round, self.starts = self.round + 1, 0


def table(rows: list[Row]) -> str:
    """The rows as a table of Markdown."""
    lines = [
        "| kill | saving | rank | moment | step | next start took | steps lost | it found |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ranks = " and ".join(map(str, row.ranks))
        mode = "asynchronous" if row.asynchronous else "at once"
        lines.append(
            f"| {row.kill} | {mode} | {ranks} | {row.moment} | {row.done} | {row.took} "
            f"| {row.lost} | {row.said} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "folder", type=Path, help="empty folder for runs; rows.json and table.md are written there"
    )
    parser.add_argument("--config", type=Path, required=True, help="configuration of the run, with its data")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    importlib.import_module("tests.preloaded")
    trial(options.config, options.folder, options.kills, options.seed)


def trial(config: Path, folder: Path, kills: int, seed: int) -> None:
    """Writes rows.json and table.md into a folder that is there."""
    warnings.filterwarnings("ignore")
    rows = Trial(config, folder, kills, seed).run()
    (folder / "table.md").write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()

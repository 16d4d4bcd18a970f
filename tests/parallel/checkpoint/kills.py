"""A training that SIGKILL ends again and again, inside saves above all. Runs inside ranks."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from model.files import atomic_write_text
from parallel.checkpoint.folders import leftovers_in, steps_in
from parallel.checkpoint.reader import open_checkpoint
from parallel.checkpoint.writer import prune
from tests.distributed import gather
from tests.parallel.checkpoint.states import bring, keep
from tests.parallel.training import engine_of, given, run_config, train

CONFIG = run_config(given(hidden_dropout=0.1))
# Python-level events of a save that touch files; after each of them is a place to die.
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


@dataclass(frozen=True)
class Kill:
    """How a start of the run ends: a rank dies."""

    rank: int
    seconds: float | None = None
    """After so many of the loop."""
    event: int | None = None
    """At this file event of the rank in the loop."""

    def arm(self, folder: Path) -> None:
        if dist.get_rank() != self.rank:
            return
        if self.seconds is not None:
            _kill_later(os.getpid(), self.seconds)
            return
        left, place = self.event or 0, str(folder)

        def hook(event: str, args: tuple[object, ...]) -> None:
            nonlocal left
            if event in EVENTS and args and str(args[0]).startswith(place):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)


def _kill_later(pid: int, seconds: float) -> None:
    """From another process: a thread of this one would wait for calls that hold the interpreter."""
    if os.fork() == 0:
        time.sleep(seconds)
        if os.getppid() == pid:
            os.kill(pid, signal.SIGKILL)
        os._exit(0)


def kills(count: int, seed: int, longest: float) -> list[Kill]:
    """Kills at random moments of the clock and at random file events, by turns.

    longest: seconds.
    """
    draw = random.Random(seed)
    return [
        Kill(draw.randrange(2), seconds=draw.uniform(0.0, longest))
        if index % 2 == 0
        else Kill(draw.randrange(2), event=draw.randint(1, 80))
        for index in range(count)
    ]


def start(root: str, expected: list[float], kill: Kill | None, until: int) -> dict[str, object]:
    """One start of the run: finds what is there, checks it, goes on until killed or done.

    It saves after every step.
    expected: losses of the undisturbed run.
    Raises AssertionError where anything was lost but the step that was going on, or is wrong.
    """
    folder, confirmed = Path(root) / "checkpoints", Path(root) / "confirmed"
    engine = engine_of(CONFIG)
    step, found = 0, [entry.name for entry in leftovers_in(folder)] if folder.is_dir() else []
    promised = int(confirmed.read_text()) if confirmed.exists() else 0
    if steps_in(folder):
        reader = open_checkpoint(folder)
        reader.verify()
        step = reader.step
        assert bring(engine, folder), "random states belong to this layout"
    assert step >= promised, f"step {promised} was confirmed, {step} was found"
    assert len(set(gather(step))) == 1
    facts = {"step": step, "promised": promised, "leftovers": found}
    with (Path(root) / f"starts_{dist.get_rank()}").open("a") as file:
        file.write(f"{facts}\n")
    dist.barrier()
    if kill is not None:
        kill.arm(folder)
    while step < until or kill is not None:
        (loss,) = train(CONFIG, engine, step, step + 1).losses
        assert step >= len(expected) or loss == expected[step], (
            f"step {step}: loss {loss}, undisturbed {expected[step]}"
        )
        step += 1
        keep(engine, CONFIG, folder, step)
        if dist.get_rank() == 0:
            atomic_write_text(confirmed, str(step))
            prune(folder, keep_last=1, keep_every=0)
    return facts | {"end": step}


def undisturbed(steps: int) -> list[float]:
    """Losses of a run that nobody kills."""
    return train(CONFIG, engine_of(CONFIG), 0, steps).losses


def time_of_saves(root: str, count: int) -> float:
    """Seconds that some steps with their saves take here."""
    engine = engine_of(CONFIG)
    train(CONFIG, engine, 0, 1)
    begin = time.perf_counter()
    for step in range(1, count + 1):
        train(CONFIG, engine, step, step + 1)
        keep(engine, CONFIG, Path(root) / "timing", step)
        if dist.get_rank() == 0:
            prune(Path(root) / "timing", keep_last=1, keep_every=0)
    value = torch.tensor(time.perf_counter() - begin)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return float(value)

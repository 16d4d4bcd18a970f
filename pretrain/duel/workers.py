"""Training the cells of a duel: a few worker processes that stay alive from cell to cell, as
importing costs more than many a small cell.

Each worker has a pipe to the parent and shares no lock with anybody: one that is killed takes its
own cell along and nothing else, and another worker takes its place.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType

from model.files import atomic_write_text
from parallel.launch.exit_codes import ExitCode
from parallel.launch.local import stop_signals
from pretrain.config.schema import RunConfig
from pretrain.duel.grid import DONE, RESULT, CellResult, check_unchanged, finished
from pretrain.rundir.state import Owner, stop_file

CONTEXT = multiprocessing.get_context("spawn")


def train_cell(config: RunConfig) -> CellResult:
    """Trains one cell in this process and writes its result.

    Checkpoints are removed once the cell is finished.
    """
    from parallel.launch.one_process import single_process
    from parallel.launch.ranks import ALONE
    from pretrain.train.run import _train

    folder = Path(config.runs_dir) / config.name
    begin = time.time()
    try:
        code, reason = _train(config, ALONE, single_process(), folder)
    finally:
        gc.collect()  # an engine is a circle of references, and the next cell needs its memory
    seconds = round(time.time() - begin, 1)
    result = CellResult(name=config.name, code=int(code), reason=reason, seconds=seconds)
    if code in DONE:
        atomic_write_text(folder / RESULT, json.dumps(result.model_dump()))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return result


def given_devices(count: int, env: Mapping[str, str]) -> list[str]:
    """The GPUs that this process was given, each as CUDA_VISIBLE_DEVICES names it: an index, a UUID
    or a MIG id.

    count: how many PyTorch sees; it ends at the first name that is none, as CUDA does.
    """
    names = [name.strip() for name in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (names or [str(index) for index in range(count)])[:count]


def default_jobs() -> int:
    """One worker per GPU, or per processor."""
    import torch

    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


def train_cells(configs: Sequence[RunConfig], jobs: int, report: Callable[[str], None]) -> None:
    """Trains what is not finished, `jobs` cells at a time.

    report: takes lines of progress.
    """
    check_unchanged(configs)
    waiting = [config for config in configs if finished(Path(config.runs_dir) / config.name) is None]
    if not waiting:
        return
    before = len(configs) - len(waiting)
    workers = min(jobs, len(waiting))
    report(f"{before} of {len(configs)} cells are finished; training {len(waiting)} with {workers} workers")
    done = 0
    for result in _run(waiting, workers):
        done += result.code in DONE
        report(f"[{before + done}/{len(configs)}] {result.name}: {result.reason} ({result.seconds:.0f} s)")


class _Worker:
    """The parent's side of one worker."""

    def __init__(self, device: str | None) -> None:
        self.device = device
        self.connection, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_work, args=(theirs, device), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self.ready = False
        """Whether it has imported what it needs."""
        self.cell: str | None = None
        """Name of the cell at work."""

    def give(self, config: RunConfig) -> None:
        """Hands it a cell."""
        self.cell = config.name
        with contextlib.suppress(OSError):  # it is gone, which the next look finds
            self.connection.send(config)

    def interrupt(self) -> None:
        """Makes it save and leave."""
        if self.ready and self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGINT)


def _run(configs: Sequence[RunConfig], number: int) -> Iterator[CellResult]:
    """Results as cells end.

    Ctrl-C and SIGTERM make running cells save and leave, and no other begin.
    """
    import torch

    waiting, asked = deque(configs), False
    devices = given_devices(torch.cuda.device_count(), os.environ)
    workers = [_Worker(devices[index % len(devices)] if devices else None) for index in range(number)]

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        for worker in workers:
            worker.interrupt()

    previous = {signum: signal.signal(signum, interrupt) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        while workers:
            for connection in wait([worker.connection for worker in workers], timeout=0.5):
                worker = next(one for one in workers if one.connection is connection)
                try:
                    result: CellResult | None = worker.connection.recv()
                except (EOFError, OSError):
                    workers.remove(worker)
                    if worker.cell is not None:
                        yield _lost(worker.cell, "the worker was killed (out of memory?)")
                    if worker.ready and waiting and not asked:
                        workers.append(_Worker(worker.device))
                    continue
                worker.ready, worker.cell = True, None
                if result is not None:
                    asked = asked or result.code in (ExitCode.STOPPED, ExitCode.STOPPED_BY_USER)
                    yield result
                if waiting and not asked:
                    worker.give(waiting.popleft())
                else:
                    worker.connection.close()
                    workers.remove(worker)
        for config in () if asked else waiting:
            yield _lost(config.name, "no worker could be started: see above")
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        for worker in workers:
            worker.process.terminate()


def _lost(name: str, reason: str) -> CellResult:
    return CellResult(name=name, code=int(ExitCode.CRASH), reason=reason, seconds=0.0)


def _work(connection: Connection, device: str | None) -> None:
    """Trains cells until there are no more, or the parent is gone."""
    asked_in: list[Path] = []

    def remember(number: int, frame: FrameType | None) -> None:
        """Leaves word for a run that does not listen to signals yet."""
        for path in asked_in:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("INT")

    signal.signal(signal.SIGINT, remember)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    else:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    import warnings

    warnings.filterwarnings("ignore")
    with contextlib.suppress(EOFError, BrokenPipeError):
        connection.send(None)
        while True:
            config: RunConfig = connection.recv()
            stop = stop_file(Path(config.runs_dir) / config.name, Owner.from_environment())
            stop.unlink(missing_ok=True)
            asked_in[:] = [stop]
            try:
                result = train_cell(config)
            except Exception as error:  # one broken cell must not end the others
                if os.environ.get("FATHOM_DEBUG") == "1":
                    raise
                result = _lost(config.name, f"{type(error).__name__}: {error}")
            for number in stop_signals():  # to which the run has listened
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, remember)
            asked_in.clear()
            stop.unlink(missing_ok=True)
            connection.send(result)

"""Callbacks that send a run's numbers to trackers, and never wait for one.

Numbers go into a bounded queue, which a thread empties into the pipe of the tracker's process. A
tracker that is down, slow or not set up costs one warning, and the numbers that find no place.
"""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import IO, Any

from model.files import atomic_write_text
from model.records import Record, read_record
from parallel.launch.exit_codes import ExitCode
from parallel.launch.host import same_code
from pretrain.train.callbacks.base import EvalRecord, RunView, StepRecord
from pretrain.train.callbacks.scalars import Scalars

FOLDER = "trackers"
"""In a run's folder: what continues its entries, and files of trackers that have no server."""
WAITING = 1000
"""Steps that wait for a tracker at most."""
CLOSE_S = 15.0
"""Longest wait at the end of a run."""


class Saved(Record):
    """The file of a tracker in the run's folder."""

    id: str


class Tracked(Scalars):
    """Sends what TensorBoard shows to the tracker `name`."""

    name = ""

    def on_start(self, trainer: RunView) -> None:
        """Starts the tracker's process, and waits for nothing."""
        self.folder = trainer.run_dir.resolve() / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self._values: dict[str, float] = {}
        self._queue: queue.Queue[str | None] = queue.Queue(WAITING)
        self._problem: str | None = None
        self._told = False
        with open(self.folder / f"{self.name}.log", "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pretrain.train.callbacks.trackers.process", self.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env={**os.environ, **same_code()},
                start_new_session=True,  # Ctrl-C is the run's
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._put(self._entry(trainer))
        self._sender = threading.Thread(target=self._send, args=(self._process.stdin,), daemon=True)
        self._listener = threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True)
        self._sender.start()
        self._listener.start()

    def _entry(self, trainer: RunView) -> dict[str, Any]:
        config = trainer.config
        try:
            known = read_record(self.folder / f"{self.name}.json", Saved, "").id
        except (OSError, ValueError):  # a new entry is better than none
            known = None
        return {
            "name": config.name,
            "project": config.log.project,
            "folder": str(self.folder / self.name),
            "id": known,
            "offline": config.log.offline,
            "config": flat(config.model_dump(mode="json")),
        }

    def add(self, tag: str, value: float, step: int) -> None:
        """Keeps a number until its step is told, where it is finite."""
        if math.isfinite(value):
            self._values[tag] = value

    def on_step(self, trainer: RunView, record: StepRecord) -> None:
        """Sends a step, and tells what is wrong, once."""
        super().on_step(trainer, record)
        self._flush(trainer.step)
        if self._problem is not None and not self._told:
            self._told = True
            trainer.tell("on_warning", self._words())

    def on_eval(self, trainer: RunView, record: EvalRecord) -> None:
        """Sends an evaluation."""
        super().on_eval(trainer, record)
        self._flush(trainer.step)

    def on_end(self, trainer: RunView, code: ExitCode, reason: str) -> None:
        """Lets the tracker end its entry, for a while."""
        self._put({"finished": code == ExitCode.FINISHED})
        self._put(None)
        try:
            self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._problem = self._problem or f"it was not done {CLOSE_S:.0f} s after the end"
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._listener.join(1)
        if self._problem is not None and not self._told:
            print(f"fathom: warning: {self._words()}", file=sys.stderr)

    def _words(self) -> str:
        log = self.folder / f"{self.name}.log"
        return f"log.{self.name}: {self._problem}; metrics.jsonl has all numbers, {log} what it printed"

    def _flush(self, step: int) -> None:
        values, self._values = self._values, {}
        self._put({"step": step, "values": values})

    def _put(self, message: dict[str, Any] | None) -> None:
        """Never waits: what finds no place is left out."""
        try:
            self._queue.put_nowait(None if message is None else json.dumps(message) + "\n")
        except queue.Full:
            self._problem = self._problem or f"it is {WAITING} steps behind: numbers are left out"
            if message is None or "finished" in message:
                with suppress(queue.Empty):
                    self._queue.get_nowait()
                self._queue.put(None if message is None else json.dumps(message) + "\n")

    def _send(self, pipe: IO[str]) -> None:
        """Of a thread: writes what waits, until the end, or until nobody reads."""
        with suppress(OSError, ValueError):
            while (line := self._queue.get()) is not None:
                pipe.write(line)
                pipe.flush()
        with suppress(OSError, ValueError):
            pipe.close()

    def _listen(self, pipe: IO[str]) -> None:
        """Of a thread: keeps the entry's id, and what went wrong."""
        for line in pipe:
            word, _, text = line.strip().partition(" ")
            if word == "id":
                with suppress(OSError):
                    atomic_write_text(self.folder / f"{self.name}.json", json.dumps({"id": text}) + "\n")
            elif word == "problem":
                self._problem = self._problem or text
            elif word == "ended":
                return
        self._problem = self._problem or "its process ended"


class Wandb(Tracked):
    """Weights & Biases."""

    name = "wandb"


class Mlflow(Tracked):
    """MLflow."""

    name = "mlflow"


class Comet(Tracked):
    """Comet."""

    name = "comet"


class Aim(Tracked):
    """Aim."""

    name = "aim"


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, str | int | float | bool | None]:
    """A configuration by dotted keys; lists as JSON."""
    found: dict[str, str | int | float | bool | None] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = json.dumps(value) if isinstance(value, list) else value
    return found

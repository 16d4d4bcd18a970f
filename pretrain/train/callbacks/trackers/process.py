"""The process of one tracker: numbers come in on standard input, words go out on standard output.

It outlives no run for long: at the end of its input it closes the entry and leaves, whatever the
library still waits for. Signals that are meant for the run do not end it first.

python -m pretrain.train.callbacks.trackers.process NAME
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import threading
from typing import TextIO

from pretrain.train.callbacks.trackers.aim_client import AimClient
from pretrain.train.callbacks.trackers.comet_client import CometClient
from pretrain.train.callbacks.trackers.entry import Client, Entry
from pretrain.train.callbacks.trackers.mlflow_client import MlflowClient
from pretrain.train.callbacks.trackers.wandb_client import WandbClient

CLIENTS: dict[str, type[Client]] = {
    "wandb": WandbClient,
    "mlflow": MlflowClient,
    "comet": CometClient,
    "aim": AimClient,
}
"""By the field of `log` that turns it on. Another is an entry here and in `LOGGERS`, and a file."""
LEAVE_S = 60.0
"""Longest time after the end of the input, for what the library has not sent yet."""
REASON = 300
"""Characters kept of what a library says."""


def serve(name: str, lines: TextIO, told: TextIO) -> None:
    """Does what the lines say, the first of which describes the entry.

    Writes `id ID` once, and at last `ended`, or `problem TEXT` where it cannot go on.
    """
    client = CLIENTS[name]()
    try:
        if importlib.util.find_spec(client.module) is None:
            raise ModuleNotFoundError(f"it is not installed: pip install {client.package}")
        entry = Entry(**json.loads(lines.readline()))
        print("id", client.open(entry), file=told, flush=True)
        finished = False
        for line in lines:
            message = json.loads(line)
            if "finished" in message:
                finished = message["finished"]
            else:
                client.log(message["step"], message["values"])
        threading.Timer(LEAVE_S, os._exit, (1,)).start()
        client.close(finished)
        print("ended", file=told, flush=True)
    except Exception as error:
        words = " ".join(str(error).split()) or type(error).__name__
        print("problem", words[:REASON], file=told, flush=True)


def main(name: str) -> None:
    """Runs as a process of its own. What the library prints goes to standard error."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(name, sys.stdin, told)
    told.flush()
    sys.stdout.flush()
    os._exit(0)  # no library's own waiting at the exit


if __name__ == "__main__":
    main(sys.argv[1])

"""A private Slurm cluster on this host, for tests: real slurmctld, slurmd and munge.

lab/start.sh starts them in a folder of their own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path

LAB = Path(__file__).resolve().parent / "lab"
CANNOT_RUN_HERE = 77
PATIENCE = 900.0
"""Seconds until a wait is given up.

Many times what anything takes on an idle machine, as tests share theirs.
"""
FINAL = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
)


class UnavailableError(Exception):
    """Slurm cannot run here; the text says why."""


class Cluster:
    """Nodes node1, node2, ...

    Mode `flat`: all on one address, names do not resolve.
    Mode `netns`: each with its own network (root needed).
    """

    def __init__(self, mode: str = "flat", nodes: int = 2, **env: str) -> None:
        # A short path: names of UNIX sockets are limited to 107 bytes.
        self.dir = Path(tempfile.mkdtemp(prefix="slurm.", dir="/tmp")).resolve()
        self.mode = mode
        self.nodes = [f"node{index + 1}" for index in range(nodes)]
        # With the variables of an outer job, srun would make a step of that job.
        self.env = {
            key: value
            for key, value in os.environ.items()
            if not re.match(r"(SLURM|SBATCH|SRUN|SALLOC|SQUEUE|SINFO)", key)
        }
        self.env.update(LAB_MODE=mode, LAB_NODES=str(nodes), OMP_NUM_THREADS="1", **env)
        try:
            answer = subprocess.run(
                [LAB / "start.sh", self.dir], env=self.env, text=True, capture_output=True, timeout=PATIENCE
            )
        except subprocess.TimeoutExpired:
            self.close()  # the daemons that did start
            raise
        if answer.returncode:
            shutil.rmtree(self.dir, ignore_errors=True)
            if answer.returncode == CANNOT_RUN_HERE:
                raise UnavailableError(answer.stderr.strip().replace("start.sh: SKIP: ", ""))
            raise RuntimeError(answer.stderr)
        self.work = self.dir / "work"
        self.work.mkdir()
        self.commands = self.dir / "commands"
        self.commands.mkdir()
        for name in ("sbatch", "squeue", "scontrol"):
            wrapper = self.commands / name
            # sbatch hands PATH on to the job, which is inside of the cluster already.
            wrapper.write_text(
                f'#!/bin/sh\nif [ -n "$SLURM_JOB_ID" ]; then exec {shutil.which(name)} "$@"; fi\n'
                f'exec {self.dir}/in {shutil.which(name)} "$@"\n'
            )
            wrapper.chmod(0o755)

    def run(
        self,
        *command: object,
        check: bool = True,
        timeout: float = PATIENCE,
        env: Mapping[str, str] | None = None,
        **options: str,
    ) -> str:
        """Output of a client command on this cluster."""
        words = [str(self.dir / "in"), *map(str, command)]
        answer = subprocess.run(
            words,
            cwd=self.work,
            env={**self.env, **(env or {})},
            text=True,
            capture_output=True,
            timeout=timeout,
            **options,
        )  # type: ignore[call-overload]
        if check and answer.returncode:
            raise RuntimeError(f"{command} -> {answer.returncode}\n{answer.stdout}\n{answer.stderr}")
        return str(answer.stdout)

    def job(self, job: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        line = self.run("scontrol", "show", "job", "-o", job).splitlines()[0]
        return {key: value for key, mark, value in (field.partition("=") for field in line.split()) if mark}

    def wait(self, job: str, states: Collection[str] = FINAL, timeout: float = PATIENCE) -> str:
        """Polls until a job is in one of the states.

        sbatch --wait looks after 2, 8, 32, 32, ... s only.
        """
        end = time.monotonic() + timeout
        while (state := self.job(job)["JobState"]) not in states:
            if time.monotonic() > end:
                raise TimeoutError(
                    f"job {job} is {state}, wanted {states}\n{self.run('squeue')}{self.run('sinfo', '-N')}"
                )
            time.sleep(0.2)
        return state

    def wait_text(self, path: Path, pattern: str, timeout: float = PATIENCE) -> None:
        """Polls until a file has a text.

        Before a signal, wait for a line, as RUNNING alone does not say that handlers are there.
        """
        end = time.monotonic() + timeout
        while not (path.exists() and re.search(pattern, path.read_text(errors="replace"))):
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{pattern!r} did not appear in {path}: "
                    f"{path.read_text() if path.exists() else 'no file'}"
                )
            time.sleep(0.1)

    def signal_batch(self, job: str, name: str = "USR1") -> None:
        """What slurmctld does by itself before a time limit."""
        self.run("scancel", f"--signal={name}", "--batch", job)

    def node_off(self, node: str, noticed: bool = True) -> None:
        """Power off. noticed: slurmctld is told, and does not wait for its time-out."""
        subprocess.run([LAB / "node_off.sh", self.dir, node], check=True)
        if noticed:
            self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=power")

    def node_on(self, node: str) -> None:
        """Power on."""
        subprocess.run([self.dir / "node_up", node], env=self.env, check=True)

    def reset(self) -> None:
        """Between tests: no job, every node usable.

        A node may say `mixed` without a job until the next change.
        """
        jobs = set(self.run("squeue", "-h", "-o", "%A").split())
        if jobs:
            self.run("scancel", "-Q", *jobs, check=False)
        for node in self.nodes:
            if not (self.dir / (f"pid/{node}" if self.mode == "netns" else f"slurmd.{node}.pid")).exists():
                self.node_on(node)
        end = time.monotonic() + PATIENCE
        while self.run("squeue", "-h") or not all(
            self._state(node) in ("idle", "mixed", "allocated") for node in self.nodes
        ):
            for node in self.nodes:
                if self._state(node).startswith("drain"):
                    self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
            if time.monotonic() > end:
                raise TimeoutError(self.run("sinfo", "-N", "-l"))
            time.sleep(0.2)

    def close(self) -> None:
        """Ends exactly this cluster's processes and removes its folder."""
        subprocess.run([LAB / "stop.sh", self.dir, "--rm"], env=self.env, check=True)

    def _state(self, node: str) -> str:
        return self.run("sinfo", "-h", "-N", "-p", "debug", "-n", node, "-o", "%T").strip()

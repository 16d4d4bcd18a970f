"""How many processes and threads a machine takes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from model.errors import UserError
from parallel.launch import host
from parallel.launch.host import check_processes, cores, free_memory, threads_per_process


@pytest.fixture
def two_of_64(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 64 cores on which this process is bound to two."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {5, 6})
    monkeypatch.setattr(host, "_cgroups", lambda: iter(()))


def test_cores_are_those_this_process_may_use(two_of_64: None) -> None:
    assert cores() == 2
    assert [threads_per_process(processes, {}) for processes in (1, 2, 4)] == [2, 1, 1]


def test_a_container_may_have_less(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    inner, outer = tmp_path / "outer" / "inner", tmp_path / "outer"
    inner.mkdir(parents=True)
    monkeypatch.setattr(host, "_cgroups", lambda: iter((inner, outer, tmp_path)))
    (inner / "cpu.max").write_text("max 100000\n")
    (outer / "cpu.max").write_text("250000 100000\n")
    (outer / "memory.max").write_text("1048576\n")
    (outer / "memory.current").write_text("1000000\n")
    (inner / "memory.max").write_text("max\n")
    assert cores() == 3
    assert free_memory() == 48576


def test_threads_of_tasks_that_have_cores_of_their_own(
    monkeypatch: pytest.MonkeyPatch, two_of_64: None
) -> None:
    """Four tasks of 16 cores: each sees 16 where Slurm binds them, else all 64."""
    for bound in (16, 64):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, bound=bound: set(range(bound)))
        assert threads_per_process(4, {"SLURM_CPUS_PER_TASK": "16"}) == 16


def test_more_processes_than_a_machine_takes_are_refused(
    monkeypatch: pytest.MonkeyPatch, two_of_64: None
) -> None:
    monkeypatch.setattr(host, "free_memory", lambda: 8 << 30)
    for processes in (1, 8, 16):
        check_processes(processes, 0)
    with pytest.raises(
        UserError,
        match="parallel.processes=17 is too much for this machine: its 2 cores take up to 16 processes",
    ):
        check_processes(17, 0)
    with pytest.raises(UserError, match="parallel.processes=1000000 is too much"):
        check_processes(10**6, 0)
    with pytest.raises(
        UserError, match="parallel.processes=3: this machine has 2 GPUs, and each process needs its own"
    ):
        check_processes(3, 2)
    monkeypatch.setattr(host, "free_memory", lambda: 1 << 30)
    check_processes(4, 0)
    with pytest.raises(
        UserError,
        match="parallel.processes=8 needs 2.0 GiB before there is a model, 1.0 GiB of memory are free",
    ):
        check_processes(8, 0)

"""The stand-ins that let Megatron-core run without a GPU, and the memory that its steps reuse."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch

from parallel.launch import cpu
from tests.distributed import Group, launch

FAULTS = """
import ctypes, resource, sys
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages in this process: faults are counted by the page
import torch
torch.set_num_threads(1)
from parallel.launch.cpu import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def use():
    return [torch.ones(10 << 20) for _ in range(6)]  # 240 MiB; glibc asks the system for each of these
for _ in range(5):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def product(a: float, b: float) -> float:
    return float(torch.tensor(a) * torch.tensor(b))


def test_numbers_without_full_precision_are_zero_in_every_thread() -> None:
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor has no such mode")
    assert product(1e-30, 1e-10) > 0
    cpu.enable.__wrapped__()
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.append(product(1e-30, 1e-10)))
    thread.start()
    thread.join()
    weight = torch.tensor(1.0, requires_grad=True)
    (weight * 1e-30 * 1e-10).backward()
    assert (found, weight.grad, product(1e-30, 1e-10)) == ([0.0], 0.0, 0.0)
    assert product(1e-30, 1e-7) > 0


def backend(group: torch.distributed.ProcessGroup | None) -> Any:
    assert group is not None
    return group._get_backend(torch.device("cpu"))


def workers() -> list[int]:
    """Runs inside a rank: the threads of its first group and of a later one."""
    later = torch.distributed.new_group([0], timeout=timedelta(seconds=5))
    return [backend(group).options._threads for group in (torch.distributed.group.WORLD, later)]


def in_flight(seconds: float) -> set[float]:
    """Runs inside a rank: what gathers and sums gave of which many were under way together."""
    group = backend(torch.distributed.group.WORLD)
    pieces, x = [[[torch.ones(1)]] for _ in range(32)], [torch.ones(1)]
    found: set[float] = set()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sums = [torch.ones(1) for _ in pieces]
        begun = []
        for total, piece in zip(sums, pieces, strict=True):
            begun += [group.allreduce([total]), group.allgather_coalesced(piece, x)]
        for work in begun:
            work.wait()
        found.update(total.item() for total in (*sums, *(piece[0][0] for piece in pieces)))
    return found


def test_collectives_of_a_group_run_one_after_another_and_damage_no_memory() -> None:
    """With two workers the second process ends within a second, by a signal."""
    assert launch(Group(1, workers), Group(1, in_flight, (2,))) == [[[1, 1]], [{1.0}]]


def test_devices_of_gpus_become_the_cpu() -> None:
    stand_in = cpu._stand_in()
    assert stand_in.empty(2, device="cuda").device.type == "cpu"
    assert stand_in.zeros(2, device=0).device.type == "cpu"
    assert stand_in.cuda.current_device() == "cpu"
    assert torch.cuda is not stand_in.cuda


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the switch is glibc's")
def test_freed_memory_is_used_again() -> None:
    def faults(mode: str) -> int:
        return int(
            subprocess.run(
                [sys.executable, "-W", "ignore", "-c", FAULTS, mode],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )

    pages = 3 * (240 << 20) // resource.getpagesize()
    assert faults("keep") < pages // 20 < pages // 2 < faults("give back")

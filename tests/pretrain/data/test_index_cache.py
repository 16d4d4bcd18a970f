from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pretrain.data.index_cache as index_cache
from model.errors import UserError
from pretrain.data.index_cache import build_once

RACE = """
import os, sys, time
from pathlib import Path
import numpy as np
from pretrain.data.index_cache import build_once

folder = Path(sys.argv[1])

def build():
    (folder / f"built-{os.getpid()}").touch()
    time.sleep(0.5)
    return np.arange(1000)

(folder / f"ready-{os.getpid()}").touch()
while len(list(folder.glob("ready-*"))) < 4:
    time.sleep(0.001)
assert build_once(folder / "cache" / "index.npy", build, 1000).sum() == 499500
"""


def test_of_four_processes_one_builds_and_all_read(tmp_path: Path) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", RACE, str(tmp_path)]) for _ in range(4)]
    assert [process.wait(240) for process in processes] == [0] * 4
    assert len(list(tmp_path.glob("built-*"))) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["index.npy"]


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    (tmp_path / "index.npy.lock").write_text(json.dumps({"host": socket.gethostname(), "pid": child.pid}))
    assert build_once(tmp_path / "index.npy", lambda: np.arange(3), 3).tolist() == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["index.npy"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".index.npy.abcd.tmp").write_bytes(b"half")
    (tmp_path / ".other.npy.abcd.tmp").write_bytes(b"somebody's")
    build_once(tmp_path / "index.npy", lambda: np.arange(3), 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.npy.abcd.tmp", "index.npy"]


GARBAGE = {
    "empty": b"",
    "text": b"not an array",
    "cut": None,
    "one number": None,
    "pipe": None,
    "other length": np.arange(5),
    "other type": np.arange(4, dtype=np.int32),
    "floats": np.arange(4.0),
    "no checksum": np.array([0, 1, 2, 3]),
    "objects": np.array([{}, 1, 2, 3], dtype=object),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_built_again(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "index.npy"
    build_once(path, lambda: np.arange(3), 3)
    content = GARBAGE[name]
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif content is not None:
        path.write_bytes(content)
    elif name == "cut":
        os.truncate(path, 140)
    elif name == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        stored = np.load(path, mmap_mode="r+")
        stored[1] = 7
        stored.flush()
    assert build_once(path, lambda: np.arange(3), 3).tolist() == [0, 1, 2]
    assert "index.npy is damaged" in caplog.text
    assert build_once(path, lambda: pytest.fail("built again"), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "content", ["[]", "5", '{"host": 5, "pid": 1}', "nonsense", f'{{"host": "HOST", "pid": {10**30}}}']
)
def test_a_lock_of_garbage_is_waited_for_and_taken_over(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: str,
) -> None:
    lock = tmp_path / "index.npy.lock"
    lock.write_text(content.replace("HOST", socket.gethostname()))
    clock = Clock(lock, silent_after=0.0)
    monkeypatch.setattr(index_cache, "time", clock)
    assert build_once(tmp_path / "index.npy", lambda: np.arange(3), 3).tolist() == [0, 1, 2]
    assert clock.now >= index_cache.STALE_S


class Clock:
    """Stands in for the module `time`; a lock shows signs of life until `silent_after`."""

    def __init__(self, lock: Path, silent_after: float) -> None:
        self.now, self.lock, self.silent_after = 0.0, lock, silent_after

    def monotonic(self) -> float:
        return self.now

    time = monotonic

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now < self.silent_after:
            os.utime(self.lock, ns=(round(self.now * 1e9),) * 2)


def test_a_silent_lock_is_taken_over_and_a_living_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lock = tmp_path / "index.npy.lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    clock = Clock(lock, silent_after=100.0)
    monkeypatch.setattr(index_cache, "time", clock)
    build_once(tmp_path / "index.npy", lambda: np.arange(3), 3)
    assert clock.now + index_cache.POLL_S >= 100.0 + index_cache.STALE_S
    assert clock.now < 100.0 + index_cache.STALE_S + 3 * index_cache.POLL_S
    assert caplog.text.count("waiting for index built by elsewhere") == 3  # after 5 s, and then each minute


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, array: np.ndarray) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index_cache, "_store", full)
    with pytest.raises(
        UserError, match="data.cache: no sample indices can be written.*No space left.*another folder"
    ):
        build_once(tmp_path / "index.npy", lambda: np.arange(3), 3)
    assert build_once(tmp_path / "index.npy", lambda: np.arange(3), 3, alone=True).tolist() == [0, 1, 2]
    assert list(tmp_path.iterdir()) == []


def test_a_failed_build_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(MemoryError):
        build_once(tmp_path / "index.npy", lambda: (_ for _ in ()).throw(MemoryError()), 3)
    assert list(tmp_path.iterdir()) == []

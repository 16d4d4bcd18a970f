"""The board over runs that go on, ask for too much, are damaged, or are not there."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.errors import UserError
from pretrain.board.pages import Board
from pretrain.board.server import BoardServer
from pretrain.report.run import RunRecord
from pretrain.report.run_charts import Chart
from pretrain.report.run_report import render
from pretrain.rundir.metrics import MetricsWriter
from pretrain.rundir.state import claim, write_state
from tests.pretrain.cluster.starts import checkpoint, make_run

NAME = "a <b> & c"
PLACE = "/run/of%20us/a%20%3Cb%3E%20%26%20c"
ENVIRONMENT = dict(os.environ)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs, the second in a folder of its own, with a name that has to be escaped."""
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm
    make_run(tmp_path / "runs" / "plain", steps=3)
    make_run(tmp_path / "runs" / "of us" / NAME, steps=7)
    return tmp_path / "runs"


@pytest.fixture
def server(runs: Path) -> Iterator[BoardServer]:
    with BoardServer(Board(runs), "127.0.0.1", 0, 1.0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server: BoardServer, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def take_step(folder: Path, step: int) -> None:
    with MetricsWriter(folder / "metrics.jsonl") as writer:
        writer.write("train", step, loss=1.5, tokens=step * 512, tokens_per_s=1024.0, step_time_s=0.5)


def test_all_runs_and_the_report_of_each(server: BoardServer, runs: Path) -> None:
    status, page = get(server, "/")
    assert status == 200
    assert page.count("<tr>") == 3
    assert '<a href="run/plain">plain</a>' in page
    assert f'<a href="{PLACE[1:]}">a &lt;b&gt; &amp; c</a>' in page
    assert "7/100" in page
    status, report = get(server, PLACE)
    assert status == 200
    assert "<h1>a &lt;b&gt; &amp; c</h1>" in report
    assert report.count("<svg") > 1
    assert re.search(
        r'<script src="/board.js" data-interval="1.0" data-version="[0-9a-f.-]+"></script>', report
    )
    assert get(server, "/board.js")[1].startswith("// Keeps a page")


def test_what_goes_on_is_shown_and_what_does_not_is_not_read_again(server: BoardServer, runs: Path) -> None:
    before, first = get(server, "/version/plain")[1], get(server, "/run/plain")[1]
    assert get(server, "/run/plain")[1] == first
    take_step(runs / "plain", 42)
    assert "42/100" in get(server, "/rows")[1]
    assert get(server, "/version/plain")[1] != before
    assert "at step 42" in get(server, "/run/plain")[1]
    claim(runs / "plain")
    write_state(runs / "plain", state="failed", exit_code=1, reason="a <reason>")
    assert "a &lt;reason&gt;" in get(server, "/rows")[1]
    metrics = runs / "plain" / "metrics.jsonl"
    times, content = metrics.stat(), metrics.read_bytes()
    metrics.write_bytes(content.replace(b"42", b"43"))
    os.utime(metrics, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "42/100" in get(server, "/rows")[1]  # as far as it can see nothing has changed
    metrics.touch()
    assert "43/100" in get(server, "/rows")[1]


def test_a_report_is_drawn_once_for_each_change(
    server: BoardServer, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what the newest checkpoint makes of samples once for each checkpoint."""
    drawn, sampled = [], []

    def counted(run: RunRecord, samples: list[Chart]) -> str:
        drawn.append(run.name)
        return render(run, samples)

    monkeypatch.setattr("pretrain.board.pages.render", counted)

    def nothing(run: RunRecord) -> list[Chart]:
        sampled.append(run.name)
        return []

    monkeypatch.setattr("pretrain.board.pages.sample_charts", nothing)
    for count in (1, 2, 3):
        for _ in range(2):
            page = get(server, "/run/plain")[1]
            assert f'data-version="{get(server, "/version/plain")[1]}"' in page
        assert (len(drawn), len(sampled)) == (count, 1)
        take_step(runs / "plain", 10 + count)
    checkpoint(runs / "plain", 12)
    (runs / "plain" / "checkpoints" / "latest").write_text("step_00000012\n")
    get(server, "/run/plain")
    assert (len(drawn), len(sampled)) == (4, 2)


def test_a_run_that_cannot_be_read_hides_no_other(server: BoardServer, runs: Path) -> None:
    (runs / "plain" / "state.json").write_text("{")
    (runs / "plain" / "metrics.jsonl").unlink()
    (runs / "plain" / "metrics.jsonl").mkdir()
    status, rows = get(server, "/rows")
    assert (status, rows.count("<tr>")) == (200, 2)
    assert "damaged" in rows
    assert get(server, "/run/plain")[0] == 500
    assert get(server, PLACE)[0] == 200


def test_a_folder_without_runs_waits_for_them(tmp_path: Path) -> None:
    board = Board(tmp_path)
    assert "No run yet" in board.index(1.0)
    make_run(tmp_path / "first")
    assert "first" in board.table()
    (tmp_path / "first").rename(tmp_path / "second")
    with pytest.raises(KeyError):
        board.run("first", 1.0)
    assert "second" in board.run("second", 1.0)
    assert Board(tmp_path / "second").run("", 1.0)
    with pytest.raises(UserError, match="none does not exist: give a run directory"):
        Board(tmp_path / "none")


@pytest.mark.parametrize(
    "path",
    [
        "/run/../../etc/passwd",
        "/run/%2e%2e/secret",
        "/run//etc",
        "/version/..",
        "/plain/config.yaml",
        "/favicon.ico",
    ],
)
def test_nothing_but_runs_is_served(server: BoardServer, runs: Path, path: str) -> None:
    make_run(runs.parent / "secret")
    assert get(server, path) == (404, "no run is there (any more)")


def test_it_only_reads_and_answers_to_its_own_name(server: BoardServer, runs: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in runs.rglob("*"))
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert get(server, "/", method)[0] == 501
    assert get(server, "/", Host="evil.example:80")[0] == 403
    assert get(server, "/", Host=f"localhost:{server.server_address[1]}")[0] == 200
    get(server, "/run/plain")
    assert sorted((path, path.stat().st_mtime_ns) for path in runs.rglob("*")) == before
    with pytest.raises(UserError, match="cannot listen at 127.0.0.1"):
        BoardServer(Board(runs), "127.0.0.1", server.server_address[1], 1.0)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the board in")
@pytest.mark.parametrize("path", ["/", "/run/plain"])
def test_an_open_page_follows(server: BoardServer, runs: Path, tmp_path: Path, path: str) -> None:
    """In a real browser: loaded at step 3, it shows step 64 without being loaded again."""
    served, loads = threading.Event(), []
    shown = server.board.index if path == "/" else server.board.run

    def counted(*arguments: object) -> str:
        loads.append(arguments)
        text = shown(*arguments)  # type: ignore[arg-type]
        served.set()
        return text

    setattr(server.board, shown.__name__, counted)
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=30000", "--dump-dom", server.address.rstrip("/") + path,
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=ENVIRONMENT
    ) as browser:
        assert served.wait(60)
        take_step(runs / "plain", 64)
        page, _ = browser.communicate(timeout=120)
    assert "64/100" in page if path == "/" else "at step 64" in page
    assert len(loads) == (1 if path == "/" else 2)  # a report is fetched once more, when it has changed

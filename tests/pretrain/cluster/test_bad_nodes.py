"""Nodes at fault: which of them a start leaves out that follows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from parallel.launch.exit_codes import ExitCode
from pretrain.cluster.decision import decide
from pretrain.cluster.supervise import carry_out
from pretrain.rundir.state import read_failures, read_state, record_failure, write_state
from tests.pretrain.cluster.starts import OWNER, RUNNING


@pytest.mark.parametrize(
    ("named", "excluded"),
    [
        (("node2", "node2"), ("node2",)),
        (("node2", "node1"), ()),
        (("node2", None), ()),
        ((None, None), ()),
    ],
)
def test_a_hung_node_is_left_out_where_all_name_it(
    run: Path, named: tuple[str | None, ...], excluded: tuple[str, ...]
) -> None:
    for rank, host in enumerate(named):
        record_failure(run, rank, ExitCode.HUNG, "step 3 did not end", OWNER, at_fault=host)
    record_failure(run, 2, ExitCode.CRASH, "Connection closed by peer", OWNER)  # a victim names nobody
    decision = decide(run, 137, RUNNING, OWNER)
    assert (decision.requeue, decision.exclude) == (True, excluded)


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scontrol that writes down its calls, and refuses what is in the file `refused`."""
    folder = tmp_path / "commands"
    folder.mkdir()
    (folder / "refused").write_text("nothing\n")
    command = folder / "scontrol"
    command.write_text(
        f'#!/bin/sh\necho "$@" >>{folder}/calls\n'
        f'if grep -qx "$1" {folder}/refused; then echo "no $1" >&2; exit 1; fi\n'
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.mark.parametrize("refused", ["nothing", "update"])
def test_bad_nodes_are_left_out(run: Path, scontrol: Path, refused: str) -> None:
    (scontrol / "refused").write_text(f"{refused}\n")
    write_state(run, OWNER, excluded=["node9"])
    record_failure(run, 3, ExitCode.BAD_NODE, "GPU 1 computes wrong products", OWNER)
    failure = read_failures(run, OWNER)[0]
    decision = decide(run, 79, RUNNING, OWNER)
    assert decision.exclude == (failure.host,)
    assert carry_out(run, OWNER, decision, exclude_bad_nodes=True) == 0
    excluded = ",".join(sorted(["node9", failure.host]))
    assert (scontrol / "calls").read_text().splitlines() == [
        "requeuehold 12",
        f"update JobId=12 ExcNodeList={excluded}",
        "release 12",
    ]
    assert (read_state(run)["state"], read_state(run)["excluded"]) == (
        "requeued",
        sorted(["node9", failure.host]),
    )


def test_bad_nodes_stay_where_the_site_says_nothing(run: Path, scontrol: Path) -> None:
    record_failure(run, 3, ExitCode.BAD_NODE, "GPU 1 computes wrong products", OWNER)
    carry_out(run, OWNER, decide(run, 79, RUNNING, OWNER))
    assert (scontrol / "calls").read_text().splitlines() == ["requeue 12"]
    assert "excluded" not in read_state(run)

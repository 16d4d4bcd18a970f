"""Plain values between ranks, and one rank's trouble told to all."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from model.errors import UserError
from parallel import exchange
from parallel.checkpoint.errors import SaveError
from parallel.checkpoint.format import FileFacts
from parallel.exchange import agree, gather, gather_bytes, gather_records, together, told_as_it_is
from tests.distributed import Group, launch

TROUBLE = (
    UserError("a\n mistake"),
    SaveError("full"),
    KeyError("k"),
    OSError(5, "Input/output error"),
    None,
)


def said(action: Any) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def leave_together(rank: int) -> None:
    with together():
        if rank == 1:
            raise KeyError("k")


def on_a_rank() -> dict[str, Any]:
    """Runs inside three ranks."""
    rank = dist.get_rank()
    told_as_it_is(SaveError)
    found: dict[str, Any] = {
        "values": gather({"rank": rank, "text": "ä" * rank, "none": None}),
        "records": [record.bytes for record in gather_records(FileFacts(bytes=rank, xxh3_64=""))],
        "blocks": list(gather_bytes(b"\x00\xff" * rank)),
        "empty": list(gather_bytes(b"")),
        # Every rank but the last one is well.
        "trouble": [
            said(lambda problem=problem: agree(problem if rank == 2 else None)) for problem in TROUBLE
        ],  # type: ignore[misc]
        "first": said(lambda: agree(UserError(f"rank {rank}") if rank else None)),
        "together": said(lambda: leave_together(rank)),
    }
    exchange.LARGEST = 10
    return found | {"long": said(lambda: gather("x" * (20 if rank == 1 else 1)))}


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return launch(Group(3, on_a_rank))[0]


def test_values_arrive_as_they_were(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert one["values"] == [{"rank": rank, "text": "ä" * rank, "none": None} for rank in range(3)]
        assert one["records"] == [0, 1, 2]
        assert one["blocks"] == [b"\x00\xff", b"\x00\xff\x00\xff"]
        assert one["empty"] == []


def test_trouble_on_one_rank_is_raised_on_all(found: list[dict[str, Any]]) -> None:
    ours = [
        "UserError: a\n mistake",
        "SaveError: full",
        "KeyError: 'k'",
        "OSError: [Errno 5] Input/output error",
        "",
    ]
    theirs = [
        "UserError: a mistake",
        "SaveError: full",
        "PeerError: rank 2: KeyError: 'k'",
        "PeerError: rank 2: OSError: [Errno 5] Input/output error",
        "",
    ]
    assert [one["trouble"] for one in found] == [theirs, theirs, ours]
    assert [one["first"] for one in found] == ["UserError: rank 1"] * 3
    assert [one["together"] for one in found] == [
        "PeerError: rank 1: KeyError: 'k'",
        "KeyError: 'k'",
        "PeerError: rank 1: KeyError: 'k'",
    ]


def test_what_is_too_long_is_refused_everywhere(found: list[dict[str, Any]]) -> None:
    assert {one["long"] for one in found} == {
        "ValueError: rank 1 sends 22 bytes; 10 is the most that ranks exchange at once"
    }

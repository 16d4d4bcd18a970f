"""`fathom chat` at a pipe and at a terminal."""

from __future__ import annotations

import os
import pty
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model.hf import reference
from tools.cli import main

GREEDY = ("--temperature", "0", "--max-new-tokens", "6")


def fathom(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    return int(left.value.code or 0)


def piped(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    """Puts a text into a pipe that is standard input."""
    reading, writing = os.pipe()
    os.write(writing, text)
    os.close(writing)
    monkeypatch.setattr(sys, "stdin", os.fdopen(reading, encoding="utf-8"))


@pytest.fixture
def answer(imported_gpt2: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """To `the norm`, as generate has it."""
    assert (
        fathom("generate", str(imported_gpt2 / "checkpoint"), "--prompt", "the norm", "--quiet", *GREEDY) == 0
    )
    return capsys.readouterr().out


def test_lines_of_a_pipe(
    imported_gpt2: Path, answer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers alone are printed; an export of the same weights answers alike."""
    for model in (imported_gpt2 / "checkpoint", imported_gpt2):
        piped(monkeypatch, b"the norm\n/reset\nthe norm\r\n\n/quit\nnot read\n")
        assert fathom("chat", str(model), *GREEDY) == 0
        told = capsys.readouterr()
        assert told.err == ""
        assert told.out.startswith(answer * 2)
        assert len(told.out) > 2 * len(answer), "the empty line goes on with the text"
    piped(monkeypatch, b"the norm\n\xff\n")
    assert fathom("chat", str(imported_gpt2), *GREEDY) == 2
    told = capsys.readouterr()
    assert told.out == answer
    assert told.err.startswith("fathom: error: standard input, line 2: no valid UTF-8")


def test_ctrl_c_stops_an_answer_and_no_more(
    imported_gpt2: Path, answer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen: list[int] = []
    pick = reference.pick

    def interrupted(*given: Any) -> int:
        chosen.append(pick(*given))
        if len(chosen) == 3:
            signal.raise_signal(signal.SIGINT)
        return chosen[-1]

    monkeypatch.setattr(reference, "pick", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        piped(monkeypatch, b"the norm\n/reset\nthe norm\n")
        assert fathom("chat", str(imported_gpt2 / "checkpoint"), *GREEDY) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    first, second = capsys.readouterr().out.splitlines(keepends=True)
    assert second == answer
    assert answer.startswith(first.rstrip("\n"))
    assert len(first) < len(answer)


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A terminal that is standard input; what is written to it is typed."""
    master, slave = pty.openpty()
    with os.fdopen(slave, encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        echoed = threading.Thread(target=_drained, args=(master,), daemon=True)
        echoed.start()
        yield master
    echoed.join(60)
    os.close(master)


def _drained(master: int) -> None:
    """Reads what a terminal shows until it is closed."""
    try:
        while os.read(master, 1000):
            pass
    except OSError:
        return


def test_a_terminal_is_told_what_to_type_and_ctrl_d_leaves(
    imported_gpt2: Path, answer: str, keys: int, capsys: pytest.CaptureFixture[str]
) -> None:
    os.write(keys, b"the norm\n/reset\nthe norm\n\x04")
    assert fathom("chat", str(imported_gpt2 / "checkpoint"), *GREEDY) == 0
    told = capsys.readouterr()
    assert told.out == f"> {answer}> > {answer}> \n"
    assert "ctrl-D leaves" in told.err
    assert told.err.count("\n") == 1

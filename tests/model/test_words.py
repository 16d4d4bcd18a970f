"""Spans of time, large numbers and foreign text."""

from __future__ import annotations

import pytest

from model.words import duration, printable, quantity


@pytest.mark.parametrize(
    ("seconds", "text", "brief"),
    [
        (0.4, "0 s", "0s"),
        (59.4, "59 s", "59s"),
        (59.6, "1 min 00 s", "1m00s"),
        (185, "3 min 05 s", "3m05s"),
        (3599, "59 min 59 s", "59m59s"),
        (7620, "2 h 07 min", "2h07m"),
        (86399, "23 h 59 min", "23h59m"),
        (273600, "3 d 04 h", "3d04h"),
    ],
)
def test_duration(seconds: float, text: str, brief: str) -> None:
    assert duration(seconds) == text
    assert duration(seconds, brief=True) == brief


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.0, "0"),
        (999.0, "999"),
        (1000.0, "1k"),
        (12_345.0, "12.3k"),
        (999_999.0, "1M"),
        (9.99e6, "9.99M"),
        (4.2e9, "4.2B"),
        (2.5e12, "2.5T"),
    ],
)
def test_quantity(number: float, text: str) -> None:
    assert quantity(number) == text


def test_terminal_escapes_are_shown_and_not_sent() -> None:
    shown = "a\\x1b]0;x\\x07\\x1b[2J\\nb\\u202e\u00e9"
    assert printable("a\x1b]0;x\x07\x1b[2J\nb\u202e\u00e9") == shown
    assert len(printable("x" * 1000)) == 200

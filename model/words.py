"""How spans of time, large numbers and foreign text are written for people."""

from __future__ import annotations

import json


def printable(text: object, limit: int = 200) -> str:
    """Foreign text as one line that a terminal shows and does not obey.

    Control characters, line ends and other separators but the blank become escapes such as `\\x1b`.
    limit: longer text is cut and ends with an ellipsis.
    """
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)[: limit + 1]
    )
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def written(value: object, limit: int = 200) -> str:
    """The value of a setting as it is typed. limit: as in `printable`."""
    return printable(value if isinstance(value, str) else json.dumps(value, default=list), limit)


def duration(seconds: float, brief: bool = False) -> str:
    """A span of time in the two units that matter: 42 s, 3 min 05 s, 2 h 07 min, 3 d 04 h.

    brief: for narrow columns: 42s, 3m05s, 2h07m, 3d04h.
    """
    whole = round(max(0.0, seconds))
    parts: tuple[tuple[int, str], ...]
    if whole < 60:
        parts = ((whole, "s"),)
    elif whole < 3600:
        parts = ((whole // 60, "min"), (whole % 60, "s"))
    elif whole < 86400:
        parts = ((whole // 3600, "h"), (whole % 3600 // 60, "min"))
    else:
        parts = ((whole // 86400, "d"), (whole % 86400 // 3600, "h"))
    texts = [str(parts[0][0]), *(f"{number:02}" for number, _ in parts[1:])]
    if brief:
        return "".join(text + unit[0] for text, (_, unit) in zip(texts, parts, strict=True))
    return " ".join(f"{text} {unit}" for text, (_, unit) in zip(texts, parts, strict=True))


def quantity(number: float) -> str:
    """Three digits with k, M, B or T: 950, 12.3k, 1.25M, 2.5B."""
    for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * factor:
            return f"{number / factor:.3g}{letter}"
    return f"{number:.3g}"

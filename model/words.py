"""Text from outside, made fit for a terminal."""

from __future__ import annotations


def printable(text: object, limit: int = 200) -> str:
    """Foreign text as one line that a terminal shows and does not obey.

    Control characters, line ends and other separators but the blank become escapes such as `\\x1b`.
    limit: longer text is cut and ends with an ellipsis.
    """
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)[: limit + 1]
    )
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"

"""Which layers stand for all of them."""

from __future__ import annotations


def spread(total: int, count: int) -> list[int]:
    """At most `count` numbers from 1 to `total`, evenly spread, with both ends."""
    if total <= count:
        return list(range(1, total + 1))
    return sorted({round(1 + index * (total - 1) / (count - 1)) for index in range(count)})

"""Every action has its turn in every round, and the order turns about."""

from __future__ import annotations

from benchmarks.turns import ratio_table, spread, turns


def test_order_turns_about_and_the_first_round_does_not_count() -> None:
    seen: list[str] = []
    seconds = turns({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 3)
    assert "".join(seen) == "ba" + "ab" + "ba" + "ab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert all(value >= 0 for values in seconds.values() for value in values)


def test_spread_and_table() -> None:
    row = spread([1.0, 2.0, 3.0, 4.0, 5.0])
    assert row["median"] == 3.0
    assert row["low"] < 3.0 < row["high"]
    assert ratio_table("title", "ratio", {"one": row}).row_count == 1

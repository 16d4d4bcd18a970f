"""Measures every layout and writes the table of docs/parallelism.md: python -m tests.parallel.write_table"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from tests.parallel.layouts import CASES, Row, measure

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "parallelism.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
HEADER = "| layout and model | processes | loss | gradient norm | parameters | bit-identical |\n|---|---|---|---|---|---|"
LINE = re.compile(r"^\| (.+?) \| (\d+) \|", re.MULTILINE)


def table(rows: Iterable[Row]) -> str:
    """The table in Markdown."""
    lines = [f"| {row.name} | {row.world} | {row.loss:.1e} | {row.norm:.1e} | {row.parameters:.1e} | {'yes' if row.identical else 'no'} |" for row in rows]
    return "\n".join([HEADER, *lines])


def rows_in(text: str) -> list[tuple[str, int]]:
    """Names and processes of the rows in the document."""
    return [(name, int(world)) for name, world in LINE.findall(_parts(text)[1])]


def _parts(text: str) -> tuple[str, str, str]:
    before, _, rest = text.partition(BEGIN)
    inside, _, after = rest.partition(END)
    return before, inside, after


def main() -> None:
    """Trains everything, minutes on a small machine, and replaces the table."""
    begin = time.monotonic()
    rows = measure(tuple(CASES), timeout=3600)
    before, _, after = _parts(DOCUMENT.read_text())
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table(rows.values())}\n{END}{after}")
    print(f"{DOCUMENT}: {len(rows)} rows in {time.monotonic() - begin:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()

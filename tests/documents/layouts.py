"""Measures every layout and writes the table and the refusals of docs/parallelism.md.

python -m tests.documents.layouts            everything
python -m tests.documents.layouts new        rows that the document lacks; the others stay
python -m tests.documents.layouts refusals   no row is measured
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from tests.parallel.layouts import CASES, Row, measure
from tests.parallel.refusals import REFUSALS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "parallelism.md"
TABLE, LIST = (
    ("<!-- table: begin -->", "<!-- table: end -->"),
    ("<!-- refusals: begin -->", "<!-- refusals: end -->"),
)
HEADER = (
    "| layout and model | processes | loss | gradient norm | parameters | bit-identical |\n"
    "|---|---|---|---|---|---|"
)
LINE = re.compile(r"^\| (.+?) \| (\d+) \|", re.MULTILINE)


def table_line(row: Row) -> str:
    """One row in Markdown."""
    return (
        f"| {row.name} | {row.world} | {row.loss:.1e} | {row.norm:.1e} | {row.parameters:.1e} "
        f"| {'yes' if row.identical else 'no'} |"
    )


def rows_in(text: str) -> list[tuple[str, int]]:
    """Names and processes of the rows in the document."""
    return [(name, int(world)) for name, world in LINE.findall(_parts(text, TABLE)[1])]


def refusal_list() -> str:
    """What is refused, with the lines that users read, in Markdown."""
    return "\n".join(f"* {refusal.what}: `{refusal.line()}`" for refusal in REFUSALS)


def refusals_in(text: str) -> str:
    """The list in the document."""
    return _parts(text, LIST)[1].strip()


def _parts(text: str, marks: tuple[str, str]) -> tuple[str, str, str]:
    before, _, rest = text.partition(marks[0])
    inside, _, after = rest.partition(marks[1])
    return before, inside, after


def _write(marks: tuple[str, str], inside: str) -> None:
    before, _, after = _parts(DOCUMENT.read_text(), marks)
    DOCUMENT.write_text(f"{before}{marks[0]}\n{inside}\n{marks[1]}{after}")


def _measured(known: Iterable[str]) -> dict[str, str]:
    """Lines by name of all cases but the known ones."""
    known = set(known)
    cases = [case for some in CASES.values() for case in some if case.name not in known]
    return {name: table_line(row) for name, row in measure(cases, timeout=7200).items()} if cases else {}


def main(what: str = "all") -> None:
    """Writes the refusals, and trains what is asked for, minutes on a small machine."""
    begin = time.monotonic()
    _write(LIST, refusal_list())
    if what == "refusals":
        return
    inside = _parts(DOCUMENT.read_text(), TABLE)[1]
    lines = (
        {match[1]: line for line in inside.splitlines() if (match := LINE.match(line))}
        if what == "new"
        else {}
    )
    names = [case.name for cases in CASES.values() for case in cases]
    measured = _measured([name for name in names if name in lines])
    _write(TABLE, "\n".join([HEADER, *[(lines | measured)[name] for name in names]]))
    print(f"{DOCUMENT}: {len(measured)} rows in {time.monotonic() - begin:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])

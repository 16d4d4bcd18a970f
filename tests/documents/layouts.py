"""Measures every layout and writes their tables and the refusals into docs/measured/.

python -m tests.documents.layouts            everything
python -m tests.documents.layouts table      decoders' layouts, or those of another table:
                                             `context` cuts sequences, `crossed` has two stacks
python -m tests.documents.layouts new        rows that the document lacks; the others stay
python -m tests.documents.layouts refusals   no row is measured
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from tests.parallel.context_layouts import CONTEXT
from tests.parallel.crossed_layouts import CROSSED
from tests.parallel.layouts import CASES, Case, Row, measure
from tests.parallel.refusals import REFUSALS

MEASURED = Path(__file__).resolve().parents[2] / "docs" / "measured"
DOCUMENT, REFUSED = MEASURED / "layouts.md", MEASURED / "refusals.md"
TABLES = {
    "table": [case for cases in CASES.values() for case in cases],
    "context": [case for cases in CONTEXT.values() for case in cases],
    "crossed": [case for cases in CROSSED.values() for case in cases],
}
"""The tables by their marks in the document."""
LIST = "refusals"
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


def rows_in(text: str, table: str) -> list[tuple[str, int]]:
    """Names and processes of the rows of a table in the document."""
    return [(name, int(world)) for name, world in LINE.findall(_parts(text, table)[1])]


def refusal_list() -> str:
    """What is refused, with the lines that users read, in Markdown."""
    return "\n".join(f"* {refusal.what}: `{refusal.line()}`" for refusal in REFUSALS)


def refusals_in(text: str) -> str:
    """The list in the document."""
    return _parts(text, LIST)[1].strip()


def _parts(text: str, mark: str) -> tuple[str, str, str]:
    before, _, rest = text.partition(f"<!-- {mark}: begin -->")
    inside, _, after = rest.partition(f"<!-- {mark}: end -->")
    return before, inside, after


def _write(document: Path, mark: str, inside: str) -> None:
    before, _, after = _parts(document.read_text(), mark)
    document.write_text(f"{before}<!-- {mark}: begin -->\n{inside}\n<!-- {mark}: end -->{after}")


def _measured(table: Iterable[Case], known: Iterable[str]) -> dict[str, str]:
    """Lines by name of all cases of a table but the known ones."""
    known = set(known)
    cases = [case for case in table if case.name not in known]
    return {name: table_line(row) for name, row in measure(cases, timeout=7200).items()} if cases else {}


def main(what: str = "all") -> None:
    """Writes the refusals, and trains what is asked for, minutes on a small machine."""
    if what not in ("all", "new", LIST, *TABLES):
        sys.exit(f"{what}: choose one of all, new, {LIST}, {', '.join(TABLES)}")
    begin = time.monotonic()
    _write(REFUSED, LIST, refusal_list())
    for mark, cases in TABLES.items():
        if what not in ("all", "new", mark):
            continue
        inside = _parts(DOCUMENT.read_text(), mark)[1] if what == "new" else ""
        lines = {match[1]: line for line in inside.splitlines() if (match := LINE.match(line))}
        measured = _measured(cases, lines)
        _write(DOCUMENT, mark, "\n".join([HEADER, *[(lines | measured)[case.name] for case in cases]]))
        print(f"{DOCUMENT}: {len(measured)} rows in {time.monotonic() - begin:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Writes the table of published against predicted runs into docs/performance.md.

python -m tests.documents.published
"""

from __future__ import annotations

import re
import statistics
from pathlib import Path

from model.files import atomic_write_text
from pretrain.plan.published import errors, table

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "performance.md"


def main() -> None:
    """Write the table and print how far off it is."""
    block = f"<!-- published: begin -->\n{table()}\n<!-- published: end -->"
    atomic_write_text(
        DOCUMENT,
        re.sub(
            r"<!-- published: begin -->.*<!-- published: end -->",
            lambda _: block,
            DOCUMENT.read_text(encoding="utf-8"),
            flags=re.S,
        ),
    )
    found = [abs(error) for error in errors()]
    print(f"median error {statistics.median(found):.1%}, largest {max(found):.1%}")


if __name__ == "__main__":
    main()

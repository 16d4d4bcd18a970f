"""A self-contained HTML page of sections with charts and tables, in the look of the run report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from pretrain.report.run_charts import Chart

TEMPLATE = Path(__file__).with_name("templates") / "page.html"


@dataclass(frozen=True)
class Table:
    """Rows of text under column heads. strong: numbers of the rows (from 0) that are set in bold."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Section:
    """One heading with paragraphs, then charts, tables and preformatted text. folded: the tables are shown on demand, under this line."""

    title: str
    text: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    preformatted: str = ""
    folded: str = ""


@dataclass(frozen=True)
class Page:
    """title; status: (good, open or bad, words) beside the mark; lead: one paragraph; facts: (name, value) pairs."""

    title: str
    kind: str
    status: tuple[str, str]
    lead: str = ""
    facts: Sequence[tuple[str, str]] = ()
    sections: Sequence[Section] = field(default_factory=tuple)


def render_page(page: Page) -> str:
    """The page as HTML, with every picture inside. All texts are escaped."""
    from jinja2 import Environment, StrictUndefined

    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(page=page, written=datetime.now(timezone.utc).strftime("%-d %B %Y, %H:%M UTC"))

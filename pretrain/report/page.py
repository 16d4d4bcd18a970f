"""A self-contained HTML page of sections with charts and tables, in the look of the run report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.report.run_charts import Chart

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATES = Path(__file__).with_name("templates")
LONG = 30
"""Characters from which on a cell is prose, whose column may be broken into lines; others never are."""


@dataclass(frozen=True)
class Table:
    """Rows of text under column heads."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: frozenset[int] = frozenset()
    """Numbers of the rows, from 0, that are set in bold."""

    @property
    def long(self) -> frozenset[int]:
        """Numbers of the columns, from 0, that hold prose."""
        return frozenset(index for row in self.rows for index, cell in enumerate(row) if len(cell) >= LONG)


@dataclass(frozen=True)
class Section:
    """One heading with paragraphs, then charts, tables and preformatted text."""

    title: str
    text: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    preformatted: str = ""
    folded: str = ""
    """The tables are shown on demand, under this line."""


@dataclass(frozen=True)
class Page:
    """A page from its title to its sections."""

    title: str
    kind: str
    status: tuple[str, str]
    """(good, open or bad; words beside the mark)."""
    lead: str = ""
    """One paragraph."""
    facts: Sequence[tuple[str, str]] = ()
    """(name, value) pairs."""
    sections: Sequence[Section] = field(default_factory=tuple)


def template(name: str) -> Template:
    """A page of `templates/`, all of which share `base.html`. What is filled in is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def render_page(page: Page) -> str:
    """The page as HTML, with every picture inside."""
    written = datetime.now(timezone.utc).strftime("%-d %B %Y, %H:%M UTC")
    return template("page.html").render(page=page, written=written)

"""Draws the house from the real imports and writes the tables of docs/architecture.md.

python -m tests.documents.architecture
"""

from __future__ import annotations

import ast
import html
import re
import textwrap
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from model.files import atomic_write_text

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "architecture.md"
PICTURE = ROOT / "docs" / "images" / "architecture.svg"
PACKAGES = ("tools", "pretrain", "parallel", "model")
BEGIN, END = "<!-- rooms: begin -->", "<!-- rooms: end -->"
WIDTH, BOX, GAP, LINE = 1180, 62, 12, 15


@dataclass
class Room:
    """A sub-package, or a file at the root of a package."""

    package: str
    name: str
    """Inside the package; of a file with its ending."""
    question: str
    """The first paragraph of its docstring."""
    files: int
    uses: set[str] = field(default_factory=set)
    """Names of rooms of the same package that it imports from."""

    @property
    def shown(self) -> str:
        """As readers see it in the tree."""
        return f"{self.package}/{self.name}"


def rooms(package: str) -> dict[str, Room]:
    """Rooms of a package by name, with what they import from each other."""
    found: dict[str, Room] = {}
    files = [path for path in sorted((ROOT / package).rglob("*.py")) if path.name != "__init__.py"]
    for path in files:
        name = _room(package, path.relative_to(ROOT / package).parts)
        if name not in found:
            home = ROOT / package / name
            found[name] = Room(package, name, _question(home if home.is_file() else home / "__init__.py"), 0)
        found[name].files += 1
        for module in _imports(path):
            parts = module.split(".")
            if parts[0] == package:
                other = _room(package, (*parts[1:-1], f"{parts[-1]}.py"))
                if other != name:
                    found[name].uses.add(other)
    return found


def _room(package: str, parts: tuple[str, ...]) -> str:
    if package == "tools" and len(parts) == 1:
        return "*.py"
    folder = parts[0].removesuffix(".py")
    return folder if (ROOT / package / folder).is_dir() else parts[0]


def _question(path: Path) -> str:
    if path.parent.name == "*.py":
        path = path.parent.with_name("__init__.py")
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n", maxsplit=1)[0].split())


def _imports(path: Path) -> set[str]:
    """Modules of Fathom that a file imports.

    Type-only imports and those inside functions are included.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if _is_module(name) else node.module for name in inner]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name for name in names if name.split(".")[0] in PACKAGES and "." in name}
    return found


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def floors(found: dict[str, Room]) -> list[list[Room]]:
    """Rooms from the ground up: each stands above all that it uses.

    Raises ValueError where they form a circle.
    """
    level: dict[str, int] = {}
    while len(level) < len(found):
        ready = [
            room for room in found.values() if room.name not in level and room.uses & set(found) <= set(level)
        ]
        if not ready:
            raise ValueError(f"rooms import each other in a circle: {sorted(set(found) - set(level))}")
        for room in ready:
            level[room.name] = 1 + max((level[name] for name in room.uses if name in level), default=-1)
    rows: dict[int, list[Room]] = defaultdict(list)
    for name, height in level.items():
        rows[height].append(found[name])
    return [rows[height] for height in sorted(rows)]


def table(found: dict[str, Room]) -> str:
    """The rooms of a package in Markdown, from the top floor down."""
    lines = ["| room | files | its question | uses |", "|---|---|---|---|"]
    for floor in reversed(floors(found)):
        for room in floor:
            uses = ", ".join(f"`{name}`" for name in sorted(room.uses))
            lines.append(f"| `{room.shown}` | {room.files} | {room.question} | {uses} |")
    return "\n".join(lines)


def picture() -> str:
    """The house as SVG: a storey for each package, a floor for each step of imports."""
    parts, top = [], 10
    for package in PACKAGES:
        rows = list(reversed(floors(rooms(package))))
        height = 34 + len(rows) * (BOX + GAP)
        parts.append(f'<rect class="storey" x="5" y="{top}" width="{WIDTH - 10}" height="{height}" rx="8"/>')
        parts.append(f'<text class="package" x="20" y="{top + 24}">{package}/</text>')
        for number, row in enumerate(rows):
            width = (WIDTH - 30 - GAP * (len(row) - 1)) / len(row)
            for place, room in enumerate(row):
                corner = (15 + place * (width + GAP), top + 34 + number * (BOX + GAP))
                parts += _box(room, corner, width)
        top += height + 12
    style = (
        "text{font-family:system-ui,sans-serif;fill:#22262b}.package{font-size:18px;font-weight:700}"
        ".storey{fill:#f7f8f9;stroke:#e1e4e8}.room{fill:#fff;stroke:#0072b2}"
        ".name{font-size:14px;font-weight:600}.question{font-size:12px;fill:#5c636d}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" role="img">\n'
        f"<title>Rooms of Fathom: each imports from floors below it only</title>\n<style>{style}</style>\n"
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _box(room: Room, corner: tuple[float, float], width: float) -> list[str]:
    x, y = corner
    lines = textwrap.wrap(room.question, max(12, int(width / 7.0)))[:2]
    texts = [
        f'<text class="question" x="{x + 10:.0f}" y="{y + 38 + LINE * number:.0f}">{html.escape(line)}</text>'
        for number, line in enumerate(lines)
    ]
    return [
        f'<rect class="room" x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{BOX}" rx="5"/>',
        f'<text class="name" x="{x + 10:.0f}" y="{y + 20:.0f}">{room.name}</text>',
        *texts,
    ]


def block() -> str:
    """All tables, as they stand in the document."""
    return "\n\n".join(f"### {package}\n\n{table(rooms(package))}" for package in PACKAGES)


def documented() -> str:
    """The tables that the document has now."""
    text = DOCUMENT.read_text(encoding="utf-8")
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    """Write tables and picture."""
    text = DOCUMENT.read_text(encoding="utf-8")
    fresh = f"{BEGIN}\n{block()}\n{END}"
    atomic_write_text(DOCUMENT, re.sub(f"{BEGIN}.*{END}", lambda _: fresh, text, flags=re.S))
    atomic_write_text(PICTURE, picture())
    print(f"wrote {DOCUMENT.relative_to(ROOT)} and {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

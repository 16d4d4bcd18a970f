"""The documentation holds together: navigation, links, commands, and pages made from code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from parallel.topology import check_layout
from pretrain.config.load import load_config
from tests.documents import reference
from tools import cli

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
OUTSIDE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "configs/README.md")]
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!\\)\]\(([^)\s]+)\)")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def settings() -> dict[str, Any]:
    """mkdocs.yml, whose tags for Python objects are not read."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    return found


def in_navigation(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        else:
            for inner in entry.values():
                yield from in_navigation([inner] if isinstance(inner, str) else inner)


def test_every_page_stands_in_the_navigation_once() -> None:
    listed = list(in_navigation(settings()["nav"]))
    assert sorted(listed) == [str(page.relative_to(DOCS)) for page in PAGES]


def anchors(page: Path) -> set[str]:
    """Of its headings, as mkdocs and code forges make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#{1,6} (.+?)\s*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        slug = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip())
        names.add(f"{slug}_{found[slug]}" if slug in found else slug)
        found[slug] = found.get(slug, 0) + 1
    return names


@pytest.mark.parametrize("page", [*PAGES, *OUTSIDE], ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    """And pages of the site link to nothing outside of it."""
    wrong = []
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"https?://|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        goal = (page.parent / file).resolve() if file else page
        there = goal.exists() and (page not in PAGES or DOCS in goal.parents)
        if not there or (anchor and anchor not in anchors(goal)):
            wrong.append(target)
    assert not wrong


# ---- commands


def lines_of(page: Path) -> Iterator[str]:
    """Commands of fathom in blocks of code, lines that go on put together."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    fenced = [block for block in FENCE.findall(text) if "\n" in block]
    indented = re.findall(r"^ {4,}\S.*$", FENCE.sub("", text), re.MULTILINE)
    inside = [line for block in fenced for line in block.splitlines()[1:-1]]
    for line in [*inside, *indented]:
        if (match := re.match(r"\s*(fathom [a-z].*)", line)) and "COMMAND" not in line:
            yield match[1]


def unknown(line: str) -> str:
    """The word of a command line that no command knows, or nothing."""
    words = shlex.split(re.split(r" \|\|? | > | && |;", line)[0], comments=True)[1:]
    rows = {row.name: row for row in cli.COMMANDS}
    if words[0] not in rows:
        return words[0]
    command: Any = cli.load_command(rows[words.pop(0)])
    while hasattr(command, "commands") and words:
        if words[0] not in command.commands:
            return words[0]
        command = command.commands[words.pop(0)]
    known = {word for one in command.params for word in (*one.opts, *one.secondary_opts)} | {"--help"}
    options = [word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)]
    return next((option for option in options if option not in known), "")


@pytest.mark.parametrize("page", [page for page in [*PAGES, *OUTSIDE] if any(lines_of(page))], ids=name)
def test_commands_in_the_documents_exist(page: Path) -> None:
    assert not {line: word for line in lines_of(page) if (word := unknown(line))}


def test_an_unknown_command_or_option_is_found() -> None:
    assert unknown("fathom pretrian x.yaml") == "pretrian"
    assert unknown("fathom data prepair x") == "prepair"
    assert unknown("fathom status runs --wach 3 | head") == "--wach"
    assert not unknown("fathom submit c.yaml name=run7 --nodes 4 --dry-run  # looks only")


def run_of(line: str) -> tuple[Path, list[str]] | None:
    """A shipped configuration that a command names, and the settings after it. None without."""
    words = shlex.split(line, comments=True)
    files = [word for word in words[2:] if word.startswith("configs/") and (ROOT / word).is_file()]
    if not files or re.search(r"\$|SCHEME", line):  # a loop of the shell, a placeholder
        return None
    return ROOT / files[0], [word for word in words[2:] if re.match(r"\+?[a-z_.]+=", word)]


RUNS = {line: found for page in [*PAGES, *OUTSIDE] for line in lines_of(page) if (found := run_of(line))}


@pytest.mark.parametrize("line", RUNS)
def test_settings_in_the_documents_are_accepted(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On as many GPUs as their layout needs."""
    monkeypatch.chdir(ROOT)
    file, settings = RUNS[line]
    config = load_config(file, settings)
    check_layout(config.parallel, config.model, None)


# ---- pages made from code


@pytest.mark.parametrize("page", reference.PAGES)
def test_the_reference_is_that_of_the_code(page: str) -> None:
    assert (reference.FOLDER / page).read_text(encoding="utf-8") == reference.PAGES[page](), (
        "write it anew: python -m tests.documents.reference"
    )

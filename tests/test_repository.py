"""Habits of the repository that tools do not check.

Sizes of files and functions, scheme logic in one place, the files every checkout has.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from model import __version__
from model.depth.schemes import SCHEMES
from model.families.table import FAMILIES
from pretrain.tasks.table import TASKS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("model", "parallel", "pretrain", "tools")
FOLDERS = (*PACKAGES, "tests", "configs", "slurm", "benchmarks")
CODE = (".py", ".sh", ".yaml", ".yml", ".toml", ".cpp", ".html", ".sbatch")
MOST_LINES, MOST_FUNCTION_LINES = 500, 60


def sources(folders: tuple[str, ...], suffixes: tuple[str, ...] = (".py",)) -> list[Path]:
    return sorted(
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and "__pycache__" not in path.parts
    )


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def files_of(folder: str) -> list[Path]:
    return [path.relative_to(ROOT) for path in (ROOT / folder).glob("*.py")]


TABLES: dict[str, tuple[Collection[str], Collection[Path]]] = {
    "scheme": (SCHEMES, [Path("model/depth/schemes.py")]),
    "family": (FAMILIES, files_of("model/families")),
    "task": (TASKS, files_of("pretrain/tasks")),
}
"""Of what is chosen by name: the names, and the files that may ask for them."""


def mentions(node: ast.expr, names: Collection[str]) -> bool:
    """Whether a side of a comparison is one of the names, or a literal collection with one."""
    return any(
        isinstance(inner, ast.Constant) and inner.value in names
        for inner in ast.walk(node)
        if isinstance(getattr(inner, "value", None), str)
    )


def branches(tree: ast.AST, kind: str) -> list[int]:
    """Lines that compare something called `kind` with text, or anything with one of its names."""
    lines, names = [], TABLES[kind][0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            named = any(
                (isinstance(side, ast.Name) and side.id == kind)
                or (isinstance(side, ast.Attribute) and side.attr == kind)
                for side in sides
            )
            text = any(isinstance(side, ast.Constant) and isinstance(side.value, str) for side in sides)
            if (named and text) or any(mentions(side, names) for side in sides):
                lines.append(node.lineno)
        if isinstance(node, ast.MatchValue) and mentions(node.value, names):
            lines.append(node.lineno)
    return lines


def test_no_file_is_too_long() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in sources(FOLDERS, CODE)
        if (lines := path.read_text(encoding="utf-8").count("\n")) > MOST_LINES
    }
    assert not long


def test_no_function_is_too_long() -> None:
    # Of the body alone: commands declare their options in the signature, some lines for each.
    long = {
        f"{path.relative_to(ROOT)}:{node.name}": lines
        for path in sources(FOLDERS)
        for node in functions(path)
        if (lines := (node.end_lineno or node.lineno) - node.body[0].lineno + 1) > MOST_FUNCTION_LINES
    }
    assert not long


@pytest.mark.parametrize("kind", TABLES)
def test_what_is_chosen_by_name_is_data(kind: str) -> None:
    found = {
        str(path.relative_to(ROOT)): lines
        for path in sources((*PACKAGES, "benchmarks"))
        if path.relative_to(ROOT) not in TABLES[kind][1]
        and (lines := branches(ast.parse(path.read_text(encoding="utf-8")), kind))
    }
    assert not found


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("if config.scheme == 'b2t': pass", True),
        ("x = scheme != 'other'", True),
        ("x = name in ('pre_ln', 'post_ln')", True),
        ("match name:\n    case 'b2t': pass", True),
        ("x = base == 'deepscale'", False),
        ("x = scheme.base == 'normal'", False),
        ("x = SCHEMES[config.scheme].final_norm", False),
    ],
)
def test_the_search_for_branches_finds_branches(code: str, found: bool) -> None:
    assert bool(branches(ast.parse(code), "scheme")) is found


def test_ranks_exchange_no_objects() -> None:
    """What PyTorch calls an object is pickled, and to read one is to execute what its sender likes.

    `parallel/exchange.py` has what ranks need.
    """
    pickled = re.compile(
        r"\b(?:\w+_object(?:_list)?\(|(?:import|from) (?:c?pickle|marshal|dill)\b|torch\.load\()"
    )
    found = {
        str(path.relative_to(ROOT)): words
        for path in sources(PACKAGES)
        if (words := pickled.findall(path.read_text(encoding="utf-8")))
    }
    assert not found


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "Makefile",
        "constraints.txt",
        "pyproject.toml",
        ".pre-commit-config.yaml",
        ".ci/run",
    ],
)
def test_a_checkout_has_its_files(name: str) -> None:
    assert (ROOT / name).stat().st_size > 0


def test_the_license_is_what_the_package_says() -> None:
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_changelog_has_the_version() -> None:
    """What was released last stands below what was not released yet."""
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert next(heading for heading in headings if heading != "Unreleased").split()[0] == __version__
    assert "Unreleased" not in headings[1:]


def test_constraints_are_plain_pins() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        requirement = line.partition("#")[0].strip()
        if requirement:
            assert requirement.partition(";")[0].count("==") == 1, line
            assert not any(mark in requirement for mark in ("+", "@", "://", "--")), line


def test_the_ci_script_can_be_run() -> None:
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111

"""docs/architecture.md shows the imports that there are, and names files that exist."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest

from tests.documents import architecture


def test_tables_and_picture_are_those_of_the_code() -> None:
    how = "write them anew: python -m tests.documents.architecture"
    assert architecture.documented() == architecture.block(), how
    assert architecture.PICTURE.read_text(encoding="utf-8") == architecture.picture(), how


def test_a_circle_is_found() -> None:
    rooms = {
        name: architecture.Room("model", name, "", 1, {other}) for name, other in (("a", "b"), ("b", "a"))
    }
    with pytest.raises(ValueError, match="circle"):
        architecture.floors(rooms)


def test_every_file_that_the_guide_names_is_there() -> None:
    text = architecture.DOCUMENT.read_text(encoding="utf-8").partition(architecture.BEGIN)[0]
    named = re.findall(r"`((?:model|parallel|pretrain|tools|tests|configs|slurm|docs)/[\w./-]*)`", text)
    assert len(named) > 30
    assert not [name for name in named if not (architecture.ROOT / name).exists()]


def guide() -> list[list[str]]:
    """Rows of the table of changes: what to change, where, and what else."""
    text = architecture.DOCUMENT.read_text(encoding="utf-8").partition(architecture.BEGIN)[0]
    _, _, table = text.partition("\n| to change or add ")
    rows = itertools.takewhile(lambda line: line.startswith("|"), table.splitlines()[2:])
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def test_each_change_has_one_row() -> None:
    names = [row[0] for row in guide()]
    assert len(names) > 30
    assert [name for name, count in Counter(names).items() if count > 1] == []


def lost(row: list[str]) -> list[str]:
    """Files that a row names and that are not there. Bare names are beside another file of the row,
    or in a folder of it.
    """
    named = re.findall(r"`([\w./-]+(?:\.(?:py|md|html|yaml|toml|j2)|/))`", " ".join(row[1:]))
    places = [architecture.ROOT]
    for name in (*named, *named):  # a folder may be named after what is in it
        found = [place / name for place in places if (place / name).exists()]
        places += [path if path.is_dir() else path.parent for path in found]
    return [name for name in named if not any((place / name).exists() for place in places)]


def test_files_of_a_change_are_there() -> None:
    assert {row[0]: lost(row) for row in guide() if lost(row)} == {}
    assert lost(["", "`model/norms.py`", "`nowhere.py` beside it, `config.py`"]) == ["nowhere.py"]


def test_every_table_that_the_guide_names_is_in_the_file_it_names() -> None:
    text = architecture.DOCUMENT.read_text(encoding="utf-8").partition(architecture.BEGIN)[0]
    named = re.findall(r"`([\w/]+\.py)`: (?:one \w+ of )?`(\w+)`", text)
    assert len(named) >= 6
    for file, symbol in named:
        source = (architecture.ROOT / file).read_text()
        assert re.search(rf"^ *(def )?{symbol}\b", source, re.M), (file, symbol)

"""docs/architecture.md shows the imports that there are, and names files that exist."""

from __future__ import annotations

import re

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


def test_every_table_that_the_guide_names_is_in_the_file_it_names() -> None:
    text = architecture.DOCUMENT.read_text(encoding="utf-8").partition(architecture.BEGIN)[0]
    named = re.findall(r"`([\w/]+\.py)`: (?:one \w+ of )?`(\w+)`", text)
    assert len(named) >= 6
    for file, symbol in named:
        source = (architecture.ROOT / file).read_text()
        assert re.search(rf"^ *(def )?{symbol}\b", source, re.M), (file, symbol)

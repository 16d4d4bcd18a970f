"""Ways in which a file is damaged, on purpose or by a disk.

Also values that a JSON file from outside may hold.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from parallel.checkpoint.format import manifest_text

Damage = Callable[[Path, Random], str]
"""Damages a file and says how."""

DEEP = '{"a":' * 2000 + "1" + "}" * 2000
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    1.5,
    -1e308,
    10**7,
    10**30,
    float("nan"),
    float("inf"),
    "",
    "x",
    "9",
    "\x1b[2J\x1b]0;x\x07",
    "../../../../../../etc/passwd",
    "/etc/passwd",
    "a\0b",
    "\ud800",
    "n" * 5000,
    [],
    {},
    [None],
    [-1],
    {"a": None},
    [[]],
)
TEXTS = (
    b"",
    b"\n",
    b"null",
    b"[]",
    b"{}",
    b"5",
    b'"x"',
    b"{",
    b"\xff\xfe\x00",
    b"\0" * 100,
    b"a" * 1_000_000,
)
POINTERS = (
    b"step_99999999",
    b"../../../../etc",
    b"/etc",
    b"step_" + b"9" * 200,
    b"step_2",
    b"latest",
    b".",
    b"..",
)


def _write(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def empty(path: Path, random: Random) -> str:
    """As a crash of the machine leaves a file that was never synced."""
    _write(path, b"")
    return "is empty"


def cut(path: Path, random: Random) -> str:
    """As a copy that was broken off leaves it."""
    data = path.read_bytes()
    keep = random.randrange(len(data)) if data else 0
    _write(path, data[:keep])
    return f"is cut after {keep} of {len(data)} bytes"


def flip(path: Path, random: Random) -> str:
    """As a bad disk or memory does."""
    data = bytearray(path.read_bytes())
    if data:
        place = random.randrange(len(data))
        data[place] ^= 1 << random.randrange(8)
        _write(path, bytes(data))
        return f"has a flipped bit in byte {place}"
    return "stays empty"


def noise(path: Path, random: Random) -> str:
    """Other content of the same size."""
    size = path.stat().st_size
    _write(path, random.choice((bytes(size), random.randbytes(size))))
    return "is noise of its size"


def longer(path: Path, random: Random) -> str:
    """Something behind the end."""
    _write(path, path.read_bytes() + random.choice((b"\0" * 100, b"{}\n", b"x")))
    return "has something behind its end"


def replaced(path: Path, random: Random) -> str:
    """Another content."""
    text = random.choice(TEXTS)
    _write(path, text)
    return f"is {text[:20]!r}, {len(text)} bytes"


def pointer(path: Path, random: Random) -> str:
    """A name that leads elsewhere."""
    text = random.choice(POINTERS)
    _write(path, text)
    return f"is {text[:20]!r}"


def missing(path: Path, random: Random) -> str:
    """Gone."""
    path.unlink()
    return "is missing"


def other_kind(path: Path, random: Random) -> str:
    """Something else than a regular file under its name."""
    path.unlink()
    kind = random.choice(("folder", "pipe", "/etc/passwd", "/nowhere", path.name, "/dev/zero", "/etc"))
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(kind)
    return f"is a {kind}" if kind in ("folder", "pipe") else f"is a link to {kind}"


def deep(path: Path, random: Random) -> str:
    """Nesting that ends recursion."""
    text, name = random.choice(((DEEP, "2000 levels"), ("[" * 200_000, "200000 open brackets")))
    _write(path, text.encode())
    return f"is {name}"


def changed_json(path: Path, random: Random) -> str:
    """One value of a JSON file is another one, or a key is gone.

    Sealed again where it is the manifest of a checkpoint.
    """
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    line = random.randrange(len(lines))
    content = json.loads(lines[line])
    said, content = change(content, random)
    sealed = path.name == "manifest.json" and isinstance(content, dict) and random.random() < 0.8
    if sealed:
        content = {key: value for key, value in content.items() if key != "checksum"}
    lines[line] = manifest_text(content).strip() if sealed else json.dumps(content)
    _write(path, ("\n".join(lines) + "\n").encode())
    where = f"line {line + 1} " if len(lines) > 1 else ""
    return f"{where}{said}{', sealed again' if sealed else ''}"


def change(content: Any, random: Random) -> tuple[str, Any]:
    """Replaces or removes one value somewhere in a JSON value.

    Returns what was done, and the new value.
    """
    content = copy.deepcopy(content)
    places = list(_places(content, ()))
    if not places or random.random() < 0.03:
        value = random.choice(VALUES)
        return f"is {_short(value)}", value
    path = random.choice(places)
    node = content
    for part in path[:-1]:
        node = node[part]
    name = ".".join(map(str, path))
    if random.random() < 0.2:
        del node[path[-1]]
        return f"{name} is gone", content
    value = random.choice(VALUES)
    node[path[-1]] = value
    return f"{name} is {_short(value)}", content


def _places(content: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    items = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    for key, value in items:
        yield (*path, key)
        yield from _places(value, (*path, key))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"{text[:30]}... ({len(text)} characters)"


def changed_yaml(path: Path, random: Random) -> str:
    """One line of a YAML file has another value."""
    lines = path.read_text().splitlines()
    line = random.randrange(len(lines))
    value = random.choice((*VALUES, "!!omap [a: 1]", "&a [*a]", "[" * 5000, "${name}", "*x", "'"))
    key, colon, _ = lines[line].partition(":")
    text = value if isinstance(value, str) else json.dumps(value)
    lines[line] = f"{key}{colon} {text}"
    path.unlink()
    path.write_text("\n".join(lines) + "\n", errors="replace")
    return f"line {line + 1} has the value {_short(value)}"


def moved_folder(path: Path, random: Random) -> str:
    """A folder that is gone, a file, or a link to elsewhere."""
    shutil.rmtree(path)
    kind = random.choice(("missing", "a file", "a link to /etc", "empty"))
    if kind == "a file":
        path.write_text("x")
    elif kind == "empty":
        path.mkdir()
    elif kind != "missing":
        path.symlink_to("/etc")
    return f"is {kind}"


ANY: tuple[Damage, ...] = (
    empty,
    cut,
    cut,
    flip,
    flip,
    noise,
    longer,
    replaced,
    missing,
    other_kind,
    other_kind,
)


def damages(path: Path) -> tuple[Damage, ...]:
    """The ways to damage what is at a path."""
    if path.is_dir():
        return (moved_folder,)
    if path.suffix in (".json", ".jsonl"):
        return (*ANY, deep, *[changed_json] * 24)
    if path.suffix == ".yaml":
        return (*ANY, deep, *[changed_yaml] * 12)
    if path.name == "latest":
        return (*ANY, *[pointer] * 4)
    return ANY

"""Random configurations.

`fathom config` answers with 0, or with 2 and one line, at once, and writes nothing.
"""

from __future__ import annotations

import copy
import os
import string
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.config.compose import SHIPPED
from pretrain.config.load import dump_config, load_config
from tests.fuzz.values import ANYTHING, MINIMAL, WORDS, Key, keys, put, values_of
from tests.running import Outcome, run_here

QUICK, LONG = 100, 1000
SECONDS = 20.0
"""Of a processor: machines are slow at times."""
KEYS = keys()
COUNTS: Counter[int] = Counter()
TOKENS = (
    "!!omap ",
    "!!binary ",
    "!!python/object:os.system ",
    "!!timestamp 2024-13-45",
    "!!int abc",
    "&a ",
    "*a",
    "<<: *a",
    "010",
    "1:30",
    "1_0",
    "yes",
    ".inf",
    ".nan",
    "1e400",
    "9" * 5000,
    "[" * 200,
    "{",
    "}",
    "? ",
    "- ",
    ": ",
    "\t",
    "'",
    '"',
    "|\n ",
    "${name}",
    "${",
    "???",
    "include: [c.yaml]\n",
    "---\n",
    "%YAML 1.1\n",
    "\x00",
    "\x1b[2J",
    "\u2028",
    "\ufeff",
    "#",
    "train.steps: 5\n",
)


@pytest.fixture(autouse=True)
def _counted(record_property: Callable[[str, Any], None]) -> Iterator[None]:
    COUNTS.clear()
    yield
    record_property(
        "counts", f"{COUNTS.total()} tried: {COUNTS[2]} refused in one line, {COUNTS[0]} accepted"
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(folder: Path, *arguments: str) -> Outcome:
    """`fathom config ARGUMENTS`, which must not fail, hang or write."""
    before = sorted(os.listdir(folder))
    done = run_here("config", *arguments)
    assert not done.wrong, done.wrong
    assert sorted(os.listdir(folder)) == before
    COUNTS[done.code] += 1
    return done


def fuzz(examples: int) -> Any:
    """Draws so many examples. One folder serves all of a test."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, deadline=None, suppress_health_check=checks)


def changes(valid_only: bool) -> st.SearchStrategy[Any]:
    """Keys of a configuration, each with whether the value is valid, and the value."""

    def values(key: Key) -> st.SearchStrategy[Any]:
        valid = st.tuples(st.just(key), st.just(True), key.valid)
        return valid if valid_only else st.one_of(valid, st.tuples(st.just(key), st.just(False), key.invalid))

    one = st.sampled_from(KEYS).flatmap(values)
    return st.lists(one, min_size=1, max_size=6, unique_by=lambda change: change[0].name)


CHANGES = st.one_of(changes(True), changes(False))


def values_from_the_schema(chosen: Any, folder: Path) -> None:
    """An invalid value is refused; what is accepted reads back equal."""
    values = copy.deepcopy(MINIMAL)
    for key, _, value in chosen:
        put(values, key.name, value)
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    done = config(folder, "c.yaml", "--quiet")
    if not all(valid for _, valid, _ in chosen):
        assert done.code == 2, chosen
    elif done.code == 0:
        first = load_config(path)
        path.write_text(dump_config(first), encoding="utf-8")
        assert load_config(path) == first


def overrides(words: list[str], folder: Path) -> None:
    config(folder, "quickstart", *words)


def any_yaml(value: Any, folder: Path) -> None:
    (folder / "c.yaml").write_text(yaml.safe_dump(value), encoding="utf-8", errors="replace")
    config(folder, "c.yaml")


def any_bytes(data: bytes, folder: Path) -> None:
    (folder / "c.yaml").write_bytes(data)
    config(folder, "c.yaml")


NAMES = st.one_of(
    st.sampled_from([key.name for key in KEYS]),
    st.sampled_from(
        [
            "+include",
            "include",
            "model",
            "data.corpora",
            "data.corpora.7.path",
            "a.b",
            "[0]",
            "x[1]",
            ".",
            "+",
            "",
        ]
    ),
    WORDS,
)
VALUES = st.one_of(
    st.sampled_from(TOKENS),
    WORDS,
    st.text(string.printable, max_size=20),
    st.integers().map(str),
    st.floats().map(str),
)
OVERRIDES = st.lists(
    st.one_of(st.builds("{}={}".format, NAMES, VALUES), WORDS).map(
        lambda word: word.replace("\0", "").lstrip("-") or "x"
    ),
    min_size=1,
    max_size=4,
)
MAPPINGS = st.dictionaries(
    st.one_of(st.sampled_from(["model", "train", "data", "include", "optimizer", "name", "schedule"]), WORDS),
    ANYTHING,
    max_size=5,
)
SOUND = [path.read_text(encoding="utf-8") for path in sorted(SHIPPED.glob("*.yaml"))]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A shipped configuration with something put into it or cut out of it.

    Or bytes of no meaning.
    """
    text = draw(st.sampled_from(SOUND))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(text)))
        gone = draw(st.integers(0, 10))
        text = text[:place] + draw(st.one_of(st.sampled_from(TOKENS), WORDS)) + text[place + gone :]
    return text.encode(errors="replace")


@fuzz(QUICK)
@given(chosen=CHANGES)
def test_values_from_the_schema(chosen: Any, folder: Path) -> None:
    values_from_the_schema(chosen, folder)


@fuzz(QUICK)
@given(words=OVERRIDES)
def test_overrides(words: list[str], folder: Path) -> None:
    overrides(words, folder)


@fuzz(QUICK // 2)
@given(value=st.one_of(ANYTHING, MAPPINGS))
def test_any_yaml(value: Any, folder: Path) -> None:
    any_yaml(value, folder)


@fuzz(QUICK)
@given(data=st.one_of(st.binary(max_size=200), mutated()))
def test_any_bytes(data: bytes, folder: Path) -> None:
    any_bytes(data, folder)


@fuzz(QUICK)
@given(wrong=values_of(bool | None, ())[1])
def test_null_is_no_invalid_value_where_it_is_a_valid_one(wrong: Any) -> None:
    assert wrong is not None


@pytest.mark.slow
@fuzz(LONG)
@given(chosen=CHANGES)
def test_many_values_from_the_schema(chosen: Any, folder: Path) -> None:
    values_from_the_schema(chosen, folder)


@pytest.mark.slow
@fuzz(LONG)
@given(words=OVERRIDES)
def test_many_overrides(words: list[str], folder: Path) -> None:
    overrides(words, folder)


@pytest.mark.slow
@fuzz(LONG)
@given(data=st.one_of(st.binary(max_size=200), mutated()))
def test_many_bytes(data: bytes, folder: Path) -> None:
    any_bytes(data, folder)


HOSTILE = {
    "deep.yaml": b"x: " + b"[" * 100_000,
    "deep_map.yaml": b"{a: " * 100_000,
    "key.yaml": b"k" * 900_000 + b": 1\n",
    "quoted_key.yaml": b'"' + b"k" * 900_000 + b'": 1\n',
    "keys.yaml": b"".join(b"k%d: 1\n" % number for number in range(40_000)),
    "wide.yaml": b"x: [" + b"1," * 400_000 + b"]\n",
    "bomb.yaml": b"".join(
        b"a%d: &a%d [*a%d, *a%d]\n" % (n, n, n - 1, n - 1) if n else b"a0: &a0 [1, 1]\n" for n in range(60)
    ),
    "digits.yaml": b"train: {steps: " + b"9" * 900_000 + b"}\n",
    "hex.yaml": b"train: {steps: 0x" + b"f" * 900_000 + b"}\n",
    "text.yaml": b"name: " + b"n" * 900_000 + b"\n",
    "path.yaml": b"runs_dir: " + b"n/" * 400_000 + b"\n",
    "interpolation.yaml": b"name: '" + b"${name" * 100_000 + b"'\n",
    "large.yaml": b"#" * 5_000_000,
    "many.yaml": b"include: [" + b"small.yaml," * 5000 + b"]\n",
    "small.yaml": b"train: {seed: 1}\n",
}


def test_hostile_files_are_refused_at_once(folder: Path) -> None:
    for name, data in HOSTILE.items():
        (folder / name).write_bytes(data)
    for number in range(2000):
        (folder / f"chain{number}.yaml").write_text(f"include: [chain{number + 1}.yaml]\n")
    for number in range(20):
        twice = f"twice{number + 1}.yaml"
        (folder / f"twice{number}.yaml").write_text(f"include: [{twice}, {twice}]\n")
    (folder / "twice20.yaml").write_text("train: {seed: 1}\n")
    os.mkfifo(folder / "pipe.yaml")
    names = [
        *HOSTILE,
        "chain0.yaml",
        "twice0.yaml",
        "twice12.yaml",
        "pipe.yaml",
        "/dev/zero",
        "/dev/null",
        "/etc/passwd",
        ".",
        "/",
    ]
    for name in names:
        if name != "small.yaml":
            done = config(folder, name)
            assert (done.code, done.seconds < SECONDS) == (2, True), name
            done = config(folder, "quickstart", f"+include={name}")
            assert done.code == 2, name
            assert "root:" not in done.err

"""Pairs become two indexed files with equal document numbers, whatever they are read from."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from model.errors import UserError
from pretrain.data.dataset_admin import inspect_dataset, verify_data
from pretrain.data.indexed import IndexedDataset
from pretrain.data.manifest import PAIRED, SPLITS, Manifest, SplitName, load_manifest
from pretrain.data.prepare_pairs import PairOptions, prepare_pairs
from pretrain.data.reading.pairs import Sides
from pretrain.data.tokens.tokenizer import Tokenizer
from pretrain.data.tokens.train import Reading, train_tokenizer
from tests.pretrain.data.reading.test_catalogues import compiled
from tools.cli import app

EN_DE = Sides("en", "de")
NOUNS = (("house", "Haus"), ("boat", "Boot"), ("\u2028line", "Zeile"), ('"quote', '"Zitat'))
SIZES = (("big", "groß"), ("small", "klein"), ("red", "rot"))
PAIRS = [
    (f"the {noun} is {size}", f"das {wort} ist {gross}") for noun, wort in NOUNS for size, gross in SIZES
]
ALL = (1.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on both sides of lines of JSON."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "pairs.jsonl").write_text(json_lines(PAIRS), encoding="utf-8")
    reading = Reading(sides=EN_DE)
    trained = train_tokenizer(
        [str(folder / "pairs.jsonl")], folder / "joint.model", vocab_size=290, reading=reading
    )
    assert trained.documents == 2 * len(PAIRS)
    assert Tokenizer(folder / "joint.model").encode("das Haus") != []
    return folder / "joint.model"


def json_lines(pairs: list[tuple[str, str]]) -> str:
    return "".join(json.dumps({"en": one, "de": two}) + "\n" for one, two in pairs)


def as_lines(folder: Path) -> tuple[str, Sides]:
    (folder / "x.en").write_text("\ufeff" + "".join(one + "\r\n" for one, _ in PAIRS), encoding="utf-8")
    with gzip.open(folder / "x.de.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(two for _, two in PAIRS))
    return str(folder), EN_DE


def as_json(folder: Path) -> tuple[str, Sides]:
    text = "".join(json.dumps({"translation": {"en": one, "de": two}}) + "\n" for one, two in PAIRS)
    (folder / "x.jsonl").write_text(text)
    return str(folder / "x.jsonl"), Sides("translation.en", "translation.de")


def as_bare_tsv(folder: Path) -> tuple[str, Sides]:
    (folder / "x.tsv").write_text("".join(f"7\t{two}\t{one}\n" for one, two in PAIRS), encoding="utf-8")
    return str(folder / "x.tsv"), Sides("3", "2")


def as_parquet(folder: Path) -> tuple[str, Sides]:
    columns = {
        "de": [two for _, two in PAIRS],
        "en": [one.encode() for one, _ in PAIRS],
        "n": [1] * len(PAIRS),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "x.parquet")
    return str(folder / "x.parquet"), EN_DE


def as_catalogue(folder: Path) -> tuple[str, Sides]:
    # Compiled catalogues are sorted; a message for each file keeps the order of this test.
    for number, pair in enumerate(PAIRS):
        (folder / f"{number:02d}.mo").write_bytes(compiled(dict([pair]), charset="utf-8"))
    return str(folder), EN_DE


def options(given: str, out: Path, tokenizer: Path, sides: Sides = EN_DE) -> PairOptions:
    return PairOptions([given], out, tokenizer, sides=sides, split=ALL, workers=1)


def texts(folder: Path, name: SplitName) -> list[str]:
    if not load_manifest(folder).splits[name].documents:
        return []
    tokenizer, dataset = Tokenizer(folder / "tokenizer.model"), IndexedDataset(str(folder / name))
    return [tokenizer.decode(dataset[index].tolist()) for index in range(len(dataset))]


@pytest.mark.parametrize("write", [as_lines, as_json, as_bare_tsv, as_parquet, as_catalogue])
def test_every_kind_of_file_gives_the_same_pairs(
    tmp_path: Path, tokenizer: Path, write: Callable[[Path], tuple[str, Sides]]
) -> None:
    (tmp_path / "in").mkdir()
    given, sides = write(tmp_path / "in")
    manifest = prepare_pairs(options(given, tmp_path / "out", tokenizer, sides))
    assert list(zip(*(texts(tmp_path / "out", name) for name in PAIRED["train"]), strict=True)) == PAIRS
    assert manifest.pairs is not None
    assert (manifest.pairs.source, manifest.pairs.target) == sides
    assert manifest.broken.count == manifest.empty_documents == manifest.pairs.one_side.count == 0
    verify_data(tmp_path / "out")


def test_pairs_that_cannot_be_used_are_counted_and_named(tmp_path: Path, tokenizer: Path) -> None:
    lines = [
        json.dumps({"en": "the house", "de": "das Haus"}),
        json.dumps({"en": "only", "de": " "}),
        json.dumps({"en": "", "de": ""}),
        json.dumps({"en": "no German"}),
        json.dumps({"en": 7, "de": "sieben"}),
        "{",
        json.dumps({"en": "boat " * 40, "de": "Boot"}),
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    wanted = replace(options(str(tmp_path / "x.jsonl"), tmp_path / "out", tokenizer), max_tokens=30)
    manifest = prepare_pairs(wanted)
    pairs = manifest.pairs
    assert pairs is not None
    assert manifest.splits["train_source"].documents == manifest.splits["train_target"].documents == 1
    assert manifest.empty_documents == 1
    assert [(one.line, one.reason) for one in pairs.one_side.examples] == [(2, "'de' is empty")]
    assert [one.line for one in pairs.too_long.examples] == [7]
    assert "'en' has" in pairs.too_long.examples[0].reason
    assert [one.line for one in manifest.broken.examples] == [4, 5, 6]
    with pytest.raises(UserError, match=r"x.jsonl:4.*no key 'de'.*--strict"):
        prepare_pairs(replace(wanted, out=tmp_path / "strict", strict=True))
    assert not (tmp_path / "strict").exists()


def test_a_split_of_its_own_is_that_input_alone(tmp_path: Path, tokenizer: Path) -> None:
    """It lies in the folder of all others, one of which repeats a source of it."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    (folder / "test.en").write_text("".join(one + "\n" for one, _ in PAIRS[:3]), encoding="utf-8")
    (folder / "test.de").write_text("".join(two + "\n" for _, two in PAIRS[:3]), encoding="utf-8")
    (folder / "rest.jsonl").write_text(json_lines([*PAIRS[3:], (PAIRS[1][0], "anders")]), encoding="utf-8")
    command = ["data", "prepare", str(folder), "--pairs", "en,de", "--tokenizer", str(tokenizer)]
    held = ["--out", str(out), "--test", str(folder / "test.en"), "--workers", "1"]
    done = CliRunner().invoke(app, [*command, *held])
    assert done.exit_code == 0, done.output
    assert "left out 1 pairs whose source is in a split of its own" in done.output
    manifest = load_manifest(out)
    assert manifest.pairs is not None
    assert manifest.pairs.test == (str(folder / "test.en"),)
    assert (manifest.pairs.held_out, manifest.split[2]) == (1, 0)
    assert list(zip(*(texts(out, name) for name in PAIRED["test"]), strict=True)) == PAIRS[:3]
    others = [*texts(out, "train_source"), *texts(out, "validation_source")]
    assert sorted(others) == sorted(source for source, _ in PAIRS[3:])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"split": (0.8, 0.1, 0.1)}, r"--split 0.8,0.1,0.1: with --test the test split is that input alone"),
        ({"test": ("x.de",)}, "--test: there is no file of sources in it"),
        ({"validation": ("x.en",)}, "x.en is named for --validation and --test"),
        (
            {"test": ("more.jsonl",)},
            "INPUT: no pairs beside those of --test, 0 with sources of them left out",
        ),
        ({"test": ("half.jsonl",)}, r"--test: no pairs in it \(0 empty, 1 broken, the first: half.jsonl:2: "),
    ],
)
def test_a_split_of_its_own_that_cannot_be(
    tmp_path: Path, tokenizer: Path, changes: dict[str, object], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("x.en", "one\n"), ("x.de", "eins\n"), ("more.jsonl", json_lines(PAIRS))):
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "half.jsonl").write_text('{"en": "one", "de": ""}\n{"en": "two"}\n')
    given = replace(options("more.jsonl", tmp_path / "out", tokenizer), test=("x.en",))
    with pytest.raises(UserError, match=reason):
        prepare_pairs(replace(given, **changes))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_parallel_leave_nothing_behind(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "x.en").write_text("one\ntwo\n")
    (tmp_path / "x.de").write_text("eins\nzwei\ndrei\n")
    with pytest.raises(UserError, match=r"x.en has 2 lines and .*x.de has 3"):
        prepare_pairs(options(str(tmp_path / "x.en"), tmp_path / "out", tokenizer))
    (tmp_path / "alone.en").write_text("one\n")
    with pytest.raises(UserError, match=r"no pairs .*there is no file .de beside it"):
        prepare_pairs(options(str(tmp_path / "alone.en"), tmp_path / "out", tokenizer))
    (tmp_path / "notes.txt").write_text("one\n")
    with pytest.raises(UserError, match=r"come in twos, X.en and X.de"):
        prepare_pairs(options(str(tmp_path / "notes.txt"), tmp_path / "out", tokenizer))
    assert not (tmp_path / "out").exists()


def many(folder: Path, tokenizer: Path, workers: int = 1) -> Manifest:
    """120 sources, each with two translations."""
    pairs = [(f"{one} {number % 120}", f"{two} {number}") for number, (one, two) in enumerate(PAIRS * 20)]
    (folder.parent / "many.jsonl").write_text(json_lines(pairs))
    wanted = options(str(folder.parent / "many.jsonl"), folder, tokenizer)
    return prepare_pairs(replace(wanted, split=(0.7, 0.2, 0.1), workers=workers))


def test_a_source_is_in_one_split_only_and_workers_change_nothing(tmp_path: Path, tokenizer: Path) -> None:
    manifest = many(tmp_path / "one", tokenizer)
    many(tmp_path / "two", tokenizer, workers=2)
    sources = [set(texts(tmp_path / "one", PAIRED[split][0])) for split in SPLITS]
    assert sum(map(len, sources)) == len(set().union(*sources)) == 120
    assert all(sources)
    for split in SPLITS:
        one, two = (manifest.splits[name].documents for name in PAIRED[split])
        assert one == two > 0
        for name in PAIRED[split]:
            assert (tmp_path / "one" / f"{name}.bin").read_bytes() == (
                tmp_path / "two" / f"{name}.bin"
            ).read_bytes()
    with pytest.raises(UserError, match="--overwrite"):
        many(tmp_path / "one", tokenizer)


def test_a_manifest_whose_sides_differ_is_damaged(tmp_path: Path, tokenizer: Path) -> None:
    many(tmp_path / "out", tokenizer)
    content = json.loads((tmp_path / "out" / "dataset.json").read_text())
    content["splits"]["train_source"]["documents"] += 1
    (tmp_path / "out" / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="train_source and train_target have .* which must be equal"):
        load_manifest(tmp_path / "out")


def test_the_command_prepares_and_shows_pairs_with_their_licence(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json_lines(PAIRS))
    (tmp_path / "x.jsonl.license").write_text("SPDX-License-Identifier: BSD-3-Clause\n")
    command = [
        "data",
        "prepare",
        str(tmp_path),
        "--tokenizer",
        str(tokenizer),
        "--out",
        str(tmp_path / "out"),
    ]
    run = CliRunner().invoke(app, [*command, "--pairs", "en,de", "--split", "1,0,0", "--workers", "1"])
    assert run.exit_code == 0, run.output
    manifest, shown = inspect_dataset(tmp_path / "out", "train", 1)
    assert manifest.sources[0].licences == {"x.jsonl": "BSD-3-Clause"}
    assert shown == ["en: the house is big\nde: das Haus ist groß"]
    for wrong, message in {
        "--text-key x --pairs en,de": "--text-key x has no effect with --pairs",
        "--pairs en": "give two names",
        "--max-tokens 9": "--max-tokens 9 has no effect without --pairs",
    }.items():
        run = CliRunner().invoke(app, [*command, *wrong.split()])
        assert isinstance(run.exception, UserError)
        assert message in str(run.exception)
    with pytest.raises(UserError, match="holds pairs, which only train.task=translation reads"):
        manifest.facts(tmp_path / "out", "train")

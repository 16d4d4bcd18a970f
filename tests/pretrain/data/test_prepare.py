from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from typer.testing import CliRunner

import pretrain.data.prepare as prepare_module
from model.errors import UserError
from pretrain.data.dataset_admin import inspect_dataset, verify_data
from pretrain.data.indexed import DType, IndexedDataset, IndexedDatasetBuilder
from pretrain.data.manifest import load_manifest
from pretrain.data.prepare import PrepareOptions, prepare
from pretrain.data.reading.inputs import standard_library_files
from pretrain.data.tokens.encode import Encoder
from pretrain.data.tokens.tokenizer import token_dtype
from pretrain.data.tokens.train import special_names, train_tokenizer

FILES = [path for path in standard_library_files() if path.parent.name in ("json", "asyncio", "logging")]
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train_tokenizer([str(path) for path in FILES], path, vocab_size=600, max_bytes=200_000)
    return path


@pytest.fixture
def options(tokenizer: Path, tmp_path: Path) -> PrepareOptions:
    (tmp_path / "in").mkdir()
    lines = [{"text": path.read_text()[:3000], "name": path.name} for path in FILES]
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return PrepareOptions(
        [str(tmp_path / "in" / "a.jsonl")],
        tmp_path / "out" / "set",
        tokenizer,
        split=(0.7, 0.2, 0.1),
        workers=1,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def texts(folder: Path, split: str) -> list[str]:
    count = load_manifest(folder).facts(folder, split).documents
    return inspect_dataset(folder, split, count)[1] if count else []


def test_files_are_those_of_megatrons_builder_fed_document_by_document(
    options: PrepareOptions, tmp_path: Path
) -> None:
    manifest = prepare(options)
    library = sentencepiece.SentencePieceProcessor(model_file=str(options.tokenizer))
    expected = [json.loads(line)["text"] for line in Path(options.inputs[0]).read_text().splitlines()]
    assert set(contents(options.out)) == {
        "dataset.json",
        "token_counts.npy",
        "tokenizer.model",
        *(f"{split}.{kind}" for split in SPLITS for kind in ("bin", "idx")),
    }
    assert load_manifest(options.out) == manifest
    found = []
    for split in SPLITS:
        documents = texts(options.out, split)
        assert documents, f"the {split} split is empty, so nothing is compared"
        builder = IndexedDatasetBuilder(str(tmp_path / f"{split}.bin"), dtype=np.uint16)
        for document in documents:
            builder.add_item(torch.IntTensor([*library.encode(document), library.eos_id()]))
            builder.end_document()
        builder.finalize(str(tmp_path / f"{split}.idx"))
        for kind in ("bin", "idx"):
            assert (options.out / f"{split}.{kind}").read_bytes() == (
                tmp_path / f"{split}.{kind}"
            ).read_bytes()
        assert documents == [text for text in expected if text in documents], (
            "documents keep the order of the input"
        )
        found += documents
    assert sorted(found) == sorted(text for text in expected if text)


def test_bytes_do_not_depend_on_workers_or_batches(
    options: PrepareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(options)
    monkeypatch.setattr(prepare_module, "BATCH_BYTES", 5000)
    prepare(replace(options, out=options.out.with_name("two"), workers=2))
    assert contents(options.out.with_name("two")) == contents(options.out)


def test_manifest_numbers(options: PrepareOptions, tokenizer: Path) -> None:
    manifest = prepare(options)
    train = np.fromfile(options.out / "train.bin", dtype=np.uint16)
    p = np.bincount(train)[np.bincount(train) > 0] / len(train)
    assert manifest.unigram_entropy_nats == pytest.approx(-(p * np.log(p)).sum())
    assert manifest.token_correlation == pytest.approx((p**2).sum())
    assert manifest.splits["train"].tokens == len(train)
    assert manifest.splits["train"].bytes == sum(len(text.encode()) for text in texts(options.out, "train"))
    assert manifest.splits["train"].documents == (train == manifest.eod_id).sum()
    assert (manifest.format, manifest.vocab_size, manifest.eod_id, manifest.seed) == (1, 600, 2, 1234)
    assert (options.out / "tokenizer.model").read_bytes() == tokenizer.read_bytes()


def test_broken_lines_are_counted_and_placed(options: PrepareOptions, tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "good one"}\n{"text": ""}\n' + b"not json\n" * 25))
    with_broken = replace(options, inputs=[*options.inputs, str(path)])
    manifest = prepare(with_broken)
    assert manifest.empty_documents == 1 + sum(not item.read_text() for item in FILES)
    assert manifest.broken.count == 25
    assert [(entry.file, entry.line) for entry in manifest.broken.examples] == [
        (str(path), line) for line in range(3, 23)
    ]
    with pytest.raises(UserError, match=r"broken.jsonl.gz:3: bad JSON"):
        prepare(replace(with_broken, out=options.out.with_name("strict"), strict=True))
    assert not options.out.with_name("strict").exists()


def test_names_and_descriptions_that_json_cannot_hold(options: PrepareOptions, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in (b"README.md", b"a.jsonl", b"\xff.txt", b"\x1b[2J.txt"):
        (folder / os.fsdecode(name)).write_bytes(b"\x80" if name.endswith(b".txt") else b'{"text": "good"}')
    manifest = prepare(replace(options, inputs=[str(folder)], split=(1.0, 0.0, 0.0)))
    assert manifest == load_manifest(options.out)
    assert [entry.file for entry in manifest.broken.examples] == [
        f"{folder}/\\x1b[2J.txt",
        f"{folder}/\\udcff.txt",
    ]
    assert manifest.left_out == (f"{folder}/README.md",)


def test_split_by_document_is_stable_when_input_moves_and_grows(
    options: PrepareOptions, tmp_path: Path
) -> None:
    prepare(options)
    lines = Path(options.inputs[0]).read_text().splitlines()
    (tmp_path / "moved.jsonl").write_text("\n".join(['{"text": "a new first line"}', *reversed(lines)]))
    prepare(replace(options, inputs=[str(tmp_path / "moved.jsonl")], out=options.out.with_name("moved")))
    for split in SPLITS:
        assert set(texts(options.out, split)) <= set(texts(options.out.with_name("moved"), split)), split
    prepare(replace(options, out=options.out.with_name("seed"), seed=5))
    assert texts(options.out.with_name("seed"), "validation") != texts(options.out, "validation")


def test_split_by_file_keeps_files_whole(options: PrepareOptions, tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / "in" / f"{number}.jsonl").write_text(
            "".join(json.dumps({"text": f"file {number} line {line}"}) + "\n" for line in range(5))
        )
    prepare(replace(options, inputs=[str(tmp_path / "in" / "[0-9]*.jsonl")], split_by="file"))
    sets = [{text.split()[1] for text in texts(options.out, split)} for split in SPLITS]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 30
    assert all(
        load_manifest(options.out).facts("", split).documents == 5 * len(group)
        for split, group in zip(SPLITS, sets, strict=True)
    )


def test_long_lists_of_inputs_are_summed_up(options: PrepareOptions) -> None:
    manifest = prepare(replace(options, inputs=[*map(str, FILES), *options.inputs] * 3))
    assert [source.input for source in manifest.sources][:2] == [str(path) for path in FILES[:2]]
    assert sum(source.parts for source in manifest.sources) == len(FILES) + 1, (
        "an input named again is read once"
    )
    assert len(manifest.sources) == 101
    assert len(manifest.text()) < 30_000


def test_limit_and_a_split_without_a_share(options: PrepareOptions) -> None:
    manifest = prepare(replace(options, limit=7, split=(3.0, 1.0, 0.0)))
    assert sum(split.documents for split in manifest.splits.values()) + manifest.empty_documents == 7
    assert manifest.splits["test"].documents == 0


def test_an_existing_data_set_is_replaced_only_on_request(options: PrepareOptions, tmp_path: Path) -> None:
    prepare(options)
    before = contents(options.out)
    with pytest.raises(UserError, match="a data set is there already; add --overwrite"):
        prepare(replace(options, seed=9))
    assert contents(options.out) == before
    prepare(replace(options, seed=9, overwrite=True))
    assert contents(options.out) != before
    assert [path.name for path in options.out.parent.iterdir()] == ["set"]
    for name in ("other", "file"):
        (tmp_path / name).mkdir() if name == "other" else (tmp_path / name).write_text("x")
    (tmp_path / "other" / "precious").write_text("x")
    with pytest.raises(UserError, match="holds something else"):
        prepare(replace(options, out=tmp_path / "other", overwrite=True))
    with pytest.raises(UserError, match="is a file"):
        prepare(replace(options, out=tmp_path / "file", overwrite=True))


def test_what_appears_at_the_target_meanwhile_is_kept(options: PrepareOptions) -> None:
    def another_writes(progress: prepare_module.PrepareProgress) -> None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "thesis.tex").write_text("years of work")

    with pytest.raises(
        UserError, match=f"--out {options.out}: the folder holds something else than a data set"
    ):
        prepare(replace(options, overwrite=True), another_writes)
    assert contents(options.out) == {"thesis.tex": b"years of work"}
    assert [path.name for path in options.out.parent.iterdir()] == ["set"]


def test_a_failure_half_way_leaves_nothing_behind(
    options: PrepareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "BATCH_BYTES", 5000)

    def fail_later(progress: prepare_module.PrepareProgress) -> None:
        if progress.documents > 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(options, fail_later)
    assert not options.out.parent.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": (1.0, 2.0)}, "--split 1,2: give three numbers"),
        ({"split": (0.0, 1.0, 1.0)}, "--split 0,1,1"),
        ({"split": (1.0, -1.0, 1.0)}, "--split 1,-1,1"),
        ({"seed": -1}, "--seed -1"),
        ({"workers": -2}, "--workers -2"),
        ({"limit": 0}, "--limit 0"),
        ({"inputs": ["nothing-*.txt"]}, "nothing-\\*.txt: no file matches"),
        ({"inputs": ["hf://name"], "split_by": "file"}, "--split-by file"),
        ({"tokenizer": Path("absent.model")}, "absent.model"),
        ({"out": Path("/proc/none/set")}, "--out /proc/none/set: cannot write"),
        ({"text_key": "body"}, r"no documents \(0 empty, \d+ broken, the first: .*a.jsonl:1: no key 'body'"),
    ],
)
def test_mistakes_are_named(options: PrepareOptions, change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(replace(options, **change))  # type: ignore[arg-type]
    assert not options.out.exists()


def test_workers_and_command_files_load_neither_torch_nor_megatron() -> None:
    heavy = ("torch", "megatron", "datasets", "pyarrow")
    code = (
        f"import sys, {Encoder.__module__}, tools.text.data, tools.text.tokenizer; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


@pytest.mark.slow
def test_preparing_beats_encoding_one_document_at_a_time(tmp_path: Path) -> None:
    """Tokens per second of processor time, on the standard library with a vocabulary of 4096.

    Against one call and one append for each document.
    """
    files = [path for path in standard_library_files() if path.stat().st_size]
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"text": path.read_text(encoding="utf-8-sig")}) + "\n" for path in files)
    )
    model = tmp_path / "t.model"
    train_tokenizer([str(path) for path in files], model)
    started = time.process_time()
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    builder = IndexedDatasetBuilder(str(tmp_path / "naive.bin"), dtype=np.uint16)
    tokens = 0
    with (tmp_path / "in.jsonl").open() as lines:
        for line in lines:
            ids = library.encode(json.loads(line)["text"])
            builder.add_item(torch.IntTensor([*ids, library.eos_id()]))
            builder.end_document()
            tokens += len(ids) + 1
    builder.finalize(str(tmp_path / "naive.idx"))
    naive = time.process_time() - started
    started = time.process_time()
    manifest = prepare(
        PrepareOptions(
            [str(tmp_path / "in.jsonl")], tmp_path / "out", model, split=(1.0, 0.0, 0.0), workers=1
        )
    )
    prepared = time.process_time() - started
    print(
        f"{tokens} tokens: naive {tokens / naive:,.0f} tokens/s, "
        f"prepare {tokens / prepared:,.0f} tokens/s, {naive / prepared:.2f} times as fast"
    )
    assert manifest.splits["train"].tokens == tokens
    for kind in ("bin", "idx"):
        assert (tmp_path / "out" / f"train.{kind}").read_bytes() == (tmp_path / f"naive.{kind}").read_bytes()
    assert naive / prepared > 1.5


def test_large_vocabularies_take_wider_tokens(options: PrepareOptions) -> None:
    for size in (100, 65_499, 65_500, 65_536, 200_000):
        assert token_dtype(size) == DType.optimal_dtype(size)
    prepare(options)
    assert IndexedDataset(str(options.out / "train")).index.dtype == np.uint16


def test_commands(options: PrepareOptions, tmp_path: Path) -> None:
    from tools.text import data, tokenizer

    runner = CliRunner()
    model = str(tmp_path / "cli.model")
    result = runner.invoke(tokenizer.app, ["train", *options.inputs, "--vocab-size", "500", "--out", model])
    assert (result.exit_code, "500 pieces (bpe)" in result.output) == (0, True), result.output
    arguments = [
        "prepare",
        *options.inputs,
        "--out",
        str(tmp_path / "cli"),
        "--tokenizer",
        model,
        "--split",
        "8,1,1",
        "--workers",
        "1",
    ]
    result = runner.invoke(data.app, arguments)
    assert (result.exit_code, "bytes/token" in result.output) == (0, True), result.output
    result = runner.invoke(data.app, [*arguments, "--overwrite", "--json"])
    assert result.stdout == (tmp_path / "cli" / "dataset.json").read_text()
    assert runner.invoke(data.app, [*arguments, "--overwrite", "--quiet"]).output == ""
    result = runner.invoke(data.app, ["inspect", str(tmp_path / "cli"), "--documents", "2", "--json"])
    assert json.loads(result.stdout)["documents"] == texts(tmp_path / "cli", "train")[:2]
    result = runner.invoke(data.app, ["inspect", str(tmp_path / "cli")])
    assert texts(tmp_path / "cli", "train")[0].splitlines()[0] in result.output
    assert isinstance(runner.invoke(data.app, arguments).exception, UserError)
    assert isinstance(
        runner.invoke(data.app, [*arguments, "--overwrite", "--split", "a,b"]).exception, UserError
    )


def test_documents_begin_with_a_mark_where_the_tokenizer_is_for_masking(
    options: PrepareOptions, tmp_path: Path
) -> None:
    names = special_names("all")
    train_tokenizer(options.inputs, tmp_path / "t.model", vocab_size=600, max_bytes=50_000, special=names)
    marked = replace(options, tokenizer=tmp_path / "t.model")
    manifest = prepare(marked)
    assert manifest.special == {"cls": 1, "sep": 2, "pad": 3, "mask": 4}
    assert (manifest.begin_id, manifest.eod_id) == (1, 2)
    bare = prepare(replace(marked, out=tmp_path / "bare", begin_mark=False))
    assert bare.begin_id is None
    for split in SPLITS:
        with_mark, without = (
            IndexedDataset(str(folder / split)) for folder in (marked.out, tmp_path / "bare")
        )
        assert len(with_mark) == len(without) > 0
        for number in range(len(with_mark)):
            assert with_mark[number].tolist() == [1, *without[number].tolist()]
        assert texts(marked.out, split) == texts(tmp_path / "bare", split)
    verify_data(marked.out)
    verify_data(tmp_path / "bare")
    for changed, problem in (
        ({"begin_id": 1}, "train.idx has documents without the mark at their begin"),
        ({"special": {"cls": 1, "sep": 2, "pad": 4, "mask": 3}}, "other special tokens than tokenizer.model"),
    ):
        (tmp_path / "bare" / "dataset.json").write_text(bare.model_copy(update=changed).text())
        with pytest.raises(UserError, match=problem):
            verify_data(tmp_path / "bare")
    (tmp_path / "bare" / "dataset.json").write_text(bare.model_copy(update={"special": {"pad": 600}}).text())
    with pytest.raises(UserError, match="special token 600 is not in a vocabulary of 600"):
        load_manifest(tmp_path / "bare")


def test_without_a_mask_token_documents_begin_with_a_mark_on_demand(options: PrepareOptions) -> None:
    assert prepare(options).begin_id is None
    assert prepare(replace(options, begin_mark=True, overwrite=True)).begin_id == 1

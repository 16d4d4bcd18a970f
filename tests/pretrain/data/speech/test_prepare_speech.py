"""Recordings become frames and ids in indexed files; what cannot be used is counted and named."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from model.errors import UserError
from pretrain.data.dataset_admin import inspect_dataset, verify_data
from pretrain.data.indexed import IndexedDataset
from pretrain.data.manifest import Manifest, load_manifest
from pretrain.data.speech.filterbanks import loaded, log_mel
from pretrain.data.speech.prepare import SpeechOptions, prepare_speech
from pretrain.data.tokens.tokenizer import Tokenizer
from tests.pretrain.clips import SIDES, spoken, write_clip, write_speech
from tools.cli import app

FILTERS = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """The folder of a data set and of its clips, and the manifest."""
    folder = tmp_path_factory.mktemp("speech")
    return folder, write_speech(folder, filters=FILTERS)


def options(data: tuple[Path, Manifest], manifest: Path, out: Path) -> SpeechOptions:
    return SpeechOptions(
        [str(manifest)], out, data[0] / "words.model", (1, 0, 0), workers=1, sides=SIDES, filters=FILTERS
    )


def test_frames_lie_beside_what_is_said(data: tuple[Path, Manifest]) -> None:
    folder, manifest = data
    clips = [json.loads(line) for line in (folder / "clips.jsonl").read_text().splitlines()]
    tokenizer = Tokenizer(folder / "words.model")
    found: dict[str, list[tuple[str, np.ndarray]]] = {}
    for split in ("train", "validation"):
        frames, targets = (
            IndexedDataset(str(folder / "data" / f"{split}_{s}")) for s in ("source", "target")
        )
        assert len(frames) == len(targets) > 10
        for index in range(len(frames)):
            text = tokenizer.decode(targets[index].tolist())
            found.setdefault(text, []).append((split, frames[index].reshape(-1, FILTERS).copy()))
    assert sum(map(len, found.values())) == len(clips)
    assert all(len({split for split, _ in those}) == 1 for those in found.values()), "a text is in one split"
    for number, clip in enumerate(clips):
        words = clip["transcript"].split()
        expected = log_mel(spoken(words, number), FILTERS)
        near = [
            np.abs(loaded(frames) - expected).max()
            for _, frames in found[clip["transcript"]]
            if len(frames) == len(expected)
        ]
        assert min(near) < 0.7, "16 bits of a file round quiet parts"
    assert manifest.speech is not None
    assert len(manifest.speech.mean) == len(manifest.speech.std) == FILTERS
    assert 0.9 < manifest.speech.moments.entering < 1, "frames of variance 1, and zeros at the ends"
    verify_data(folder / "data")
    _, texts = inspect_dataset(folder / "data", "train", 1)
    assert re.fullmatch(r"path: a clip of 0\.\d\d s\ntranscript: [a-z ]+", texts[0])


def test_what_cannot_be_used_is_counted_and_named(data: tuple[Path, Manifest], tmp_path: Path) -> None:
    write_clip(tmp_path / "good.flac", spoken(["red"]))
    write_clip(tmp_path / "silent.wav", np.zeros(8000, np.float32))
    write_clip(tmp_path / "short.wav", spoken(["red"])[:300])
    write_clip(tmp_path / "long.wav", np.tile(spoken(["red"]), 20))
    (tmp_path / "text.wav").write_text("no sound")
    write_clip(tmp_path / "cut.wav", spoken(["blue"] * 4))
    whole = (tmp_path / "cut.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[:20])
    (tmp_path / "half.wav").write_bytes(whole[: len(whole) // 2])
    names = ("good.flac", "silent.wav", "short.wav", "long.wav", "text.wav", "cut.wav", "none.wav")
    lines = [{"path": name, "transcript": "red"} for name in names]
    lines += [{"path": "good.flac", "transcript": " "}, {"transcript": "no path"}]
    lines += [{"path": "half.wav", "transcript": "red"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    wanted = replace(options(data, tmp_path / "x.jsonl", tmp_path / "out"), max_seconds=1.0)
    manifest = prepare_speech(wanted)
    assert manifest.speech is not None
    assert manifest.splits["train_source"].documents == manifest.splits["train_target"].documents == 1
    told = {one.line: one.reason for one in manifest.broken.examples}
    assert manifest.broken.count == len(told) == 7
    words = {
        2: "silent.wav: silence",
        3: "short.wav: 300 samples",
        5: "text.wav: no recording",
        6: "cut.wav: no recording",
        7: "none.wav: No such file or directory",
        9: "no key 'path'",
        10: "half.wav: cut off: 7694 of 15396 bytes",
    }
    assert [line for line, said in words.items() if said not in told[line]] == []
    (long,) = manifest.speech.too_long.examples
    assert "long.wav: 2.4 s, the most is 1 s" in long.reason
    assert manifest.speech.one_side.count == 1
    with pytest.raises(UserError, match=r"x\.jsonl:\d: .*; without --strict it would be left out"):
        prepare_speech(replace(wanted, out=tmp_path / "strict", strict=True))
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize("form", ["parquet", "data set", "streamed"])
def test_a_column_of_sound_is_read_as_files_are(
    data: tuple[Path, Manifest], tmp_path: Path, form: str
) -> None:
    """Three recordings in a column as `datasets` writes it, one that is missing, one damaged."""
    from datasets import Audio, Dataset

    said = ["red blue", "green", "black grey"]
    held: list[dict[str, bytes | str | None]] = []
    for number, text in enumerate(said):
        write_clip(tmp_path / f"{number}.flac", spoken(text.split(), number))
        held.append({"bytes": (tmp_path / f"{number}.flac").read_bytes(), "path": f"{number}.flac"})
    held[1]["path"] = None
    lines = [{"path": f"{number}.flac", "transcript": text} for number, text in enumerate(said)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sound = [*held, None, {"bytes": (tmp_path / "0.flac").read_bytes()[:40], "path": "cut.flac"}]
    table = Dataset.from_dict({"path": sound, "transcript": [*said, "red", "red"]})
    (tmp_path / "table").mkdir()
    table.cast_column("path", Audio(decode=False)).to_parquet(tmp_path / "table" / "train.parquet")
    files = prepare_speech(options(data, tmp_path / "x.jsonl", tmp_path / "files"))
    name = f"hf://{tmp_path / 'table'}" if form != "parquet" else str(tmp_path / "table")
    given = replace(options(data, tmp_path / "x", tmp_path / "held"), streaming=form == "streamed")
    manifest = prepare_speech(replace(given, inputs=[name]))
    assert manifest.splits == files.splits, "checksums of frames and ids are equal"
    none, cut = manifest.broken.examples
    assert (none.line, none.reason) == (4, "'path' is NoneType, not a string")
    assert cut.line == 5
    assert cut.reason.startswith("cut.flac: no recording that can be read: ")


def test_a_recording_in_a_column_is_held_out_by_its_sound(
    data: tuple[Path, Manifest], tmp_path: Path
) -> None:
    import pyarrow as pa
    from pyarrow.parquet import write_table

    for number, (name, texts) in enumerate({"held": ["red"], "train": ["blue", "green"]}.items()):
        sounds = []
        for seed in range(len(texts)):
            write_clip(tmp_path / "x.wav", spoken(["grey"], seed))
            sounds.append({"bytes": (tmp_path / "x.wav").read_bytes(), "path": f"{number}{seed}.wav"})
        write_table(pa.table({"path": sounds, "transcript": texts}), tmp_path / f"{name}.parquet")
    given = options(data, tmp_path / "train.parquet", tmp_path / "out")
    manifest = prepare_speech(replace(given, validation=(str(tmp_path / "held.parquet"),)))
    assert manifest.speech is not None
    assert manifest.speech.held_out == 1
    assert manifest.splits["train_target"].documents == manifest.splits["validation_target"].documents == 1


def test_a_held_out_recording_is_a_file_and_not_its_name(data: tuple[Path, Manifest], tmp_path: Path) -> None:
    """Two tables in folders of their own name files alike, and one also the other's file."""
    tables = {"train": "a.wav\tred\n../held/a.wav\tblue\n", "held": "a.wav\tblue\n"}
    for seed, (folder, rows) in enumerate(tables.items()):
        (tmp_path / folder).mkdir()
        write_clip(tmp_path / folder / "a.wav", spoken(["red", "blue"], seed))
        (tmp_path / folder / "list.tsv").write_text(f"path\ttranscript\n{rows}")
    given = options(data, tmp_path / "train" / "list.tsv", tmp_path / "out")
    held = (str(tmp_path / "held" / "list.tsv"),)
    manifest = prepare_speech(replace(given, validation=held, split=(1.0, 0.0, 0.0)))
    assert manifest.speech is not None
    assert manifest.speech.held_out == 1
    for split, said in (("train", "red"), ("validation", "blue")):
        _, texts = inspect_dataset(tmp_path / "out", split, 9)
        assert [text.split("transcript: ")[1] for text in texts] == [said]


def test_the_command_reads_a_table_whose_validation_is_a_file(
    data: tuple[Path, Manifest], tmp_path: Path
) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        write_clip(tmp_path / f"{name}.wav", spoken(["red", "blue"], seed))
        (tmp_path / f"{name}.tsv").write_text(f"path\ttranscript\n{name}.wav\tred blue\n")
    given = ["data", "prepare", str(tmp_path / "a.tsv"), "--speech", "path,transcript", "--workers", "1"]
    given += ["--tokenizer", str(data[0] / "words.model"), "--validation", str(tmp_path / "b.tsv")]
    given += ["--normalise", "global", "--filters", "8", "--out", str(tmp_path / "out")]
    told = CliRunner().invoke(app, given)
    assert told.exit_code == 0, told.output
    assert "8 filters, normalised by global" in told.output
    manifest = load_manifest(tmp_path / "out")
    found = {name for name, facts in manifest.splits.items() if facts.documents == 1}
    assert found == {"train_source", "train_target", "validation_source", "validation_target"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--filters", "8"], "--filters 8 has no effect without --speech"),
        (["--speech", "path"], "--speech path: give two names"),
        (["--speech", "a,b", "--tokenizer", ""], "--tokenizer is missing: name a SentencePiece model"),
        (["--speech", "a,b", "--pairs", "a,b"], "--pairs a,b has no effect with --speech"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path: Path, given: list[str], said: str) -> None:
    told = CliRunner().invoke(
        app, ["data", "prepare", "x", "--out", str(tmp_path / "out"), "--tokenizer", "t.model", *given]
    )
    assert isinstance(told.exception, UserError)
    assert said in str(told.exception)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "soundfile" else found(name, *rest)
    )
    with pytest.raises(UserError, match=r"pip install 'fathom\[speech\]'"):
        prepare_speech(SpeechOptions(["x"], tmp_path / "out", tmp_path / "t.model"))


def test_a_damaged_frame_file_is_told(data: tuple[Path, Manifest], tmp_path: Path) -> None:
    prepare_speech(options(data, data[0] / "clips.jsonl", tmp_path / "out"))
    path = tmp_path / "out" / "train_source.bin"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train_source\.bin has another checksum"):
        verify_data(tmp_path / "out")

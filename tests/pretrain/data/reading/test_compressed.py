"""Compressed files: read whole, or said where not."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from tests.pretrain.data.reading.files import TEXTS, json_lines, read

PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), *PACK.items(), (".GZ", gzip.compress)])
def test_json_lines_and_text_files_plain_and_compressed(
    tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(json_lines(TEXTS) + b"\n"))
    (tmp_path / f"b.txt{suffix}").write_bytes(pack(TEXTS[1].encode("utf-8-sig")))
    assert read(tmp_path / f"a.jsonl{suffix}", tmp_path / f"b.txt{suffix}") == ([*TEXTS, TEXTS[1]], [])
    # Several frames, as parallel compressors and `cat` write them, with a line across the border.
    half = len(json_lines(TEXTS)) // 2
    parts = pack(json_lines(TEXTS)[:half]), pack(b""), pack(json_lines(TEXTS)[half:])
    (tmp_path / f"c.jsonl{suffix}").write_bytes(b"".join(parts))
    assert read(tmp_path / f"c.jsonl{suffix}") == (TEXTS, [])


@pytest.mark.parametrize("suffix", PACK)
def test_compressed_files_that_are_cut_or_damaged(tmp_path: Path, suffix: str) -> None:
    """What can be read is, and the rest is one broken record, wherever the file ends."""
    texts = [os.urandom(500).hex() for _ in range(200)]
    frame = PACK[suffix](json_lines(texts))
    path = tmp_path / f"a.jsonl{suffix}"
    for cut in (0, 1, 10, len(frame) // 2, len(frame) - 1):
        path.write_bytes(frame[:cut])
        found, broken = read(path)
        assert found == texts[: len(found)]
        assert [entry.line for entry in broken] == [len(found) + 1 if found else 0]
        assert "unreadable from here on: cut off" in broken[0].reason
    # A whole frame is read, whatever follows it: half a frame, a damaged one, or no frame at all.
    for rest in (frame[:20], b"\xff\xff\xff\xff" + frame[4:], b"plain text"):
        path.write_bytes(frame + rest)
        found, broken = read(path)
        assert found == texts
        assert [entry.line for entry in broken] == [201]
    path.write_bytes(frame[: len(frame) // 2] + b"\0" * 64 + frame[len(frame) // 2 + 64 :])
    assert len(read(path)[1]) >= 1
    (tmp_path / f"b.txt{suffix}").write_bytes(b"plain text")
    assert f"no {suffix} data, or damaged" in read(tmp_path / f"b.txt{suffix}")[1][0].reason

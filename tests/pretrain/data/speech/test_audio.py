"""Recordings that end before their header says, and headers that do not know the end."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.speech.audio import read_clip
from tests.pretrain.clips import spoken

soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed (the extra `speech`)")


def recording(kind: str, words: int = 4) -> bytes:
    """So many times 0.12 s, of 16 bits where it is not compressed."""
    file = io.BytesIO()
    coding = "VORBIS" if kind == "OGG" else "PCM_16"
    soundfile.write(file, spoken(["red"] * words), 16000, format=kind, subtype=coding)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["WAV", "WAVEX", "AIFF", "AU", "W64", "RF64", "FLAC", "CAF"])
def test_half_a_recording_is_no_recording(kind: str) -> None:
    whole = recording(kind)
    assert len(read_clip(whole)) == 4 * 1920
    with pytest.raises(ValueError, match="cut off|no recording that can be read"):
        read_clip(whole[: len(whole) // 2])


@pytest.mark.parametrize("share", [0.5, 0.999])
def test_pages_without_the_last_one_are_no_recording(tmp_path: Path, share: float) -> None:
    """Ogg has no length in its header, but a mark on its last page."""
    whole = recording("OGG", 80)
    assert len(read_clip(whole)) == 80 * 1920
    (tmp_path / "x.ogg").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="cut off: its last page is missing"):
        read_clip(tmp_path / "x.ogg")


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000])
def test_a_length_that_was_written_before_the_end_was_known_is_none(size: int) -> None:
    """What programs write whose output is a pipe."""
    whole = recording("WAV")
    data = whole.index(b"data")
    piped = whole[:4] + struct.pack("<I", size) + whole[8 : data + 4] + struct.pack("<I", size - 36)
    assert np.array_equal(read_clip(piped + whole[data + 8 :]), read_clip(whole))

"""Sound files as samples: WAV, FLAC and whatever else libsndfile reads, by library soundfile."""

from __future__ import annotations

import importlib.util
import io
import re
from math import gcd
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.errors import UserError
from pretrain.data.speech.filterbanks import RATE

HIGHEST_RATE = 1 << 20
"""Samples of a second, above which a header is damaged."""
SIZE = re.compile(r": *(\d+) \(should be (\d+)\)")
"""libsndfile's remark on a header, by bytes: as many as it states, as many as there are."""
UNKNOWN_SIZE = 0x7FFF_0000
"""From here on a stated size is that of a program that wrote to a pipe and did not know the end."""
OGG_PAGE = 27 + 255 + 255 * 255
"""Bytes of the longest page of an Ogg file: a header, lengths of its parts, these parts."""
OGG_LAST = 4
"""The flag of the last one."""
SLACK = 64
"""Bytes, above which a difference of sizes is more than a header that was counted wrongly."""
MISSING = "reading recordings needs the packages soundfile and scipy: pip install 'fathom[speech]'"


def check_installed() -> None:
    """Raises UserError where the libraries that read recordings are missing."""
    if any(importlib.util.find_spec(name) is None for name in ("soundfile", "scipy")):
        raise UserError(MISSING)


def read_clip(source: Path | bytes, longest: float | None = None) -> NDArray[np.float32]:
    """Samples in -1 .. 1 at 16 kHz, the mean of all channels.

    longest: seconds, above which nothing is decoded.
    Raises ValueError for what is no recording, or too long, in one line.
    """
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            rate, count = file.samplerate, file.frames
            if not 0 < rate <= HIGHEST_RATE:
                raise ValueError(f"{rate} samples a second")
            if longest is not None and count > longest * rate:
                raise TooLongError(f"{count / rate:.4g} s, the most is {longest:.4g} s")
            _check_sizes(file.extra_info)
            if file.format == "OGG":
                _check_pages(source)
            samples = file.read(dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        _check_readable(source)
        raise ValueError(f"no recording that can be read: {error.error_string.rstrip('.')}") from None
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
    if len(samples) < count:
        raise ValueError(f"cut off: {len(samples)} of {count} samples")
    mono = samples.mean(1)
    if not np.isfinite(mono).all():
        raise ValueError("samples that are no numbers")
    return resampled(mono, rate)


def _check_sizes(remarks: str) -> None:
    """remarks: libsndfile's on a header. Raises ValueError where the file ends before it says."""
    for stated, held in ((int(one), int(other)) for one, other in SIZE.findall(remarks)):
        if held + SLACK < stated < UNKNOWN_SIZE:
            raise ValueError(f"cut off: {held} of {stated} bytes")


def _check_pages(source: Path | bytes) -> None:
    """Raises ValueError for an Ogg file without its last page, or with a part of that."""
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        file.seek(max(0, file.seek(0, io.SEEK_END) - OGG_PAGE))
        _, mark, page = file.read().rpartition(b"OggS")
    # What follows the mark: version, flags, 20 bytes more, how many parts, the length of each.
    parts = page[23 : 23 + page[22]] if len(page) > 22 else b""
    if not mark or not parts or not page[1] & OGG_LAST or len(page) < 23 + len(parts) + sum(parts):
        raise ValueError("cut off: its last page is missing")


def _check_readable(source: Path | bytes) -> None:
    """Raises ValueError with the reason why a file cannot be opened: libsndfile has none."""
    try:
        if isinstance(source, Path):
            source.open("rb").close()
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None


class TooLongError(ValueError):
    """A recording that is longer than allowed."""


def resampled(samples: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    """The same sound at 16 kHz, by a polyphase filter."""
    if rate == RATE:
        return samples
    from scipy.signal import resample_poly

    shared = gcd(rate, RATE)
    return np.asarray(resample_poly(samples, RATE // shared, rate // shared), dtype=np.float32)

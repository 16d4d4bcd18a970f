"""Compressed files, read to their end or with an error that says why not.

The readers of the standard library and of zstandard each lose something without a word: what
follows a damaged header (bz2, xz), a second frame or a missing end (zstd), an empty file (gzip).
Here all four are read by one rule.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from typing_extensions import Buffer

CHUNK = 1 << 14
"""Compressed bytes read at once: bounds what one call of a decoder may return."""
PIECE = 1 << 20
"""Decompressed bytes of one call, for the decoders that can be told."""
BUFFER = 1 << 18
ZSTD_WINDOW = 1 << 31
"""Largest window accepted: that of `zstd --long=31`, with which archives of text are written."""


class DamagedStreamError(OSError):
    """A compressed file that cannot be read to its end."""


class Decoder(Protocol):
    """Decompresses one frame."""

    @property
    def eof(self) -> bool:
        """Whether the frame has ended."""

    @property
    def unused_data(self) -> bytes:
        """What it was given of what follows the frame."""

    def decompress(self, data: bytes, /) -> bytes:
        """What the next compressed bytes stand for."""


def _zstd() -> Decoder:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()


DECODERS: dict[str, Callable[[], Decoder]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
    ".zst": _zstd,
}
"""Suffix -> decoder of one frame."""


def compression(path: str | Path) -> str | None:
    """The suffix of a compressed file in small letters; None for any other file."""
    suffix = Path(path).suffix.lower()
    return suffix if suffix in DECODERS else None


def open_binary(path: str | Path) -> IO[bytes]:
    """Opens a file for reading, decompressed according to its name. Raises OSError, also later."""
    suffix = compression(path)
    if suffix is None:
        return Path(path).open("rb")
    return cast("IO[bytes]", io.BufferedReader(_Stream(Path(path), suffix), BUFFER))


class _Stream(io.RawIOBase):
    """The content of all frames of a compressed file, one after another."""

    def __init__(self, path: Path, suffix: str) -> None:
        self._file = path.open("rb")
        self._suffix = suffix
        self._decoder: Decoder | None = None
        self._ahead = b""  # read from the file, not yet given to a decoder
        self._piece = memoryview(b"")  # decompressed, not yet asked for
        self._begun = False

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Buffer) -> int:
        if not self._piece:
            self._piece = memoryview(self._next())
        target = memoryview(buffer)
        count = min(len(target), len(self._piece))
        target[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count

    def _next(self) -> bytes:
        """Some more bytes; none at the end. Raises DamagedStreamError."""
        while True:
            if self._decoder is None:
                self._decoder = self._begin()
            if self._decoder is None:
                return b""
            try:
                piece = self._decode(self._decoder)
            except Exception as error:  # four libraries with an error of their own each
                if isinstance(error, DamagedStreamError | MemoryError):
                    raise
                raise DamagedStreamError(f"no {self._suffix} data, or damaged ({error})") from error
            if self._decoder.eof:
                self._ahead, self._decoder = self._decoder.unused_data, None
            if piece:
                return piece

    def _begin(self) -> Decoder | None:
        """Of the next frame, if there is one. Frames may be padded with zeros."""
        ahead = (self._ahead or self._file.read(CHUNK)).lstrip(b"\0")
        while not ahead and (more := self._file.read(CHUNK)):
            ahead = more.lstrip(b"\0")
        if not ahead and self._begun:
            return None
        self._ahead, self._begun = ahead, True
        return DECODERS[self._suffix]()

    def _decode(self, decoder: Decoder) -> bytes:
        if not isinstance(decoder, bz2.BZ2Decompressor | lzma.LZMADecompressor):
            return decoder.decompress(self._input())
        return decoder.decompress(self._input() if decoder.needs_input else b"", PIECE)

    def _input(self) -> bytes:
        data, self._ahead = self._ahead or self._file.read(CHUNK), b""
        if not data:
            raise DamagedStreamError(f"cut off: the file ends in the middle of its {self._suffix} data")
        return data

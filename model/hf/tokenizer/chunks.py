"""Ids of pieces of text that were seen before: most words of a text repeat.

A table look-up is far cheaper than merging pairs. Whoever uses it has cut texts where no token can
reach across.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

CACHE_BYTES = 64 << 20
"""Ids of known chunks kept by one process, by a rough estimate."""


class ChunkTable:
    """Encodes texts that were cut into chunks."""

    def __init__(self, encode: Callable[[list[str]], list[bytes]]) -> None:
        """encode: from chunks to the bytes of their ids."""
        self._encode = encode
        self._known: dict[str, bytes] = {}
        self._size = 0

    def encode(self, texts: Sequence[list[str]]) -> list[bytes]:
        """The bytes of the ids of texts, each given as its chunks."""
        missing = list(set().union(*texts).difference(self._known))
        for chunk, ids in zip(missing, self._encode(missing), strict=True):
            self._known[chunk] = ids
            self._size += 200 + 2 * len(chunk)
        encoded = [b"".join(map(self._known.__getitem__, text)) for text in texts]
        if self._size > CACHE_BYTES:
            self._known.clear()
            self._size = 0
        return encoded

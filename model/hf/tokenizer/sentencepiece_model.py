"""SentencePiece models: text to token ids and back, quick over many documents.

Lossless for every text where the model allows it, as those of `fathom tokenizer train` do.
Nothing here imports torch or Megatron: the processes of `fathom data prepare` load this module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import sentencepiece

from model.errors import UserError
from model.hf.tokenizer.chunks import ChunkTable
from model.hf.tokenizer.kinds import TRAIN, check_texts, token_dtype
from model.hf.tokenizer.special import SPACE_MARK, Role, sentinel_ids, special_pieces

if TYPE_CHECKING:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

SEGMENT_CHARS = 1 << 20
"""Characters handled at once: bounds the memory of splitting a very long document."""
PROBES = ("a b", " a", "a ", "  a   b", "\n\t \r\n", "é 中 😀", "<s> </s> <unk>", "\u00a0\ufb01\uff21\u3000")
"""Texts that models which change text have changed."""

_WORD = r"A-Za-z\x80-\U0010ffff"
# Ways to cut text into chunks, finest first. Whether a boundary lies between two characters depends
# on these two characters alone.
_CHUNKS = (re.compile(rf" *(?:[{_WORD}]+|[0-9]|[^ 0-9{_WORD}]+)| +"), re.compile(r" *[^ ]+| +"))
_BOUNDARY = re.compile(r"[^ ](?= )")  # ends at a place that is a boundary in every entry of _CHUNKS
_BPE = 2  # TrainerSpec.ModelType in a SentencePiece model


@dataclass(frozen=True)
class _Properties:
    """What a model's own settings allow."""

    changes: tuple[str, ...]
    """What it does to text, a phrase each; empty where it keeps every text as it is."""
    pattern: re.Pattern[str] | None
    """Cuts text where no token can reach across."""
    special: dict[Role, int]
    """Ids of special tokens."""
    sentinels: tuple[int, ...]


class SentencePieceModel:
    """A SentencePiece model that was loaded. Its methods are those of `Codec`."""

    def __init__(self, path: Path, content: bytes) -> None:
        """Raises UserError for no SentencePiece model, and for one without an end mark (eos)."""
        self.content = content
        try:
            if not content:
                raise ValueError("no bytes, of which SentencePiece would make a model without pieces")
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=content)
            self.vocab_size: int = self._sp.get_piece_size()
        except (RuntimeError, OSError, ValueError) as error:
            advice = f"not a SentencePiece model file, and no tokenizer.json; {TRAIN}"
            raise UserError(f"tokenizer {path}: {advice}") from error
        self.eod_id: int = self._sp.eos_id()
        if self.eod_id < 0:
            missing = "the model has no eos piece, which marks the end of a document"
            raise UserError(f"tokenizer {path}: {missing}; train it with an eos id")
        self.dtype = token_dtype(self.vocab_size)
        self._table = ChunkTable(
            lambda chunks: [np.array(ids, dtype=self.dtype).tobytes() for ids in self._encode_plain(chunks)]
        )

    def decode(self, ids: list[int]) -> str:
        """As `Codec`."""
        text: str = self._sp.decode(ids)
        return text

    @property
    def padding_id(self) -> int:
        """As `Codec`: with a piece for every byte, no text gives the unknown one."""
        return self.special.get("pad", self._sp.unk_id())

    @property
    def changes(self) -> tuple[str, ...]:
        """As `Codec`."""
        return self.properties.changes

    @property
    def special(self) -> dict[Role, int]:
        """As `Codec`."""
        return self.properties.special

    @property
    def sentinels(self) -> tuple[int, ...]:
        """As `Codec`."""
        return self.properties.sentinels

    def piece(self, index: int) -> str:
        """As `Codec`."""
        name: str = self._sp.id_to_piece(index)
        return name

    def is_control(self) -> np.ndarray:
        """As `Codec`."""
        return np.array(self._sp.is_control(list(range(self.vocab_size))), dtype=bool)

    def token_bytes(self) -> list[bytes]:
        """As `Codec`."""
        parts = []
        for index in range(self.vocab_size):
            piece: str = self._sp.id_to_piece(index)
            if self._sp.is_control(index) or self._sp.is_unknown(index):
                parts.append(b"")
            else:
                parts.append(
                    bytes([int(piece[3:5], 16)])
                    if self._sp.is_byte(index)
                    else piece.replace(SPACE_MARK, " ").encode()
                )
        return parts

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """As `Codec`. The ids of a text do not depend on the others."""
        check_texts(texts)
        if self.properties.pattern is None:
            return [np.array(ids, dtype=self.dtype).tobytes() for ids in self._encode_plain(texts)]
        parts: list[list[bytes]] = [[] for _ in texts]
        for group in _segment_groups(texts):
            for (number, _), ids in zip(
                group,
                self._table.encode([self.properties.pattern.findall(segment) for _, segment in group]),
                strict=True,
            ):
                parts[number].append(ids)
        return [b"".join(document) for document in parts]

    def encode_marked(self, texts: Sequence[str]) -> list[bytes]:
        """As `Codec`. SentencePiece itself finds no special token in a text."""
        if self._names is None:
            return self.encode(texts)
        parts = [self._names.split(text) for text in texts]
        # Texts and names take turns.
        plain = iter(self.encode([part for split in parts for part in split[::2]]))
        return [
            b"".join(self._mark(part) if at % 2 else next(plain) for at, part in enumerate(split))
            for split in parts
        ]

    @cached_property
    def _names(self) -> re.Pattern[str] | None:
        """Finds names of special tokens; None where there are none."""
        names = [self.piece(int(index)) for index in np.flatnonzero(self.is_control())]
        longest_first = sorted(names, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if names else None

    def _mark(self, name: str) -> bytes:
        return np.array([self._sp.piece_to_id(name)], dtype=self.dtype).tobytes()

    def _encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes with one call of the library.

        Except for texts that hold the space mark, whose bytes are spelt out.
        """
        encoded: list[list[int]] = self._sp.encode(list(texts), out_type=int, num_threads=1) if texts else []
        if not self.changes:
            mark = [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
            for number, text in enumerate(texts):
                if SPACE_MARK in text:
                    parts = [self._sp.encode(part, out_type=int) for part in text.split(SPACE_MARK)]
                    encoded[number] = parts[0] + [index for part in parts[1:] for index in (*mark, *part)]
        return encoded

    @cached_property
    def properties(self) -> _Properties:
        """Reads the model's settings.

        Byte-pair merging joins two neighbours only into a piece of the vocabulary. If no piece
        crosses a boundary of a chunk pattern, no merge does either, and encoding chunk by chunk
        gives exactly the ids of encoding the whole.
        Unigram models are left whole: the result would be the same up to ties of rounded scores.
        """
        from sentencepiece import sentencepiece_model_pb2

        model = sentencepiece_model_pb2.ModelProto()
        model.ParseFromString(self.content)
        changes = self._changes(model)
        pattern = None
        neutral = not any(present for present, _ in _normalisation(model))
        escaped = model.normalizer_spec.escape_whitespaces
        if neutral and escaped and model.trainer_spec.model_type == _BPE:
            kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
            text_kinds = (kinds.NORMAL, kinds.USER_DEFINED, kinds.UNUSED)
            pieces = [
                entry.piece.replace(SPACE_MARK, " ") for entry in model.pieces if entry.type in text_kinds
            ]
            fitting = (each for each in _CHUNKS if all(each.fullmatch(piece) for piece in pieces))
            pattern = next(fitting, None)
        special = {role: number for role, (_, number) in special_pieces(model).items()}
        return _Properties(changes, pattern, special, sentinel_ids(model))

    def _changes(self, model: ModelProto) -> tuple[str, ...]:
        """What the model does to text, by its settings; and by trying, where these show nothing."""
        changes = [words for present, words in _normalisation(model) if present]
        if sum(self._sp.is_byte(index) for index in range(self.vocab_size)) < 256:
            changes.append("has no piece for every byte, so that unknown characters are lost")
        if model.normalizer_spec.escape_whitespaces and SPACE_MARK not in {
            entry.piece for entry in model.pieces
        }:
            changes.append("has no piece for a space")
        if not changes and any(self._sp.decode(self._sp.encode(text)) != text for text in PROBES):
            changes.append("does not give every text back")
        return tuple(changes)


def _normalisation(model: ModelProto) -> tuple[tuple[bool, str], ...]:
    """Whether each setting that changes text is on, and what it does."""
    normalizer, denormalizer = model.normalizer_spec, model.denormalizer_spec
    return (
        (bool(normalizer.precompiled_charsmap), f"normalises characters ({normalizer.name})"),
        (normalizer.add_dummy_prefix, "adds a space before each document"),
        (normalizer.remove_extra_whitespaces, "merges and strips spaces"),
        (bool(denormalizer.precompiled_charsmap), "denormalises what it decodes"),
    )


def _segment_groups(texts: Sequence[str]) -> Iterator[list[tuple[int, str]]]:
    """Yields lists of (text number, part of that text), each list about SEGMENT_CHARS long.

    Parts end where chunks end.
    """
    group: list[tuple[int, str]] = []
    size = 0
    for number, text in enumerate(texts):
        start = 0
        while start < len(text):
            cut = (
                _BOUNDARY.search(text, start + SEGMENT_CHARS - 1)
                if len(text) - start > SEGMENT_CHARS
                else None
            )
            stop = cut.end() if cut else len(text)
            group.append((number, text[start:stop]))
            size += stop - start
            start = stop
            if size >= SEGMENT_CHARS:
                yield group
                group, size = [], 0
    if group:
        yield group

"""Text to token ids and back, with a tokenizer of any kind; quick over many documents.

Nothing here imports torch or Megatron: the processes of `fathom data prepare` load this module.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from model.hf.tokenizer.kinds import Codec, token_dtype
from model.hf.tokenizer.special import Role
from model.hf.tokenizer.table import find_tokenizer, read_tokenizer


class Tokenizer:
    """A tokenizer's file, of whichever kind.

    `decode(encode(text)) == text` for every Unicode text if `fathom tokenizer train` wrote it.
    """

    def __init__(self, path: str | Path) -> None:
        """Loads a file, the tokenizer of a folder, or one of the Hub by its name.

        Raises UserError when there is none, it is damaged, or defines no end-of-document id.
        """
        self.path = find_tokenizer(path)
        self.kind, content, beside = read_tokenizer(self.path)
        self.files: dict[str, bytes] = {self.kind.file: content, **beside}
        """What a data set keeps of it, by names."""
        self.codec: Codec = self.kind.load(self.path, content, beside)
        self.sha256: str = hashlib.sha256(content).hexdigest()
        """Of the tokenizer's own file."""
        self.vocab_size, self.eod_id = self.codec.vocab_size, self.codec.eod_id
        self.dtype = token_dtype(self.vocab_size)

    def copy_to(self, folder: Path) -> Path:
        """Writes it into a data set. Returns its file there."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return folder / self.kind.file

    def encode(self, text: str, marked: bool = False) -> list[int]:
        """Returns the ids of a text, without an end mark.

        marked: whether the name of a special token in it stands for that token; it is text without.
        Raises UnicodeEncodeError for text that UTF-8 cannot hold (lone surrogates).
        """
        found = self.encode_documents([text], marked)[0]
        ids: list[int] = np.frombuffer(found, dtype=self.dtype).tolist()
        return ids

    def encode_documents(self, texts: Sequence[str], marked: bool = False) -> list[bytes]:
        """Encodes many texts: for each the bytes of its ids, of `self.dtype`, without an end mark.

        The ids of a text do not depend on the others. Raises UnicodeEncodeError as `encode` does.
        """
        return self.codec.encode_marked(texts) if marked else self.codec.encode(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids; the end mark decodes to nothing.

        Raises IndexError for an id outside the vocabulary.
        """
        return self.codec.decode([int(index) for index in ids])

    @property
    def lossless(self) -> bool:
        """Whether the ids of every text spell that very text."""
        return not self.codec.changes

    @property
    def changes(self) -> tuple[str, ...]:
        """What the tokenizer does to text, a phrase each; empty where it is lossless."""
        return self.codec.changes

    @property
    def special(self) -> Mapping[Role, int]:
        """Ids of the special tokens that it has, by what they are for."""
        return self.codec.special

    @property
    def sentinels(self) -> tuple[int, ...]:
        """Ids of the tokens that stand for hidden spans, in order."""
        return self.codec.sentinels

    def piece(self, index: int) -> str:
        """Returns the name of a token, such as [MASK]."""
        return self.codec.piece(index)

    def is_control(self) -> np.ndarray:
        """Returns for each id of the vocabulary, [v] bool, whether no text contains it."""
        return self.codec.is_control()

    def token_bytes(self) -> list[bytes]:
        """Returns what each id adds to a text, in UTF-8; b"" for ids that are no text.

        The end mark is one of those.
        """
        return self.codec.token_bytes()

"""What a kind of tokenizer has to offer. The kinds themselves: `table.py`.

Nothing here imports torch: the processes of `fathom data prepare` load this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from model.hf.tokenizer.special import Role

if TYPE_CHECKING:
    from model.hf.tokenizer.convert import TokenIds
    from model.hf.tokenizer.settings import Use

TRAIN = "`fathom tokenizer train` writes one"


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """Returns the element type of a .bin file for a vocabulary, by Megatron-core's rule.

    That is DType.optimal_dtype.
    """
    return np.uint16 if vocab_size < 65500 else np.int32


class Codec(Protocol):
    """A tokenizer that was loaded."""

    vocab_size: int
    """One more than the largest id."""
    eod_id: int
    """The end mark of a document."""

    @property
    def padding_id(self) -> int:
        """What fills a text up: the token for it, or another that no text needs."""

    @property
    def special(self) -> Mapping[Role, int]:
        """Ids of the special tokens that there are, by what they are for."""

    @property
    def sentinels(self) -> tuple[int, ...]:
        """Ids of the tokens that stand for hidden spans, in order."""

    @property
    def changes(self) -> tuple[str, ...]:
        """What it does to text, a phrase each; empty where every text comes back as it was."""

    def decode(self, ids: list[int]) -> str:
        """The text of ids; special tokens are none. Raises IndexError beyond the vocabulary."""

    def piece(self, index: int) -> str:
        """The name of a token, such as [MASK]."""

    def is_control(self) -> np.ndarray:
        """For each id of the vocabulary, [v] bool, whether no text contains it."""

    def token_bytes(self) -> list[bytes]:
        """What each id adds to a text, in UTF-8; b"" for ids that are no text."""

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """For each text the bytes of its ids, of `token_dtype`. Names of special tokens are text.

        Raises UnicodeEncodeError for text that UTF-8 cannot hold (lone surrogates).
        """

    def encode_marked(self, texts: Sequence[str]) -> list[bytes]:
        """The same, but the name of a special token stands for that token."""


def check_texts(texts: Iterable[str]) -> None:
    """Raises UnicodeEncodeError for text that UTF-8 cannot hold.

    What the libraries say of lone surrogates does not tell what is wrong.
    """
    for text in texts:
        if not text.isascii():
            text.encode()


def read_beside(path: Path, names: Sequence[str], beside: Sequence[str]) -> dict[str, bytes]:
    """The files `beside` a tokenizer that are there, by name; none if its own is not of `names`."""
    found = [path.parent / name for name in beside if path.name in names]
    return {each.name: each.read_bytes() for each in found if each.is_file()}


@dataclass(frozen=True)
class TokenizerKind:
    """One kind. All that the rest of the code knows about it."""

    what: str
    """With its article, for messages."""
    names: tuple[str, ...]
    """What its file is called in Hugging Face folders. Data sets and checkpoints use the first."""
    beside: tuple[str, ...]
    """Files of the same folder that belong to it, where they are there."""
    package: str
    """What reads it, whose version a data set records."""
    holds: Callable[[str, bytes], bool]
    """Whether a file of this name and content is of this kind, be it damaged."""
    load: Callable[[Path, bytes, Mapping[str, bytes]], Codec]
    """From a path (for messages), the file's content and those beside it, by name.

    Raises UserError in one line for what is damaged or cannot be used.
    """
    obstacle: Callable[[Path], str]
    """Why no export can have an equal tokenizer; empty if one can. UserError where damaged."""
    write: Callable[[Path, Path, int, Use], TokenIds]
    """Writes the tokenizer of an export: file, folder, longest text, what it is for."""
    prove: Callable[[Path, Path, Iterable[str], bool], int]
    """Compares the tokenizer of an export with the file, on texts; last whether to trust code.

    Returns how many texts have another segmentation of the same score.
    """

    @property
    def file(self) -> str:
        """Its name in data sets and checkpoints."""
        return self.names[0]

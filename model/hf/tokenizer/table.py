"""The kinds of tokenizers there are, and where a tokenizer's file is.

Another kind is a file beside this one and an entry of KINDS.
Nothing here imports torch: the processes of `fathom data prepare` load this module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import UserError
from model.hf.hub import download
from model.hf.tokenizer.kinds import TRAIN, TokenizerKind, read_beside
from model.hf.tokenizer.sentencepiece_model import SentencePieceModel
from model.hf.tokenizer.tokenizer_json import BESIDE, FILE, TokenizerJson, holds
from model.words import printable

if TYPE_CHECKING:
    from model.hf.tokenizer.convert import TokenIds
    from model.hf.tokenizer.settings import Use


def _sentencepiece(path: Path, content: bytes, beside: Mapping[str, bytes]) -> SentencePieceModel:
    return SentencePieceModel(path, content)


def _obstacle(path: Path) -> str:
    from model.hf.tokenizer.convert import no_equal, parse

    return no_equal(parse(path))


def _convert(path: Path, folder: Path, max_length: int, use: Use) -> TokenIds:
    from model.hf.tokenizer.convert import write_tokenizer

    return write_tokenizer(path, folder, max_length, use)


def _prove_converted(path: Path, folder: Path, texts: Iterable[str], trust: bool) -> int:
    from model.hf.tokenizer.proof import prove

    return prove(path, folder, texts, trust)


def _carry(path: Path, folder: Path, max_length: int, use: Use) -> TokenIds:
    from model.hf.tokenizer.carry import carry

    return carry(path, folder, max_length, use)


def _prove_carried(path: Path, folder: Path, texts: Iterable[str], trust: bool) -> int:
    from model.hf.tokenizer.carry import prove

    return prove(path, folder, texts, trust)


SENTENCEPIECE = TokenizerKind(
    what="a SentencePiece model",
    names=("tokenizer.model", "spiece.model"),
    beside=(),
    package="sentencepiece",
    # The first field of the format, pieces, begins with the byte of a line end.
    holds=lambda name, content: name.endswith((".model", ".spm")) or content[:1] == b"\n",
    load=_sentencepiece,
    obstacle=_obstacle,
    write=_convert,
    prove=_prove_converted,
)
TOKENIZER_JSON = TokenizerKind(
    what=f"a {FILE}",
    names=(FILE,),
    beside=BESIDE,
    package="tokenizers",
    holds=holds,
    load=TokenizerJson,
    obstacle=lambda path: "",  # it is copied
    write=_carry,
    prove=_prove_carried,
)
KINDS: tuple[TokenizerKind, ...] = (SENTENCEPIECE, TOKENIZER_JSON)
"""In the order in which a folder that has several is searched."""
FILES = tuple(name for kind in KINDS for name in (*kind.names, *kind.beside))
"""All that tokenizers of Hugging Face folders consist of, for those kinds."""
LARGEST = 1 << 28
"""Bytes of the largest file that is read. Those of 250,000 pieces have a tenth of it."""
_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w.-]+)?", re.ASCII)
_WHAT = " or ".join(kind.what for kind in KINDS)


def find_tokenizer(given: str | Path) -> Path:
    """The file of a tokenizer: itself, in a folder, or of a model of the Hub by its name.

    A name is `hf://NAME`, or NAME where there is no such file and it does not look like one.
    Raises UserError where a folder has none, and where the Hub gives none.
    """
    name = str(given)
    if name.startswith("hf:/"):  # one slash is what a Path leaves of two
        return _of_hub(name.removeprefix("hf:").lstrip("/"))
    path = Path(given)
    if path.is_dir():
        found = tokenizer_in(path)
        if found is None:
            names = ", ".join(name for kind in KINDS for name in kind.names)
            raise UserError(f"tokenizer {path}: the folder has none of {names}; name {_WHAT}")
        return found
    looks_like_file = path.suffix in {".model", ".json", ".spm"} or name.startswith((".", "/", "~"))
    if path.exists() or looks_like_file or not _HUB_NAME.fullmatch(name):
        return path
    return _of_hub(name)


def _of_hub(name: str) -> Path:
    try:
        found = tokenizer_in(download(name, FILES))
    except UserError as error:
        raise UserError(f"tokenizer: {error}; name {_WHAT}") from error
    if found is None:
        raise UserError(f"tokenizer {printable(name)}: the Hub has none of {', '.join(FILES)} there")
    return found


def _look(folder: Path, name: str) -> Path | None:
    path = folder / name
    return path if path.is_file() else None


def tokenizer_in(folder: Path, look: Callable[[Path, str], Path | None] = _look) -> Path | None:
    """The file of the tokenizer in a folder, None where there is none.

    Where there are several, it is the first that an export could have, in the order of KINDS:
    a tokenizer.json is often made of the SentencePiece model beside it, seldom the other way.
    look: from folder and name to a file; None where there is none. May refuse one.
    Raises UserError for a damaged file.
    """
    found = [
        (kind, path)
        for kind in KINDS
        if (path := next((path for name in kind.names if (path := look(folder, name))), None))
    ]
    if len(found) < 2:
        return found[0][1] if found else None
    return next((path for kind, path in found if not kind.obstacle(path)), found[0][1])


def tokenizer_file(folder: str | Path) -> Path:
    """The tokenizer's file in a data set or checkpoint, which has one; its usual name without."""
    paths = [Path(folder) / kind.file for kind in KINDS]
    return next((path for path in paths if path.exists()), paths[0])


def read_tokenizer(path: Path) -> tuple[TokenizerKind, bytes, dict[str, bytes]]:
    """The kind of a file, its content, and the files beside it that belong to it, by name.

    Raises UserError for a file that is missing, no regular one, too large, or of no kind.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"tokenizer {path}: no regular file; name {_WHAT}")
        if path.stat().st_size > LARGEST:
            raise UserError(
                f"tokenizer {path}: too large for one ({path.stat().st_size} bytes); name {_WHAT}"
            )
        content = path.read_bytes()
        kind = next((kind for kind in KINDS if kind.holds(path.name, content)), None)
        if kind is None:
            raise UserError(f"tokenizer {path}: neither {_WHAT.replace(' or ', ' nor ')}; {TRAIN}")
        return kind, content, read_beside(path, kind.names, kind.beside)
    except OSError as error:
        advice = f"name {_WHAT}, for example one from `fathom tokenizer train`"
        raise UserError(f"tokenizer {path}: {error.strerror}; {advice}") from error


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """What a data set or checkpoint keeps of a tokenizer: the content of files by their names.

    Raises UserError as `read_tokenizer` does.
    """
    kind, content, beside = read_tokenizer(path)
    return {kind.file: content, **beside}


def vocabulary(path: Path) -> int:
    """Size of a tokenizer's vocabulary. Raises UserError as `read_tokenizer` and `load` do."""
    kind, content, beside = read_tokenizer(path)
    return kind.load(path, content, beside).vocab_size

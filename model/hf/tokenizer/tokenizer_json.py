"""Hugging Face's tokenizer.json: text to token ids and back, by the `tokenizers` library.

What its special tokens are for stands in tokenizer_config.json beside it, or follows from their
names.
Nothing here imports torch or Megatron: the processes of `fathom data prepare` load this module.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from model.errors import UserError
from model.hf.tokenizer.chunks import ChunkTable
from model.hf.tokenizer.kinds import TRAIN, check_texts, read_beside, token_dtype
from model.hf.tokenizer.special import ENDS, SENTINEL, SPECIAL, USUAL, Role, names_mask
from model.words import printable

FILE, SETTINGS, MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
BESIDE = (SETTINGS, MAP, "chat_template.jinja")
"""Files that belong to it."""
PROBES = ("a b", " a", "a ", "  a   b", "\n\t \r\n", "é 中 😀", "e\u0301 \ufb01\uff21\u3000", "Aa \u2581")
"""Texts that tokenizers which change text have changed."""
# Where no word of GPT-2's pattern reaches across, in ASCII.
_SIGN = r"!-&(-/:-@\[-`{-~"
_BOUNDARY = re.compile(rf"(?<=[!-~])(?=[ \n])|(?<=[A-Za-z])(?=['{_SIGN}])|(?<=[{_SIGN}])(?=[A-Za-z])")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenizerJson:
    """A tokenizer.json that was loaded. Its methods are those of `Codec`."""

    def __init__(self, path: Path, content: bytes, beside: Mapping[str, bytes]) -> None:
        """beside: contents of tokenizer_config.json and special_tokens_map.json, where there are.

        Raises UserError for what is damaged, draws merges by chance, or has no end mark.
        """
        self._json = _object(path, content)
        self._tokenizer = _loaded(path, content, self._json)
        entries = self._tokenizer.get_vocab(with_added_tokens=True)
        self._ids: dict[str, int] = entries
        self.vocab_size = max(entries.values(), default=-1) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        number = self._part("model").get("unk_id")
        self._unknown = self.piece(number) if number is not None else self._part("model").get("unk_token")
        self._special = {index: token.content for index, token in added.items() if token.special}
        self._texts = {index: token.content for index, token in added.items() if not token.special}
        self.roles = self._roles(path, _settings(path, beside))
        self.eod_id = self.roles.pop("eos")
        self.dtype = token_dtype(self.vocab_size)
        self._table = ChunkTable(lambda chunks: self._ids_of(self._reader, chunks))

    @classmethod
    def open(cls, path: Path) -> TokenizerJson:
        """From the files themselves."""
        return cls(path, path.read_bytes(), read_beside(path, (FILE,), BESIDE))

    def _part(self, name: str) -> dict[str, Any]:
        part = self._json.get(name)
        return part if isinstance(part, dict) else {}

    def _roles(self, path: Path, settings: Mapping[str, str]) -> dict[str, int]:
        """Ids by what they are for; "eos" is always there."""
        known = set(self._special.values())
        names: dict[str, str | None] = {
            role: settings.get(special.setting) for role, special in SPECIAL.items()
        }
        for role, usual in USUAL.items():
            names[role] = names[role] or next((name for name in usual if name in known), None)
        names["mask"] = names["mask"] or next(filter(names_mask, sorted(known)), None)
        names["eos"] = settings.get("eos_token") or settings.get("sep_token")
        names["eos"] = names["eos"] or next((name for name in ENDS if name in known), None)
        if names["eos"] is None:
            raise UserError(
                f"tokenizer {path}: nothing says which token ends a document: put a {SETTINGS} with "
                f"eos_token beside it, in a folder where it is called {FILE}"
            )
        for key, name in names.items():
            if name is not None and name not in self._ids:
                raise UserError(
                    f"tokenizer {path}: {SETTINGS} says {key}={printable(name)}, which is no token of it"
                )
        return {role: self._ids[name] for role, name in names.items() if name is not None}

    @property
    def special(self) -> dict[Role, int]:
        """As `Codec`."""
        return {role: self.roles[role] for role in SPECIAL if role in self.roles}

    @property
    def padding_id(self) -> int:
        """As `Codec`."""
        return self.roles.get("pad", self.eod_id)

    @cached_property
    def sentinels(self) -> tuple[int, ...]:
        """As `Codec`."""
        known = set(self._special.values())
        names = takewhile(known.__contains__, map(SENTINEL.format, count()))
        return tuple(self._ids[name] for name in names)

    def piece(self, index: int) -> str:
        """As `Codec`."""
        return self._tokenizer.id_to_token(index) or ""

    def id_of(self, name: str) -> int | None:
        """The id of a token by its name; None where there is none."""
        return self._ids.get(name)

    def ids(self, text: str) -> list[int]:
        """The ids of a text, as data sets have them."""
        found: list[int] = np.frombuffer(self.encode([text])[0], dtype=self.dtype).tolist()
        return found

    def keeps(self, text: str) -> bool:
        """Whether a text has a name of a special token that the file alone would not keep text."""
        return any(name in text for name in self._taken)

    def is_control(self) -> np.ndarray:
        """As `Codec`. What is unknown may stand for a text."""
        control = np.zeros(self.vocab_size, dtype=bool)
        control[[index for index, name in self._special.items() if name != self._unknown]] = True
        control[[self.eod_id, *self.roles.values()]] = True
        return control

    def decode(self, ids: list[int]) -> str:
        """As `Codec`."""
        for index in ids:
            if not 0 <= index < self.vocab_size:
                raise IndexError(f"token {index} in a vocabulary of {self.vocab_size}")
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """As `Codec`."""
        check_texts(texts)
        if not self._cuts:
            return self._ids_of(self._reader, texts)
        return self._table.encode([_BOUNDARY.split(text) for text in texts])

    @cached_property
    def _cuts(self) -> bool:
        """Whether a text may be cut at _BOUNDARY without moving an id.

        GPT-2's pattern lets no word have white space behind a character, or letters beside signs
        (but after an apostrophe), and looks no further than to the next word. So it is for
        byte-level merges of such words, with nothing done to the text before.
        """
        steps = self._part("pre_tokenizer")
        words = [
            step
            for step in steps.get("pretokenizers") or [steps]
            if step != {"type": "Digits", "individual_digits": step.get("individual_digits")}
        ]
        own = [{key: step.get(key) for key in ("type", "add_prefix_space", "use_regex")} for step in words]
        plain = own == [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]
        merges = self._part("model").get("type") == "BPE" and not self._json.get("normalizer")
        return plain and merges and not self._texts and not self._taken

    def encode_marked(self, texts: Sequence[str]) -> list[bytes]:
        """As `Codec`."""
        check_texts(texts)
        self._tokenizer.encode_special_tokens = False
        try:
            return self._ids_of(self._tokenizer, texts)
        finally:
            self._tokenizer.encode_special_tokens = True

    def _ids_of(self, tokenizer: Tokenizer, texts: Sequence[str]) -> list[bytes]:
        found = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(each.ids, dtype=self.dtype).tobytes() for each in found]

    @cached_property
    def _taken(self) -> tuple[str, ...]:
        """Names of special tokens that as text give that very token."""
        names = {index: name for index, name in self._special.items() if name != self._unknown}
        texts = [f"{name} {name}a {name}" for name in names.values()]
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return tuple(
            name for (index, name), each in zip(names.items(), found, strict=True) if index in each.ids
        )

    @cached_property
    def _reader(self) -> Tokenizer:
        """What reads texts in which names of special tokens are text.

        A unigram model takes the name "<s>" for the piece "<s>", and a list of words the word. Here
        such pieces have names that no text has. All else, ids and scores, is as it was.
        """
        if not self._taken:
            return self._tokenizer
        hidden = {name: f"\U0010fffd{name}\U0010fffd" for name in self._taken}
        model, added = self._part("model"), self._json["added_tokens"]
        entries = model.get("vocab", ())
        if isinstance(entries, dict):
            vocab: object = {hidden.get(piece, piece): index for piece, index in entries.items()}
        else:
            vocab = [[hidden.get(piece, piece), score] for piece, score in entries]
        tokens = [{**token, "content": hidden.get(token["content"], token["content"])} for token in added]
        changed = {**self._json, "model": {**model, "vocab": vocab}, "added_tokens": tokens}
        try:
            tokenizer = Tokenizer.from_str(json.dumps(changed))
        except Exception:  # merges that name such a piece
            return self._tokenizer
        _as_text(tokenizer)
        return tokenizer

    @cached_property
    def changes(self) -> tuple[str, ...]:
        """As `Codec`: by its settings, and by trying, where these show nothing."""
        kinds = _types(self._part("normalizer"))
        changes = [f"normalises text ({', '.join(kinds)})"] if kinds else []
        for name in self._taken:
            if self._ids[name] in self._reader.encode(name, add_special_tokens=False).ids:
                changes.append(f"takes the text {printable(name)!r} for a special token")
        if not changes and any(self._round_trip(text) != text for text in PROBES):
            changes.append("does not give every text back")
        return tuple(changes)

    def _round_trip(self, text: str) -> str:
        return self.decode(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def token_bytes(self) -> list[bytes]:
        """As `Codec`. Beside a byte-level vocabulary: what it adds after another token."""
        control = self.is_control()
        decoders = _types(self._part("decoder"))
        if "ByteLevel" in decoders:
            return [b"" if control[index] else self._spelt(index) for index in range(self.vocab_size)]
        anchor = next(
            (
                index
                for index in range(self.vocab_size)
                if not control[index] and self.decode([index]).strip()
            ),
            self.eod_id,
        )
        before = len(self.decode([anchor]))
        both = self._tokenizer.decode_batch([[anchor, index] for index in range(self.vocab_size)])
        parts = [text[before:].encode() for text in both]
        for index in range(self.vocab_size):
            byte = _BYTE.fullmatch(self.piece(index)) if "ByteFallback" in decoders else None
            if control[index]:
                parts[index] = b""
            elif byte is not None:
                parts[index] = bytes([int(byte[1], 16)])
        return parts

    def _spelt(self, index: int) -> bytes:
        """What a piece of a byte-level vocabulary spells."""
        if index in self._texts:
            return self._texts[index].encode()
        piece = "" if index in self._special else self.piece(index)
        try:
            return bytes(map(BYTES.__getitem__, piece))
        except KeyError:
            return piece.encode()


def _bytes() -> dict[str, int]:
    """GPT-2's letters for bytes: itself where it is printable, else one from U+0100 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + at): byte for at, byte in enumerate(others)}


BYTES = _bytes()


def _types(part: Mapping[str, Any]) -> list[str]:
    """Types of a part of the file, of those in a sequence each."""
    inner = [
        found
        for key in ("decoders", "normalizers", "pretokenizers")
        for one in part.get(key) or ()
        for found in _types(one)
    ]
    return inner or ([str(part["type"])] if part.get("type") not in (None, "Sequence") else [])


def _as_text(tokenizer: Tokenizer) -> None:
    """Makes a tokenizer read whole texts, in which names of special tokens are text."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True


def _object(path: Path, content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"tokenizer {path} is damaged ({printable(error)}): copy it again; {TRAIN}") from None
    return found


def _loaded(path: Path, content: bytes, parsed: Mapping[str, Any]) -> Tokenizer:
    """Raises UserError for a file that the library does not read."""
    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # panics of the library are no Exception
        reason = printable(error)
        raise UserError(f"tokenizer {path} is no {FILE} ({reason}): copy it again; {TRAIN}") from None
    model = parsed.get("model")
    if isinstance(model, dict) and model.get("dropout"):
        raise UserError(f"tokenizer {path} draws its merges by chance (dropout): set model.dropout to null")
    _as_text(tokenizer)
    return tokenizer


def _settings(path: Path, beside: Mapping[str, bytes]) -> dict[str, str]:
    """Names of special tokens by their keys in tokenizer_config.json, which goes first."""
    found: dict[str, str] = {}
    for file in (MAP, SETTINGS):
        if file not in beside:
            continue
        for key, value in _object(path.parent / file, beside[file]).items():
            name = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(name, str) and name:
                found[key] = name
    # What begins a document goes by two names; with none of its own, it is what ends one.
    if found.get("bos_token") != found.get("eos_token") and "bos_token" in found:
        found.setdefault("cls_token", found["bos_token"])
    return found


def holds(name: str, content: bytes) -> bool:
    """Whether a file is a tokenizer.json, be it damaged."""
    return name.endswith(".json") or content.lstrip()[:1] == b"{"

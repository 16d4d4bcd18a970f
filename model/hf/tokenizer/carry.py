"""A tokenizer.json in an export: copied, told what the model needs, and proved.

What is changed: the name of the class (that both transformers 4 and 5 load as "use tokenizer.json
as it is"), what it hands to the model, and the marks around a text where the model was trained
with others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from model.hf.tokenizer.convert import TokenIds
from model.hf.tokenizer.kinds import read_beside
from model.hf.tokenizer.proof import AS_TEXT, TokenizerProofError, difference, fuzz, read_as
from model.hf.tokenizer.settings import Use, marks_around
from model.hf.tokenizer.special import settings_of
from model.hf.tokenizer.tokenizer_json import BESIDE, FILE, SETTINGS, TokenizerJson

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def carry(path: Path, folder: Path, max_length: int, use: Use) -> TokenIds:
    """Writes the files of a tokenizer.json into an export.

    max_length: tokens of the longest text. use: what it is for.
    """
    content, beside = path.read_bytes(), read_beside(path, (FILE,), BESIDE)
    codec = TokenizerJson(path, content, beside)
    for name, data in {FILE: content, **beside}.items():
        (folder / name).write_bytes(data)
    _mark(codec, folder / FILE, content, use)
    given = json.loads(beside.get(SETTINGS, b"{}"))
    given.pop("auto_map", None)  # names code of another folder
    end = codec.piece(codec.eod_id)
    usual = {
        "eos_token": end,
        "pad_token": end,
        **settings_of({role: (codec.piece(i), i) for role, i in codec.special.items()}, codec.special),
        "padding_side": "left" if use.decoder else "right",
        "model_max_length": max_length,
    }
    if not use.encoder:
        usual.setdefault("bos_token", end)
    settings = {
        **usual,
        **given,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": use.input_names,
        "clean_up_tokenization_spaces": False,
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return TokenIds(codec.vocab_size, _ids(codec, settings, use))


def _ids(codec: TokenizerJson, settings: dict[str, object], use: Use) -> dict[str, int | None]:
    """By their names in config.json."""
    end, pad = codec.eod_id, codec.padding_id
    if use.encoder:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": pad}
    if use.pairs:
        ids = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": pad}
        return {**ids, "decoder_start_token_id": end}
    begin = settings.get("bos_token")
    name = begin.get("content") if isinstance(begin, dict) else begin
    found = codec.id_of(str(name)) if name else None
    return {"bos_token_id": end if found is None else found, "eos_token_id": end, "pad_token_id": pad}


def _mark(codec: TokenizerJson, path: Path, content: bytes, use: Use) -> None:
    """Sets the marks around texts that the model was trained with, where it has others.

    A decoder's are left as they are.
    """
    from tokenizers import Tokenizer, processors

    if use.decoder:
        return
    special = codec.special
    begin = special.get("cls") if use.encoder else None
    wanted = ([begin] if begin is not None else []), [codec.eod_id]
    tokenizer: Tokenizer = Tokenizer.from_str(content.decode())
    inner = tokenizer.encode("a", add_special_tokens=False).ids
    if tokenizer.encode("a").ids == [*wanted[0], *inner, *wanted[1]]:
        return
    names = [[(codec.piece(index), index) for index in part] for part in wanted]
    tokenizer.post_processor = processors.TemplateProcessing(**marks_around(*names))
    tokenizer.save(str(path))


def prove(path: Path, folder: Path, texts: Iterable[str], trust: bool) -> int:
    """Compares the tokenizer that transformers loads from an export with the one of the data.

    Ids and the text that they decode to, on texts that have found differences. Texts are left out
    in which only we keep the name of a special token text (`TokenizerJson.keeps`).
    Returns 0: no text has two segmentations of the same score.
    Raises TokenizerProofError naming the first text that differs.
    """
    from transformers import AutoTokenizer

    ours = TokenizerJson.open(path)
    fast = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    what = f"the exported tokenizer of {path}{read_as(fast)}"
    for text in (*fuzz([ours.piece(index) for index in range(ours.vocab_size)]), *texts):
        if ours.keeps(text):
            continue
        wanted, got = ours.ids(text), fast.encode(text, **AS_TEXT)
        if wanted != got:
            theirs = f"gives other ids for {text!r}: {difference(wanted, got)}"
            raise TokenizerProofError(f"{what} {theirs}")
        decoded = fast.decode(wanted, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if decoded != ours.decode(wanted):
            theirs = (
                f"decodes the ids of {text!r} to {decoded!r}, that of the data to {ours.decode(wanted)!r}"
            )
            raise TokenizerProofError(f"{what} {theirs}")
    return 0

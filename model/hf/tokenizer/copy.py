"""The tokenizer of a Hugging Face folder, taken over as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from model.errors import UserError
from model.hf.settings.write import SPECIAL
from model.hf.source import source_file
from model.hf.tokenizer.settings import Use
from model.records import read_json
from model.words import printable

SETTINGS = "tokenizer_config.json"
ADVICE = "name another Hugging Face folder, auto or none"
COPIED = (
    "tokenizer.json",
    SETTINGS,
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "source.spm",
    "target.spm",
    "chat_template.jinja",
)
"""Files of which tokenizers of Hugging Face folders consist."""


def copy_tokenizer(
    source: Path, folder: Path, vocab_size: int, use: Use | None = None
) -> dict[str, int | None]:
    """Copies the tokenizer of a Hugging Face folder, all but the names of what it hands to a model.

    use: what it is for; a decoder where None.
    Returns its special ids by the names in SPECIAL.
    Raises UserError where the folder has none that transformers loads without executing code of the
    folder, or it has ids that a model of `vocab_size` tokens has no row for.
    """
    from transformers import AutoTokenizer

    found = {name: path for name in COPIED if (path := source_file(source, name))}
    if SETTINGS not in found:
        raise UserError(f"tokenizer {source} is no folder with a {SETTINGS}: {ADVICE}")
    for name, path in found.items():
        shutil.copyfile(path, folder / name)
    _name_inputs(found[SETTINGS], folder / SETTINGS, (use or Use()).input_names)
    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        largest = max(loaded.get_vocab().values(), default=-1)
        special = {key: getattr(loaded, key) for key in SPECIAL}
    except Exception as error:  # transformers and tokenizers raise all kinds, bare Exception among them
        reason = printable((str(error).splitlines() or [type(error).__name__])[0])
        raise UserError(
            f"tokenizer {source} cannot be loaded by transformers ({reason}): {ADVICE}"
        ) from error
    if largest >= vocab_size:
        raise UserError(
            f"tokenizer {source} has a token with id {largest}, but model.vocab_size={vocab_size}: "
            "is it the tokenizer of this model?"
        )
    return special


def _name_inputs(source: Path, copy: Path, names: list[str]) -> None:
    """Sets what a copied tokenizer hands to a model.

    A file that says so already keeps every byte.
    """
    settings = read_json(source, ADVICE)
    if not isinstance(settings, dict):
        raise UserError(f"{source} is damaged (it is no JSON object): {ADVICE}")
    if settings.get("model_input_names") != names:
        settings["model_input_names"] = names
        copy.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

"""The tokenizer of a Hugging Face folder, taken over as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from model.errors import UserError
from model.hf.configs import SPECIAL
from model.hf.tokenizer.convert import INPUT_NAMES
from model.records import read_json

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Files of which tokenizers of Hugging Face folders consist."""


def copy_tokenizer(source: Path, folder: Path, vocab_size: int) -> dict[str, int | None]:
    """Copies the tokenizer of a Hugging Face folder as it is; returns its special ids by the names in SPECIAL.

    Raises UserError where the folder has none that transformers loads, or it has ids that a model of `vocab_size` tokens has no row for.
    """
    from transformers import AutoTokenizer

    names = [name for name in COPIED if (source / name).is_file()]
    if "tokenizer_config.json" not in names:
        raise UserError(
            f"tokenizer {source} is no folder with a tokenizer_config.json: name a Hugging Face folder, auto or none"
        )
    for name in names:
        shutil.copyfile(source / name, folder / name)
    _hand_over_two(folder / "tokenizer_config.json")
    try:
        loaded = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"tokenizer {source} cannot be loaded by transformers: {str(error).splitlines()[0]}"
        ) from error
    largest = max(loaded.get_vocab().values())
    if largest >= vocab_size:
        raise UserError(
            f"tokenizer {source} has a token with id {largest}, but model.vocab_size={vocab_size}: is it the tokenizer of this model?"
        )
    return {key: getattr(loaded, key) for key in SPECIAL}


def _hand_over_two(path: Path) -> None:
    """Sets what a copied tokenizer hands to a model; a file that says so already keeps every byte."""
    settings = read_json(path, "name another folder, auto or none")
    if not isinstance(settings, dict):
        raise UserError(f"{path} is no JSON object: name another folder, auto or none")
    if settings.get("model_input_names") != list(INPUT_NAMES):
        settings["model_input_names"] = list(INPUT_NAMES)
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

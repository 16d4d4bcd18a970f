"""Whose code a Hugging Face folder brings along: foreign code is never run unasked."""

from __future__ import annotations

from pathlib import Path

from model.errors import UserError
from model.hf.packaging import PACKAGINGS, REMOTE
from model.hf.source import source_file
from model.records import Record, read_record
from model.words import printable

ADVICE = "export the checkpoint again with this version, or read that code and load the folder yourself"


class Mapped(Record):
    """Which code a JSON file of the folder asks for."""

    auto_map: dict[str, object] | None = None


def own_code(folder: Path | str) -> bool:
    """Whether a folder needs code, which then is ours byte by byte; False where it needs none.

    The answer is what `trust_remote_code` may be.
    Raises UserError for a folder that is no model, or that brings or names any other code.
    """
    folder = Path(folder)
    wanted: dict[str, dict[str, object]] = {}
    for name in ("config.json", "tokenizer_config.json"):
        if path := source_file(folder, name):
            wanted[name] = read_record(path, Mapped, ADVICE).auto_map or {}
    if "config.json" not in wanted:
        raise UserError(f"{folder} has no config.json: it is no exported model")
    if wanted.get("tokenizer_config.json"):
        raise _foreign(folder, "tokenizer_config.json names code for the tokenizer")
    named = wanted["config.json"]
    if not named:
        return False
    code = next((row.code for row in PACKAGINGS.values() if row.auto_map == named), None)
    if code is None:
        raise _foreign(folder, f"config.json names {printable(', '.join(map(str, named.values())))}")
    # transformers also runs custom_generate/generate.py of a folder that it trusts.
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}
    for name in sorted(found | set(code)):
        theirs = source_file(folder, name)
        if name not in code:
            raise _foreign(folder, f"{printable(name)} is no file of ours")
        if theirs is None or theirs.read_bytes() != (REMOTE / name).read_bytes():
            raise _foreign(folder, f"{name} is not the file of this version")
    return True


def _foreign(folder: Path, reason: str) -> UserError:
    return UserError(f"{folder} brings code that is not ours, which is not run ({reason}): {ADVICE}")

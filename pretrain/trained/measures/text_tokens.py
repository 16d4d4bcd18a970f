"""Text files as one stream of tokens, read as `fathom data prepare` reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.errors import UserError
from pretrain.data.reading.documents import Broken, records, text_of
from pretrain.data.reading.inputs import find_sources
from pretrain.data.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextTokens:
    """Documents read from files."""

    ids: Tensor
    """An end mark, then every document with one after it."""
    documents: int
    broken: int
    """Records that gave no document."""
    first_broken: str
    """What is wrong with the first of them."""


def read_text(files: Sequence[str], tokenizer: Tokenizer, text_key: str = "text") -> TextTokens:
    """Reads files as `fathom data prepare` does.

    Raises UserError for a file that is missing, and where there is no text at all.
    """
    ids: list[int] = [tokenizer.eod_id]
    documents, broken, first_broken = 0, 0, ""
    for shard in (shard for source in find_sources(list(files)) for shard in source.shards):
        if shard.kind == "hub":
            raise UserError(f"--text {shard.name}: no such file")
        for record in records(shard, text_key):
            found = text_of(record, text_key)
            if isinstance(found, Broken):
                broken += 1
                first_broken = first_broken or found.place
            elif found[0]:
                ids += [*tokenizer.encode(found[0]), tokenizer.eod_id]
                documents += 1
    if not documents:
        reason = f": {first_broken}" if broken else ""
        raise UserError(f"--text {' '.join(files)}: there is no text in it{reason}")
    return TextTokens(torch.tensor(ids), documents, broken, first_broken)

"""What inputs give when they are read to their end."""

from __future__ import annotations

import json
from pathlib import Path

from pretrain.data.reading.documents import Broken, records, text_of
from pretrain.data.reading.inputs import find_sources

TEXTS = ["first document\n\twith a tab", "  zweites Dokument: äöü 中文 \r\n", 'third, "quoted"', "x"]


def read(
    *inputs: str | Path, text_key: str = "text", streaming: bool = False
) -> tuple[list[str], list[Broken]]:
    texts, broken = [], []
    for source in find_sources([str(given) for given in inputs]):
        for shard in source.shards:
            for record in records(shard, text_key, streaming):
                found = text_of(record, text_key)
                broken.append(found) if isinstance(found, Broken) else texts.append(found[0])
    return texts, broken


def json_lines(texts: list[str]) -> bytes:
    return "".join(
        json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(texts)
    ).encode()

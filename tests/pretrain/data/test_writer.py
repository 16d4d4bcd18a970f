"""What workers count comes to stand in dataset.json."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from pretrain.data.manifest import Manifest, PairFacts
from pretrain.data.tokens.encode import EncodedBatch, EncodedSplit
from pretrain.data.tokens.tokenizer import Tokenizer
from pretrain.data.writer import Complaints, PairOutput

NOT_WRITTEN = {"records": "all of them are documents, empty, broken or left out"}
"""Field of a batch -> why it is not taken."""


class Watched(EncodedBatch):
    """Remembers what is read of it."""

    def __getattribute__(self, name: str) -> Any:
        object.__getattribute__(self, "__dict__").setdefault("seen", set()).add(name)
        return object.__getattribute__(self, name)


def test_nothing_that_a_worker_counts_is_lost(tmp_path: Path) -> None:
    tokenizer = cast(Tokenizer, SimpleNamespace(vocab_size=10, dtype=np.dtype(np.uint16)))
    output = PairOutput(tmp_path, tokenizer, strict=False)
    part = EncodedSplit(np.array([1, 2], dtype=np.uint16).tobytes(), np.array([2]), 3)
    batch = Watched(records=1, size=3, splits=(part,) * len(output.names))
    batch.__dict__["seen"] = set()
    output.add(batch)
    fields = {field.name for field in dataclasses.fields(EncodedBatch)}
    assert fields - batch.__dict__["seen"] == set(NOT_WRITTEN)
    complaints = {name for name, value in vars(output).items() if isinstance(value, Complaints)}
    assert complaints == {"broken", "one_side", "too_long"}
    assert complaints <= {*Manifest.model_fields, *PairFacts.model_fields}

"""An exported encoder against its run: loss of the hidden validation tokens, logits, a filled text.

A sample of the training holds several documents that do not see each other. transformers reads each
by itself, short ones filled up with padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model.errors import UserError
from model.hf.proof import Inputs, change
from model.hf.reference import Evaluation
from pretrain.trained.measures.masked import masked_samples
from pretrain.trained.open import Trained

BATCH = 8
CANDIDATES = 3


@dataclass(frozen=True)
class Rows:
    """Documents of masked samples, each in a row of its own."""

    inputs: Inputs
    """[documents, longest]."""
    rows: Tensor
    """[n]: documents of the hidden tokens that count."""
    columns: Tensor
    """[n]: their places there."""
    labels: Tensor
    """[n]: what stood there."""


def documents_of(batch: Mapping[str, Tensor]) -> Rows:
    """The documents of a batch of the task `masked_lm`, without the padding of its samples."""
    tokens: list[Tensor] = []
    types: list[Tensor] = []
    found = []
    for row, segments in enumerate(batch["documents"]):
        numbers, counts = torch.unique_consecutive(segments, return_counts=True)
        ends = counts.cumsum(0)
        counted = batch["weights"][row] > 0
        places, labels = batch["targets"][row, counted], batch["labels"][row, counted]
        within = torch.searchsorted(ends, places, right=True)
        found.append(torch.stack((len(tokens) + within, places - (ends - counts)[within], labels)))
        whole = [number > 0 for number in numbers.tolist()]
        assert all(whole[:-1])  # padding stands at the end, and nothing in it counts
        for name, parts in (("tokens", tokens), ("token_types", types)):
            if name in batch:
                pieces = batch[name][row].split(counts.tolist())
                parts += [piece for piece, real in zip(pieces, whole, strict=True) if real]
    keep = pad_sequence([torch.ones_like(part) for part in tokens], batch_first=True)
    padded = pad_sequence(types, batch_first=True) if types else None
    rows, columns, labels = torch.cat(found, dim=1)
    return Rows(Inputs(pad_sequence(tokens, batch_first=True), keep, padded), rows, columns, labels)


def compare(trained: Trained, model: Any, samples: int) -> tuple[float, float]:
    """As `verify_export.Check.compare`."""
    source, _ = masked_samples(trained, None, "validation")
    ours = Evaluation(trained.weights, trained.config, logit_scale=trained.logit_scale)
    nats, count, difference = 0.0, 0, 0.0
    for at in range(0, samples, BATCH):
        rows = documents_of(source.batch(range(at, min(at + BATCH, samples))))
        logits = model(**rows.inputs.arguments()).logits.float()
        picked = logits[rows.rows, rows.columns]
        nats += float(F.cross_entropy(picked, rows.labels, reduction="none").double().sum())
        count += len(rows.labels)
        if not at:
            difference = change(rows.inputs.seen(logits), rows.inputs.ask(ours))
    return nats / max(count, 1), difference


def sample(model: Any, tokenizer: Any, prompt: str, loss: float) -> list[str]:
    """As `verify_export.Check.sample`: the prompt with its places filled, and the candidates.

    Raises UserError for a prompt without a place.
    """
    given = tokenizer(prompt, return_tensors="pt")
    (ids,) = given["input_ids"]
    places = (ids == tokenizer.mask_token_id).nonzero().flatten()
    if not len(places):
        raise UserError(f"the text has no place to fill: write {tokenizer.mask_token} where one is")
    best = model(**given).logits[0, places].softmax(-1).topk(CANDIDATES)
    filled = ids.clone()
    filled[places] = best.indices[:, 0]
    lines = [
        f"{prompt!r} with the likeliest token in every place:",
        tokenizer.decode(filled, skip_special_tokens=True),
    ]
    for number, (tokens, shares) in enumerate(zip(best.indices, best.values, strict=True), 1):
        told = (
            f"{tokenizer.decode(token)!r} {share:.0%}" for token, share in zip(tokens, shares, strict=True)
        )
        lines.append(f"place {number}: {', '.join(told)}")
    return lines

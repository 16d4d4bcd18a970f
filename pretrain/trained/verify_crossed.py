"""An exported encoder-decoder against its run: loss of the validation targets, logits, a text.

A row of the training may hold several pairs that do not see each other. transformers reads each by
itself, short ones filled up with padding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model.hf.crossed_reference import CrossedEvaluation
from model.hf.proof import Inputs, change
from model.hf.tokenizer.special import SENTINEL
from pretrain.trained.open import Trained

BATCH = 4
"""Rows at a time."""
BEAMS, NEW_TOKENS = 4, 64
Batches = Callable[[Iterable[int]], dict[str, Tensor]]
"""From numbers of validation samples to their batch."""
_SENTINEL = re.compile(f"({SENTINEL.format('[0-9]+')})")


def pair_rows(trained: Trained) -> Batches:
    """The rows of the task `translation` that the trainer evaluated on."""
    from pretrain.data.pairs.samples import open_pairs

    corpora, lengths, cache = _data(trained)
    return open_pairs(corpora, "validation", lengths, 0, cache, alone=True).batch


def span_rows(trained: Trained) -> Batches:
    """The samples of the task `span_corruption` that the trainer evaluated on."""
    from pretrain.config.errors import checked
    from pretrain.config.spans import Spans
    from pretrain.data.spans.samples import open_spans

    corpora, lengths, cache = _data(trained)
    settings = checked(Spans, trained.reader.sections.spans or {}, f"{trained.reader.folder}, spans.")
    return open_spans(corpora, "validation", lengths, 0, cache, settings, alone=True).batch


def _data(trained: Trained) -> tuple[list[Any], tuple[int, int], Path | None]:
    """Data sets of the run, the lengths of source and target, and where indices are kept."""
    data = trained.reader.sections.data
    source = data.source_length or trained.source_positions
    assert source is not None  # of every encoder under a decoder
    cache = Path(data.cache) if data.cache else None
    return trained.corpora(), (source, data.seq_length or trained.positions), cache


def pairs_of(batch: Mapping[str, Tensor]) -> tuple[Inputs, Tensor]:
    """The pairs of a batch, each in a row of its own, and the labels that count, flat."""
    sources, tokens, labels = [], [], []
    for row, documents in enumerate(batch["documents"]):
        for number in range(1, int(documents.max()) + 1):
            sources.append(batch["source"][row][batch["source_documents"][row] == number])
            inside = documents == number
            tokens.append(batch["tokens"][row][inside])
            labels.append(batch["labels"][row][inside])
    padded = [pad_sequence(side, batch_first=True) for side in (tokens, sources)]
    keeps = [
        pad_sequence([torch.ones_like(one) for one in side], batch_first=True) for side in (tokens, sources)
    ]
    inputs = Inputs(padded[0], keeps[0], source=padded[1], source_keep=keeps[1])
    return inputs, torch.cat(labels)


def compare(
    opened: Callable[[Trained], Batches], trained: Trained, model: Any, samples: int
) -> tuple[float, float]:
    """As `verify_export.Check.compare`, with whom opens the samples."""
    batches = opened(trained)
    ours = CrossedEvaluation(trained.weights, trained.config, logit_scale=trained.logit_scale)
    nats, count, difference = 0.0, 0, 0.0
    for at in range(0, samples, BATCH):
        inputs, labels = pairs_of(batches(range(at, min(at + BATCH, samples))))
        logits = inputs.seen(model(**inputs.arguments()).logits.float())
        nats += float(F.cross_entropy(logits, labels, reduction="none").double().sum())
        count += len(labels)
        if not at:
            difference = change(logits, inputs.ask(ours))
    return nats / max(count, 1), difference


def sample(model: Any, tokenizer: Any, prompt: str, loss: float) -> list[str]:
    """As `verify_export.Check.sample`: what the decoder says to a text, by beam search.

    Sentinels in the text are what stands for a hidden span.
    """
    ids: list[int] = []
    for part in _SENTINEL.split(prompt):
        known = tokenizer.convert_tokens_to_ids(part) if _SENTINEL.fullmatch(part) else None
        if known is None or known == tokenizer.unk_token_id:
            ids += tokenizer(part, add_special_tokens=False)["input_ids"]
        else:
            ids.append(known)
    source = torch.tensor([[*ids, tokenizer.eos_token_id]])
    keep = torch.ones_like(source)
    (found,) = model.generate(
        input_ids=source, attention_mask=keep, num_beams=BEAMS, do_sample=False, max_new_tokens=NEW_TOKENS
    )
    text = tokenizer.decode([one for one in found[1:].tolist() if one != tokenizer.eos_token_id])
    return [f"to {prompt!r}, by beam search with {BEAMS} beams:", text]

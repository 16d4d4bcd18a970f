"""An exported encoder-decoder against its run: loss of the validation targets, logits, a text.

A row of the training may hold several pairs that do not see each other. transformers reads each by
itself, short ones filled up with padding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model.hf.crossed_reference import CrossedEvaluation
from model.hf.proof import change
from model.hf.tokenizer.special import SENTINEL
from pretrain.trained.measures.windows import chosen
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

    corpora, cache = chosen(trained, None)
    return open_pairs(corpora, "validation", trained.row_lengths, 0, cache, alone=True).batch


def span_rows(trained: Trained) -> Batches:
    """The samples of the task `span_corruption` that the trainer evaluated on."""
    from pretrain.config.errors import checked
    from pretrain.config.sections.spans import Spans
    from pretrain.data.spans.samples import open_spans

    corpora, cache = chosen(trained, None)
    settings = checked(Spans, trained.reader.sections.spans or {}, f"{trained.reader.folder}, spans.")
    return open_spans(corpora, "validation", trained.row_lengths, 0, cache, settings, alone=True).batch


@dataclass(frozen=True)
class Rows:
    """Pairs, each in a row of its own; behind the shorter ones stands padding."""

    source: Tensor
    """[pairs, longest source] ids."""
    source_keep: Tensor
    """0 for padding."""
    tokens: Tensor
    """[pairs, longest target] ids that the decoder reads."""
    keep: Tensor
    """0 for padding."""
    labels: Tensor
    """[n]: what follows each token that is kept, row by row."""

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> Rows:
        """The pairs of a batch for an encoder and a decoder."""
        sources, tokens, labels = [], [], []
        for row, documents in enumerate(batch["documents"]):
            for number in range(1, int(documents.max()) + 1):
                inside = documents == number
                sources.append(batch["source"][row][batch["source_documents"][row] == number])
                tokens.append(batch["tokens"][row][inside])
                labels.append(batch["labels"][row][inside])
        return cls(*_padded(sources), *_padded(tokens), torch.cat(labels))

    def theirs(self, model: Any) -> Tensor:
        """Logits [n, v] of a model of transformers."""
        found = model(
            input_ids=self.source,
            attention_mask=self.source_keep,
            decoder_input_ids=self.tokens,
            decoder_attention_mask=self.keep,
            use_cache=False,
        )
        logits: Tensor = found.logits.float()[self.keep.bool()]
        return logits

    def ours(self, model: CrossedEvaluation) -> Tensor:
        """Logits [n, v] of canonical weights."""
        return model.decode(self.tokens, model.encode(self.source, self.source_keep))[self.keep.bool()]


def _padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    ones = [torch.ones_like(row) for row in rows]
    return pad_sequence(rows, batch_first=True), pad_sequence(ones, batch_first=True)


def compare(
    opened: Callable[[Trained], Batches], trained: Trained, model: Any, samples: int
) -> tuple[float, float]:
    """As `verify_export.Check.compare`, with whom opens the samples."""
    batches = opened(trained)
    own = CrossedEvaluation(trained.weights, trained.config, logit_scale=trained.logit_scale)
    nats, count, difference = 0.0, 0, 0.0
    for at in range(0, samples, BATCH):
        rows = Rows.of(batches(range(at, min(at + BATCH, samples))))
        logits = rows.theirs(model)
        nats += float(F.cross_entropy(logits, rows.labels, reduction="none").double().sum())
        count += len(rows.labels)
        if not at:
            difference = change(logits, rows.ours(own))
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
    model.generation_config.max_length = None  # of a stock class; ours counts new tokens
    source = torch.tensor([[*ids, tokenizer.eos_token_id]])
    keep = torch.ones_like(source)
    # A table of positions ends somewhere.
    most = min(NEW_TOKENS, (getattr(model.config, "max_position_embeddings", None) or 2 * NEW_TOKENS) - 1)
    (found,) = model.generate(
        input_ids=source, attention_mask=keep, num_beams=BEAMS, do_sample=False, max_new_tokens=most
    )
    text = tokenizer.decode([one for one in found[1:].tolist() if one != tokenizer.eos_token_id])
    return [f"to {prompt!r}, by beam search with {BEAMS} beams:", text]

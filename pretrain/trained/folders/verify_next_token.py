"""An exported decoder against its run: loss of the validation tokens, logits, a text."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from model.errors import UserError
from model.hf.proof import change
from model.hf.reference import Evaluation
from pretrain.data.blend import open_blend
from pretrain.data.tokens.tokenizer import Tokenizer
from pretrain.trained.open import Trained

BATCH = 8
TEMPERATURE, TOP_P = 1.0, 0.95
"""Of the sample. Below 1, models that have seen little text repeat themselves."""
NEW_TOKENS = 48


def validation_tokens(trained: Trained, samples: int) -> torch.Tensor:
    """The tokens [samples, seq_length + 1] that the trainer evaluated on."""
    data, seed = trained.reader.sections.data, trained.reader.sections.train.seed
    if data.seq_length is None or seed is None:
        raise UserError(
            f"{trained.reader.folder} names no data.seq_length or no train.seed: use another checkpoint"
        )
    cache = Path(data.cache) if data.cache else None
    blend = open_blend(trained.corpora(), "validation", data.seq_length, seed, cache, alone=True)
    return blend.batch(range(samples))


def compare(trained: Trained, model: Any, samples: int) -> tuple[float, float]:
    """As `verify_export.Check.compare`."""
    tokens = validation_tokens(trained, samples)
    parts = list(tokens.split(BATCH))
    if trained.reader.sections.data.document_mask:
        parts = alone(tokens, Tokenizer(trained.needed_tokenizer()).eod_id)
    losses = [_loss(model(batch[:, :-1]).logits, batch) for batch in parts]
    first = tokens[:BATCH, :-1]
    ours = Evaluation(trained.weights, trained.config, logit_scale=trained.logit_scale)(first)
    return float(torch.cat(losses).mean()), change(model(first).logits, ours)


def alone(tokens: torch.Tensor, end_mark: int) -> list[torch.Tensor]:
    """The documents in windows [n, s + 1], one by one: [1, length + 1], with the label that comes.

    Each begins with the end mark before it, as the trainer has it (`data.document_mask`).
    """
    found = []
    for row in tokens:
        cuts = sorted({0, *(row[:-1] == end_mark).nonzero().flatten().tolist(), len(row) - 1})
        found += [row[first : last + 1][None] for first, last in itertools.pairwise(cuts)]
    return found


def _loss(logits_bsv: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Loss per token, flat."""
    return F.cross_entropy(logits_bsv.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")


def sample(model: Any, tokenizer: Any, prompt: str, loss: float) -> list[str]:
    """As `verify_export.Check.sample`: a text that begins with the prompt."""
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    torch.manual_seed(0)
    generated = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=True, temperature=TEMPERATURE, top_p=TOP_P
    )
    new = tokenizer.decode(generated[0][inputs["input_ids"].shape[1] :])
    return [
        f"sample after {prompt!r}, drawn with temperature {TEMPERATURE:g} and top-p {TOP_P:g} "
        f"from a model of perplexity {math.exp(loss):.0f}:",
        prompt + new,
    ]

"""An exported model of speech against its run: loss on validation clips, logits, what it writes.

Clips are asked one by one: convolutions of transformers read what stands behind a padded one's end.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.hf.crossed_reference import CrossedEvaluation
from model.hf.proof import change
from pretrain.trained.measures.clips import open_split
from pretrain.trained.open import Trained

SHOWN, NEW_TOKENS, BEAMS = 3, 64, 4


def compare(trained: Trained, model: Any, samples: int) -> tuple[float, float]:
    """As `verify_export.Check.compare`."""
    blend = open_split(trained, "validation")
    own = CrossedEvaluation(trained.weights, trained.config, logit_scale=trained.logit_scale)
    nats, count, difference = 0.0, 0, 0.0
    for clip in chain.from_iterable(map(blend.clips_of, range(samples))):
        frames, labels = torch.from_numpy(clip[0])[None], torch.from_numpy(clip[1])[None]
        read = torch.cat((labels.new_full((1, 1), blend.eod_id), labels[:, :-1]), dim=1)
        found: Tensor = model(input_features=frames, decoder_input_ids=read, use_cache=False).logits.float()
        nats += float(F.cross_entropy(found[0], labels[0], reduction="sum").double())
        if not count:
            difference = change(found, own(read, source=frames)[..., : found.shape[-1]])
        count += labels.shape[1]
    return nats / max(count, 1), difference


def sample(trained: Trained, model: Any, tokenizer: Any, prompt: str, loss: float) -> list[str]:
    """As `verify_export.Check.sample`: what the model writes for some validation clips.

    prompt: the path of a recording instead, if there is one.
    """
    if prompt:
        from pathlib import Path

        from pretrain.data.speech.audio import read_clip
        from pretrain.trained.heard import speech_facts

        frames = speech_facts(trained).frames(read_clip(Path(prompt)))
        return [f"{prompt}: {_written(model, tokenizer, torch.from_numpy(frames))}"]
    clips = open_split(trained, "validation").clips_of(0)[:SHOWN]
    told = []
    for frames, ids in clips:
        text = _written(model, tokenizer, torch.from_numpy(frames))
        told += [f"said {tokenizer.decode(ids[:-1].tolist())!r}", f"  written {text!r}"]
    return told


def _written(model: Any, tokenizer: Any, frames: Tensor) -> str:
    model.generation_config.max_length = None  # ours counts new tokens
    (found,) = model.generate(
        input_features=frames[None], num_beams=BEAMS, do_sample=False, max_new_tokens=NEW_TOKENS
    )
    end = model.generation_config.eos_token_id
    return str(tokenizer.decode([one for one in found[1:].tolist() if one != end]))

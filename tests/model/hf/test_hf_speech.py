"""Models of speech as Speech2TextForConditionalGeneration: proved by logits, used by a pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.errors import UserError
from model.hf.export import export
from model.hf.proof import load_exported
from model.network.language_model import LanguageModel
from model.parameters.names import named_parameters
from model.weights.init import logit_scale
from tests.model.network.test_seq2seq import TARGET, VOCAB
from tests.model.network.test_speech import FILTERS, SOURCE, build
from tests.pretrain.clips import spoken, write_speech
from tests.reference import speech

ENDS = {"eos_token_id": 2, "pad_token_id": 3, "decoder_start_token_id": 2}


def exported(
    folder: Path, scheme: str, tokenizer: Path | None = None, **changes: Any
) -> tuple[LanguageModel, ModelConfig]:
    chunk, config = build(scheme, **changes)
    filters = config.speech.filters if config.speech else FILTERS
    export(
        {one.name: one.parameter.detach().float() for one in named_parameters(chunk, 0, 1)},
        config,
        folder,
        logit_scale=logit_scale(config),
        tokenizer=tokenizer,
        seq_length=TARGET,
        source_length=SOURCE,
        special=ENDS,
        processor={
            "feature_extractor_type": "Speech2TextFeatureExtractor",
            "feature_size": filters,
            "num_mel_bins": filters,
            "sampling_rate": 16000,
            "return_attention_mask": True,
        },
    )
    return chunk, config


def exact_positions(model: Any) -> None:
    """Puts positions in fp64 where transformers computes them in fp32."""
    for part in model.modules():
        if hasattr(part, "make_weights"):
            count, width = part.weights.shape
            part.weights = speech.turns(torch.arange(count) - 2, width)


def asked(frames: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(frames)
    tokens = torch.randint(4, VOCAB, (1, TARGET), generator=generator)
    return {
        "frames": torch.randn(1, frames, FILTERS, generator=generator, dtype=torch.float64),
        "frame_documents": torch.ones(1, frames, dtype=torch.long),
        "tokens": tokens,
    }


@pytest.mark.parametrize(
    ("scheme", "changes"),
    [
        ("pre_ln", {}),
        ("layernorm_scaling", {}),
        ("deepscalelm_pre_ln", {"hidden_dropout": 0.2, "norm_epsilon": 1e-6}),
        ("pre_ln", {"bias": False}),
    ],
)
def test_an_export_gives_the_models_logits(scheme: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """In fp64, for clips that end at each place of a token's four frames."""
    chunk, config = exported(tmp_path / "hf", scheme, **changes)
    theirs = load_exported(tmp_path / "hf", "speech_to_text", config).double()
    exact_positions(theirs)
    ours = chunk.eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(parameter.float().double())
        for frames in (29, 30, 31, 32):
            given = asked(frames)
            expected = ours(given)[..., :VOCAB]
            found = theirs(
                input_features=given["frames"], decoder_input_ids=given["tokens"], use_cache=False
            ).logits
            # Factors of a fold are rounded to fp32, and epsilons of two are near alone.
            tolerance = 2e-7 if scheme == "pre_ln" else 2e-5
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("scheme", "changes", "message"),
    [
        ("b2t", {}, "no class of transformers computes this model"),
        ("pre_ln", {"position": "learned"}, "its positions are fixed sines and cosines, the model's learned"),
        ("pre_ln", {"logit_bias": True}, "it has no bias on its logits"),
    ],
)
def test_other_models_are_refused_in_a_line(
    scheme: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        exported(tmp_path / "hf", scheme, **changes)
    assert not (tmp_path / "hf").exists()


def test_a_pipeline_writes_what_a_recording_says(tmp_path: Path) -> None:
    from transformers import pipeline

    write_speech(tmp_path, 12, filters=FILTERS)
    exported(tmp_path / "hf", "pre_ln", tmp_path / "words.model", vocab_size=300, vocab_multiple=1)
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert settings["architectures"] == ["Speech2TextForConditionalGeneration"]
    assert settings["pad_token_id"] == 1
    hears = pipeline("automatic-speech-recognition", model=str(tmp_path / "hf"))
    clip = {"raw": spoken(["red", "blue"]), "sampling_rate": 16000}
    assert isinstance(hears(clip, generate_kwargs={"max_new_tokens": 5})["text"], str)

"""Models of speech as Speech2TextForConditionalGeneration: proved by logits, used by a pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.errors import UserError
from model.hf.export import export
from model.hf.proof import load_exported
from model.network.language_model import LanguageModel
from model.parameters.names import named_parameters
from model.weights.init import logit_scale
from pretrain.trained.folders.import_hf import import_checkpoint
from pretrain.trained.open import open_trained
from pretrain.trained.transcribe import open_transcriber
from tests.model.network.test_seq2seq import TARGET, VOCAB
from tests.model.network.test_speech import FILTERS, SOURCE, build
from tests.pretrain.clips import spoken, write_clip, write_speech
from tests.reference import speech

ENDS = {"eos_token_id": 2, "pad_token_id": 3, "decoder_start_token_id": 2}


def exported(
    folder: Path, scheme: str, tokenizer: Path | None = None, architecture: str = "auto", **changes: Any
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
        architecture=architecture,
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
        ("b2t", {}, "speech_to_text"),
        ("pre_ln", {"position": "learned"}, "its positions are fixed sines and cosines, the model's learned"),
        ("pre_ln", {"logit_bias": True}, "it has no bias on its logits"),
    ],
)
def test_other_models_are_refused_in_a_line_where_the_stock_class_is_asked_for(
    scheme: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        exported(tmp_path / "hf", scheme, architecture="speech_to_text", **changes)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("scheme", "changes"),
    [
        ("b2t", {}),
        (
            "deepscalelm_post_ln",
            {
                "position": "learned",
                "max_position_embeddings": TARGET,
                "max_source_positions": SOURCE,
                "embedding_norm": True,
            },
        ),
        ("pre_ln", {"logit_bias": True, "bias": False}),
        ("peri_ln", {"position": "rotary", "activation": "swiglu", "normalization": "rmsnorm"}),
    ],
)
def test_our_own_class_gives_the_logits_of_every_other_model(
    scheme: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """In fp64; also of a clip beside a longer one, whose padding is not heard."""
    chunk, config = exported(tmp_path / "hf", scheme, **changes)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == [
        "FathomForSpeechSeq2Seq"
    ]
    theirs, ours = load_exported(tmp_path / "hf", "fathom", config).double(), chunk.eval()
    tolerance = 1e-6 if config.position == "rotary" else 1e-12  # our angles are in fp32
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(parameter.float().double())
        short, long = asked(29), asked(32)
        frames = torch.cat((F.pad(short["frames"], (0, 0, 0, 3), value=7.0), long["frames"]))
        keep = (torch.arange(32) < torch.tensor([[29], [32]])).long()
        found = theirs(
            input_features=frames,
            attention_mask=keep,
            decoder_input_ids=torch.cat((short["tokens"], long["tokens"])),
            use_cache=False,
        ).logits
        for row, given in enumerate((short, long)):
            expected = ours(given)[..., :VOCAB]
            torch.testing.assert_close(found[row : row + 1], expected, rtol=tolerance, atol=tolerance)


def test_our_own_folder_comes_back_and_transcribes(tmp_path: Path) -> None:
    write_speech(tmp_path, 12, filters=FILTERS)
    given = tmp_path / "hf"
    chunk, _ = exported(given, "b2t", tmp_path / "words.model", vocab_size=300, vocab_multiple=1)
    import_checkpoint(str(given), tmp_path / "back", vocab_multiple=1)
    found, weights = open_transcriber(tmp_path / "back"), open_trained(tmp_path / "back").weights
    for one in named_parameters(chunk, 0, 1):
        assert torch.equal(weights[one.name], one.parameter.detach().float())
    frames = found.encode(str(tmp_path / "0.wav"))
    assert np.abs(frames.mean(0)).max() < 1e-5, "each clip is normalised by itself"
    card = (given / "README.md").read_text()
    assert card.count("print(") == card.count("trust_remote_code=True") == 1

    learned: dict[str, Any] = {
        "position": "learned",
        "max_position_embeddings": TARGET,
        "max_source_positions": SOURCE,
    }
    exported(tmp_path / "short", "b2t", tmp_path / "words.model", vocab_size=300, vocab_multiple=1, **learned)
    import_checkpoint(str(tmp_path / "short"), tmp_path / "hears", vocab_multiple=1)
    hears, samples = open_transcriber(tmp_path / "hears"), spoken(["red"] * 9)
    longest = 160 * 4 * SOURCE + 399  # samples of as many frames, and not yet one more
    write_clip(tmp_path / "longest.wav", samples[:longest])
    assert len(hears.encode(str(tmp_path / "longest.wav"))) == 4 * SOURCE
    write_clip(tmp_path / "longer.wav", samples[: longest + 1])
    with pytest.raises(UserError, match=r"longer.wav: 0.505 s, the most is 0.5049 s .*: cut it"):
        hears.encode(str(tmp_path / "longer.wav"))

    processor = json.loads((given / "preprocessor_config.json").read_text())
    for damage, said in (
        ({"num_mel_bins": 3}, f"num_mel_bins=3, and the model hears {FILTERS}"),
        ({"normalize_vars": False}, "each filter has to be normalised over its clip"),
        ({"sampling_rate": 8000}, "at 16000 Hz, and these are of Speech2TextFeatureExtractor at 8000 Hz"),
    ):
        (given / "preprocessor_config.json").write_text(json.dumps(processor | damage))
        with pytest.raises(UserError, match=said):
            import_checkpoint(str(given), tmp_path / "other")
    (given / "preprocessor_config.json").unlink()
    import_checkpoint(str(given), tmp_path / "untold")
    with pytest.raises(UserError, match="does not tell how its recordings were made ready"):
        open_transcriber(tmp_path / "untold")


def test_a_pipeline_writes_what_a_recording_says(tmp_path: Path) -> None:
    """Beam by beam and with a cache, what both classes write of the same weights."""
    from transformers import pipeline

    write_speech(tmp_path, 12, filters=FILTERS)
    more = {"vocab_size": 300, "vocab_multiple": 1}
    written = []
    for architecture in ("speech_to_text", "fathom"):
        folder = tmp_path / architecture
        exported(folder, "pre_ln", tmp_path / "words.model", architecture, **more)
        own = architecture == "fathom"
        hears = pipeline("automatic-speech-recognition", model=str(folder), trust_remote_code=own)
        clip = {"raw": spoken(["red", "blue"]), "sampling_rate": 16000}
        settings = {"max_new_tokens": 5, "num_beams": 3}
        written.append(hears(clip, generate_kwargs=settings)["text"])
    assert len(written[0]) > 3
    assert written[0] == written[1]
    settings = json.loads((tmp_path / "speech_to_text" / "config.json").read_text())
    assert settings["architectures"] == ["Speech2TextForConditionalGeneration"]
    assert settings["pad_token_id"] == 1

"""Models of speech of every scheme against the reference, in fp64: clips packed in rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.depth.schemes import SCHEMES
from model.network.language_model import LanguageModel
from model.speech import tokens_of
from model.weights.bases import sinusoid_scale
from tests.model.network.references import assert_equals_reference, copies, gradients_of, random_model
from tests.model.network.test_seq2seq import CROSSED, PADDED, TARGET, VOCAB, described
from tests.reference import seq2seq, speech

FILTERS, SOURCE = 6, 12
CLIPS = [[13, 7, 4], [21, 18]]
"""Frames of the clips of each row: 4 + 2 + 1, and 6 + 5 tokens with a gap after each."""
WORDS = [[3, 2, 2], [4, 4]]


def build(scheme: str, **changes: Any) -> tuple[LanguageModel, ModelConfig]:
    config = ModelConfig.model_validate(
        {
            "family": "speech",
            "scheme": scheme,
            "num_layers": 3,
            "encoder_layers": 2,
            "hidden_size": 16,
            "num_attention_heads": 4,
            "ffn_hidden_size": 24,
            "position": "sinusoidal",
            "speech": {"filters": FILTERS, "channels": 10},
            "vocab_size": VOCAB,
            "vocab_multiple": PADDED,
            **changes,
        }
    )
    return random_model(config, TARGET, SOURCE + 2), config


def packed(clips: list[list[int]], words: list[list[int]], width: int = SOURCE) -> dict[str, Tensor]:
    """A batch of rows of clips with so many frames, and as many words beside them."""
    generator = torch.Generator().manual_seed(1)
    rows = len(clips)
    numbers = torch.zeros(rows, 4 * width, dtype=torch.long)
    places = torch.zeros(rows, width, dtype=torch.long)
    documents, positions = (torch.zeros(rows, TARGET, dtype=torch.long) for _ in range(2))
    for row, (frames, targets) in enumerate(zip(clips, words, strict=True)):
        first = word = 0
        for number, (length, count) in enumerate(zip(frames, targets, strict=True), start=1):
            numbers[row, 4 * first : 4 * first + length] = number
            tokens = tokens_of(length)
            places[row, first : first + tokens] = torch.arange(tokens)
            documents[row, word : word + count] = number
            positions[row, word : word + count] = torch.arange(count)
            first, word = first + tokens + 1, word + count
    frames_bfm = torch.randn(rows, 4 * width, FILTERS, generator=generator, dtype=torch.float64)
    return {
        "frames": frames_bfm * (numbers > 0)[..., None],
        "frame_documents": numbers,
        "source_positions": places,
        "tokens": torch.randint(0, VOCAB, (rows, TARGET), generator=generator),
        "labels": torch.randint(0, VOCAB, (rows, TARGET), generator=generator),
        "weights": (documents > 0).double(),
        "documents": documents,
        "positions": positions,
    }


def reference(
    chunk: LanguageModel, config: ModelConfig, given: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses [batch, tokens], and gradients of those that count by canonical name."""
    weights = copies(chunk)
    table: Tensor | None = weights.get("source_embedding.position_embeddings.weight")
    if config.position == "sinusoidal":
        table = sinusoid_scale(config) * speech.turns(torch.arange(SOURCE), config.hidden_size)
    rows = []
    for row, numbers in enumerate(given["frame_documents"]):
        made = torch.zeros(given["source_positions"].shape[1], config.hidden_size, dtype=torch.float64)
        for number in range(1, int(numbers.max()) + 1):
            (places,) = (numbers == number).nonzero(as_tuple=True)
            told = speech.heard(weights, given["frames"][row, places], table)
            first = int(places[0]) // 4
            made = torch.cat((made[:first], told, made[first + len(told) :]))
        rows.append(made)
    source_documents = given["frame_documents"][:, ::4]
    model = described(config)
    model = seq2seq.Model(
        model.encoder, model.decoder, True, model.embedding_norm, model.sinusoid, speech.turns
    )
    inputs = seq2seq.Batch(
        source=source_documents,
        source_documents=source_documents,
        heard=torch.stack(rows),
        **{name: given[name] for name in ("tokens", "documents", "source_positions", "positions")},
    )
    losses = seq2seq.losses(weights, model, inputs, given["labels"], VOCAB)
    (losses * given["weights"]).sum().backward()
    return losses, gradients_of(weights)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"position": "learned", "embedding_norm": True, "bias": False},
    {"position": "none", "tie_embeddings": False, "activation": "relu", "encoder_attention_heads": 2},
]


@pytest.mark.parametrize(
    ("scheme", "number"), [*((name, 0) for name in CROSSED), ("deepscalelm_pre_ln", 1), ("b2t", 2)]
)
def test_losses_and_gradients_are_the_references(scheme: str, number: int) -> None:
    chunk, config = build(scheme, **VARIANTS[number])
    given = packed(CLIPS, WORDS)
    assert_equals_reference(chunk, given, *reference(chunk, config, given))


def test_a_clip_does_not_feel_what_stands_beside_it() -> None:
    """Every number of frames of a clip, alone and before others that were loud."""
    chunk, _ = build("deepscalelm_pre_ln")
    for frames in (13, 14, 15, 16):
        row = packed([[frames, 8, 4]], [[3, 2, 2]])
        row["frames"] = row["frames"] * (1 + 9 * (row["frame_documents"] > 1))[..., None]
        tokens = tokens_of(frames)
        alone = {
            "frames": row["frames"][:, :frames],
            "frame_documents": row["frame_documents"][:, :frames],
            "tokens": row["tokens"][:, :3],
            "labels": row["labels"][:, :3],
        }
        row.pop("weights")
        assert chunk(alone).shape == (1, 3)
        torch.testing.assert_close(chunk(row)[:, :3], chunk(alone), rtol=1e-12, atol=1e-12)
        assert tokens == -(-frames // 4)


def test_words_are_no_source_of_a_model_of_speech() -> None:
    chunk, _ = build("pre_ln")
    given = packed(CLIPS, WORDS)
    with pytest.raises(ValueError, match="source"):
        chunk({**given, "source": given["tokens"]})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"speech": None}, "model.family=speech needs model.speech"),
        ({"family": "seq2seq"}, "model.speech=.* has no effect with model.family=seq2seq"),
        ({"share_embeddings": False}, "model.share_embeddings=false has no effect"),
        ({"hidden_size": 2, "num_attention_heads": 1}, "needs a model.hidden_size of 4"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build("pre_ln", **changes)


def test_every_scheme_without_cross_attention_says_so() -> None:
    for name, scheme in SCHEMES.items():
        if scheme.no_cross:
            with pytest.raises(ValueError, match="has no rule for cross-attention"):
                build(name)

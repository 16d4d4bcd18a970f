"""An encoder's checkpoint: hidden tokens, places in a text, and the export."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from model.config import ModelConfig
from model.errors import UserError
from model.hf.proof import change, proof_inputs
from model.hf.reference import Evaluation
from model.weights.init import logit_scale
from pretrain.config.schema import Corpus
from pretrain.config.sections.masking import Masking
from pretrain.data.masked.samples import open_masked
from pretrain.data.tokens.tokenizer import Tokenizer
from pretrain.depth_use.runs import open_runs
from pretrain.trained.fill import fill_text
from pretrain.trained.folders.export import export_checkpoint
from pretrain.trained.generate import generate_text
from pretrain.trained.measures.masked import evaluate_masked
from pretrain.trained.measures.windows import Asked
from pretrain.trained.open import open_trained
from pretrain.trained.scorer import Scorer
from tests.model.hf.tiny import POSITIONS, reference
from tests.pretrain.trained.encoders import save_encoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig]:
    folder = tmp_path_factory.mktemp("encoder")
    return folder, save_encoder(folder, position="rotary", token_types=0)


def test_losses_and_hits_are_those_of_the_reference(encoder: tuple[Path, ModelConfig]) -> None:
    folder, config = encoder
    trained = open_trained(folder / "run")
    told = evaluate_masked(trained, data=folder / "data", samples=6, batch_size=4, precision="fp32")
    corpora = [Corpus(path=str(folder / "data"))]
    batch = open_masked(corpora, "validation", POSITIONS, 3, None, Masking(), alone=True).batch(range(6))
    model = reference(config, dict(trained.weights), logit_scale(config))
    nats, hits = 0.0, 0
    for row in range(6):
        # Each document of a sample by itself, with all that is hidden in it.
        for number in batch["segments"][row].unique().tolist():
            inside = (batch["segments"][row] == number).nonzero().flatten()
            logits = model(batch["tokens"][row, inside][None])[0, :, : config.vocab_size].log_softmax(-1)
            counted = batch["weights"][row] > 0
            for place, label in zip(
                batch["places"][row, counted], batch["labels"][row, counted], strict=True
            ):
                if place in inside:
                    at = int((inside == place).nonzero())
                    nats -= float(logits[at, label])
                    hits += int(logits[at].argmax() == label)
    assert told.tokens == int(batch["weights"].sum())
    assert told.nats == pytest.approx(nats, rel=1e-5)
    assert told.right == hits
    facts = told.to_json()
    assert facts["pseudo_perplexity"] == pytest.approx(math.exp(nats / told.tokens), rel=1e-5)


def test_what_an_evaluation_refuses(encoder: tuple[Path, ModelConfig]) -> None:
    folder, _ = encoder
    trained = open_trained(folder / "run")
    with pytest.raises(UserError, match="--samples 1000000: the validation split"):
        evaluate_masked(trained, data=folder / "data", samples=1_000_000)
    with pytest.raises(UserError, match="name a data set with --data"):
        evaluate_masked(trained)


def test_places_are_filled_with_the_likeliest_tokens(encoder: tuple[Path, ModelConfig]) -> None:
    folder, config = encoder
    filled = fill_text(folder / "run", "the [MASK] layers[MASK] the signal", top=3)
    tokenizer = Tokenizer(folder / "special.model")
    cls, mask, sep = (tokenizer.special[role] for role in ("cls", "mask", "sep"))
    first, middle, last = (tokenizer.encode(part) for part in ("the", " layers", " the signal"))
    ids = [cls, *first, mask, *middle, mask, *last, sep]
    model = reference(config, dict(open_trained(folder / "run").weights), logit_scale(config))
    scores = model(torch.tensor([ids]))[0, :, : config.vocab_size].softmax(-1)
    spelt = [piece.decode(errors="replace") for piece in tokenizer.token_bytes()]
    for place, at in zip(filled.places, (1 + len(first), 2 + len(first) + len(middle)), strict=True):
        best = scores[at].topk(3)
        assert [one.text for one in place] == [spelt[index] for index in best.indices]
        assert [one.probability for one in place] == pytest.approx(best.values.tolist(), rel=1e-4)
    one, two = (place[0].text for place in filled.places)
    assert filled.text == f"the{one} layers{two} the signal"


@pytest.mark.parametrize(
    ("text", "reason"), [("no place", "write \\[MASK\\] where one is"), ("\ud800 [MASK]", "not valid")]
)
def test_texts_that_cannot_be_filled(encoder: tuple[Path, ModelConfig], text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        fill_text(encoder[0] / "run", text)


def test_an_encoder_continues_no_text(encoder: tuple[Path, ModelConfig]) -> None:
    with pytest.raises(UserError, match="use `fathom fill`"):
        generate_text(encoder[0] / "run", "the")


def test_the_model_that_trains_sees_no_padding(encoder: tuple[Path, ModelConfig]) -> None:
    """What proves an export in the precision of the training."""
    folder, config = encoder
    trained, inputs = open_trained(folder / "run"), proof_inputs(config, POSITIONS)
    ours = inputs.ask(Scorer(trained, "fp32").logits)[..., : config.vocab_size]
    plain = inputs.ask(Evaluation(trained.weights, config, logit_scale=trained.logit_scale))
    assert change(ours, plain) < 1e-5


def test_depth_use_is_of_models_that_read_from_left_to_right(encoder: tuple[Path, ModelConfig]) -> None:
    asked = Asked(data=encoder[0] / "data")
    with pytest.raises(UserError, match=r"depth-use needs a decoder alone, which reads from left to right"):
        open_runs([encoder[0] / "run"], asked)


def test_a_checkpoint_is_exported_as_it_came(encoder: tuple[Path, ModelConfig], tmp_path: Path) -> None:
    folder, _ = encoder
    result = export_checkpoint(folder / "run", tmp_path / "hf")
    assert result.architecture == "fathom"
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (folder / "hf/model.safetensors").read_bytes()

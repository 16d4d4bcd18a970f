"""A conversation is one text, of which the model reads what its longest sequence holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from model.errors import UserError
from model.hf.reference import generate
from pretrain.trained.chat import Conversation
from pretrain.trained.generate import Sampling, Writer, generate_text, open_writer, stream

POSITIONS, NEW = 32, 8
GREEDY = Sampling(NEW, temperature=0)


@pytest.fixture(scope="module")
def writer(imported_gpt2: Path) -> Writer:
    return open_writer(imported_gpt2 / "checkpoint")


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(NEW, seed=3)])
def test_the_first_answer_is_that_of_generate(
    imported_gpt2: Path, writer: Writer, sampling: Sampling
) -> None:
    alone = "".join(
        generate_text(imported_gpt2 / "checkpoint", "the norm", NEW, sampling.temperature, seed=sampling.seed)
    )
    conversation = Conversation(writer, sampling)
    assert "".join(conversation.answer("the norm")) == alone
    assert conversation.text == f"the norm{alone}"
    conversation.text = ""
    again = "".join(conversation.answer("the norm"))
    assert (again == alone) == (sampling.temperature == 0), "each answer has a seed of its own"
    conversation.reset()
    assert "".join(conversation.answer("the norm")) == alone


def test_the_text_is_cut_to_what_the_model_holds(writer: Writer) -> None:
    conversation = Conversation(writer, GREEDY)
    text = ""
    for line in ("deep layers", "", "keep the signal", "the norm of a residual stream"):
        text += f"\n{line}" if text and line else line
        ids = writer.tokenizer.encode(text)[-(POSITIONS - NEW) :]
        new = list(generate(writer.weights, writer.config, ids, NEW, 0, logit_scale=writer.logit_scale))
        said = "".join(conversation.answer(line))
        assert said == "".join(stream(writer.tokenizer, ids, iter(new)))
        text += said
        assert conversation.text == text
    assert len(writer.tokenizer.encode(text)) > POSITIONS


def test_an_answer_that_is_broken_off_stays_as_far_as_it_was_said(writer: Writer) -> None:
    conversation = Conversation(writer, GREEDY)
    said = next(conversation.answer("the norm"))
    assert conversation.text == f"the norm{said}"


@pytest.mark.parametrize("marked", [False, True])
def test_the_next_line_begins_a_document_after_the_end_of_one(writer: Writer, marked: bool) -> None:
    """Where documents see each other, the ended one is read before it; else nothing is."""
    end = writer.tokenizer.eod_id
    for seed in range(200):
        conversation = Conversation(replace(writer, marked=marked), Sampling(20, temperature=1e3, seed=seed))
        list(conversation.answer("the"))
        if not conversation.text:
            break
    assert not conversation.text, "no end mark in 200 answers of nearly equal chances"
    if marked:
        assert conversation.ended == []
        assert conversation._context("") == [end]
    else:
        assert conversation.ended[0] == writer.tokenizer.encode("the")[0]
        assert conversation.ended.index(end) == len(conversation.ended) - 1
        assert conversation._context("")[-1] == end
    list(conversation.answer("deep"))
    assert conversation.text.startswith("deep") or not conversation.text


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        (Sampling(32), "--max-new-tokens 32 does not fit: the model has 32 positions, of which one"),
        (Sampling(temperature=-1), "--temperature -1"),
        (Sampling(top_k=0), "--top-k 0"),
    ],
)
def test_wrong_settings_are_told_before_the_first_line(
    writer: Writer, sampling: Sampling, reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        Conversation(writer, sampling)


def test_a_line_that_is_no_text_changes_nothing(writer: Writer) -> None:
    conversation = Conversation(writer, GREEDY)
    list(conversation.answer("the"))
    before = conversation.text
    with pytest.raises(UserError, match="no valid text|not valid text"):
        next(conversation.answer("a\udcff"))
    assert conversation.text == before

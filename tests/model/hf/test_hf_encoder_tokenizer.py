"""Tokenizers of exported encoders: marks around a text, places to fill, padding on the right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

from model.hf.export import export
from model.hf.proof import forget
from model.hf.tokenizer.convert import write_tokenizer
from model.hf.tokenizer.proof import prove
from model.hf.tokenizer.settings import Use
from pretrain.data.tokens.tokenizer import Tokenizer as TrainingTokenizer
from pretrain.data.tokens.train import special_names, train_tokenizer
from tests.model.hf.tiny import make_encoder, make_weights

SIZE = 340
TEXT = [
    "the deep layers norm the signal",
    "a scale of time in a deep layer",
    "def f(x):\n    return x",
    "größe [MASK] 日本語",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in TEXT * 100))
    path = folder / "bpe.model"
    train_tokenizer([str(folder / "text.jsonl")], path, vocab_size=SIZE, special=special_names("all"))
    return path


def test_a_text_stands_between_marks_and_a_mask_takes_its_space(trained: Path, tmp_path: Path) -> None:
    written = write_tokenizer(trained, tmp_path, 128, Use(encoder=True, token_types=True))
    assert prove(trained, tmp_path, TEXT) == 0
    fast, ours = AutoTokenizer.from_pretrained(tmp_path), TrainingTokenizer(trained)
    cls, sep, mask, pad = (ours.special[role] for role in ("cls", "sep", "mask", "pad"))
    assert (fast.cls_token_id, fast.sep_token_id, fast.mask_token_id, fast.pad_token_id) == (
        cls,
        sep,
        mask,
        pad,
    )
    assert written.special == {"bos_token_id": None, "eos_token_id": None, "pad_token_id": pad}
    first, second = ours.encode("the signal"), ours.encode("a scale")
    batch = fast(["the signal", "the"], ["a scale", "a"], padding=True)
    whole = [cls, *first, sep, *second, sep]
    assert batch["input_ids"][0] == whole
    assert batch["token_type_ids"][0] == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    shorter = batch["attention_mask"][1]
    assert shorter == sorted(shorter, reverse=True)
    assert batch["input_ids"][1][-1] == pad
    assert fast.encode("the [MASK] signal") == [
        cls,
        *ours.encode("the"),
        mask,
        *ours.encode(" signal"),
        sep,
    ]


def test_places_are_filled_through_a_pipeline(trained: Path, tmp_path: Path) -> None:
    """The scheme needs our own code, and the model has no table of token types."""
    config = make_encoder("b2t", vocab_size=SIZE, token_types=0)
    result = export(
        make_weights(config),
        config,
        tmp_path / "out",
        logit_scale=1.0,
        tokenizer=trained,
        seq_length=24,
        sample_texts=TEXT,
    )
    assert result.tokenizer is not None
    assert json.loads((tmp_path / "out/config.json").read_text())["pad_token_id"] == 3
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    fill = pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")
    text = "the deep [MASK] norm the signal"
    answers = fill(text, top_k=3)
    batch = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        scores = model(**batch).logits[batch.input_ids == tokenizer.mask_token_id][0].softmax(-1)
    assert [answer["token"] for answer in answers] == scores.topk(3).indices.tolist()
    forget(model)

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.errors import UserError
from pretrain.config.schema import Corpus
from pretrain.config.sections.masking import Masking
from pretrain.data.manifest import load_manifest
from pretrain.data.masked.masking import MaskVocabulary, document_positions
from pretrain.data.masked.samples import MaskedBlend, open_masked, target_entropy
from pretrain.data.prepare import PrepareOptions, prepare
from pretrain.data.tokens.tokenizer import Tokenizer
from pretrain.data.tokens.train import special_names, train_tokenizer
from tests.pretrain.data.sets import blend, documents, write_set

SEQ = 32
CLS, SEP, PAD, MASK = 1, 2, 3, 4


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets `red` and `blue` with begin marks; `bare` without; `plain` without a mask token."""
    root = tmp_path_factory.mktemp("sets")
    (root / "text.txt").write_text("red blue tiny 0123456789 [MASK] " * 50)
    train_tokenizer(
        [str(root / "text.txt")], root / "special.model", vocab_size=300, special=special_names("all")
    )
    train_tokenizer([str(root / "text.txt")], root / "plain.model", vocab_size=290)
    write_set(root / "red", root / "special.model", "red", 120)
    write_set(root / "blue", root / "special.model", "blue", 60)
    write_set(root / "plain", root / "plain.model", "plain", 20)
    (root / "tiny.jsonl").write_text(
        '{"text": "a"}\n{"text": ""}\n{"text": "[MASK]"}\n' + '{"text": "b"}\n' * 40
    )
    for name, mark in (("tiny", None), ("bare", False)):
        prepare(
            PrepareOptions(
                [str(root / "tiny.jsonl")],
                root / name,
                root / "special.model",
                split=(1.0, 0.0, 0.0),
                workers=1,
                begin_mark=mark,
            )
        )
    return root


def masked(
    sets: Path, *names: str, split: str = "train", seed: int = 7, seq_length: int = SEQ, **settings: Any
) -> MaskedBlend:
    corpora = [Corpus(path=str(sets / name)) for name in names]
    return open_masked(corpora, split, seq_length, seed, sets / "cache", Masking(**settings))


def original(data: MaskedBlend, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a sample before they were masked, and their documents."""
    sample = data.sample(index)
    tokens = sample.masked.inputs.copy()
    real = sample.masked.weights > 0
    tokens[sample.masked.places[real]] = sample.masked.labels[real]
    return tokens, sample.segments


def test_packed_samples_are_the_windows_that_a_decoder_sees(sets: Path) -> None:
    data, decoder = masked(sets, "red", "tiny"), blend(sets, "red", "tiny")
    for index in range(200):
        tokens, segments = original(data, index)
        np.testing.assert_array_equal(tokens, decoder.sample(index)[:-1])
        follows = np.concatenate([[0], tokens[:-1] == SEP])
        np.testing.assert_array_equal(segments, 1 + np.cumsum(follows))
        np.testing.assert_array_equal(tokens[1:][segments[1:] != segments[:-1]], CLS)
    assert any(original(data, index)[1].max() > 5 for index in range(50))


def passes(data: MaskedBlend) -> int:
    return data.blend.samples_per_epoch[0]


def test_one_document_is_one_sample(sets: Path) -> None:
    data, stored = masked(sets, "red", packed=False), documents(sets, "red")
    assert passes(data) == sum(math.ceil(len(document) / SEQ) for document in stored) > len(stored)
    for epoch in range(2):
        read = Counter[int]()
        for index in range(epoch * passes(data), (epoch + 1) * passes(data)):
            tokens, segments = original(data, index)
            ((document, first, length),) = data.blend._readers[0].spans(index)
            assert segments.tolist() == [1] * length + [0] * (SEQ - length)
            assert tokens.tolist() == stored[document][first : first + length] + [PAD] * (SEQ - length)
            read[document] += length
        assert read == Counter({number: len(document) for number, document in enumerate(stored)})


def test_long_documents_are_cut(sets: Path) -> None:
    data = masked(sets, "red", packed=False, long_documents="cut")
    stored = documents(sets, "red")
    assert passes(data) == len(stored)
    read = []
    for index in range(passes(data)):
        tokens, segments = original(data, index)
        read.append(tokens[segments > 0].tolist())
    expected = [each if len(each) <= SEQ else [*each[: SEQ - 1], SEP] for each in stored]
    assert Counter(map(tuple, read)) == Counter(map(tuple, expected))
    assert expected != stored


def test_masks_differ_in_every_pass_and_are_the_same_for_whoever_asks(sets: Path) -> None:
    data = masked(sets, "red", "blue", packed=False)
    number = 2 * passes(data)
    straight = [data.sample(index) for index in range(2 * number)]
    again = masked(sets, "red", "blue", packed=False)
    for index in random.Random(0).sample(range(number), 100):
        other = again.sample(index)
        np.testing.assert_array_equal(other.masked.inputs, straight[index].masked.inputs)
        np.testing.assert_array_equal(other.masked.places, straight[index].masked.places)
    seen: dict[bytes, list[list[int]]] = {}
    for index, sample in enumerate(straight):
        tokens, _ = original(data, index)
        seen.setdefault(tokens.tobytes(), []).append(sample.masked.places.tolist())
    several = [masks for masks in seen.values() if len(masks) > 1 and len(set(masks[0])) > 3]
    assert len(several) > 100
    assert all(any(mask != masks[0] for mask in masks) for masks in several)
    seeded = masked(sets, "red", "blue", packed=False, seed=8)
    assert any((seeded.sample(i).masked.inputs != straight[i].masked.inputs).any() for i in range(20))


def test_evaluations_have_masks_that_no_seed_changes(sets: Path) -> None:
    first, other = (masked(sets, "red", split="validation", seed=seed).batch(range(9)) for seed in (7, 8))
    assert all(torch.equal(first[name], other[name]) for name in first)
    train, moved = (masked(sets, "red", seed=seed).batch(range(9)) for seed in (7, 8))
    assert not torch.equal(train["places"], moved["places"])


@pytest.mark.parametrize("packed", [True, False])
def test_batches_have_static_shapes_and_are_rows_of_samples(sets: Path, packed: bool) -> None:
    data = masked(sets, "red", "tiny", packed=packed, whole_words=True)
    batch = data.batch([5, 3, 4])
    k = round(0.15 * SEQ)
    assert {name: tuple(rows.shape) for name, rows in batch.items()} == {
        "tokens": (3, SEQ),
        "segments": (3, SEQ),
        "positions": (3, SEQ),
        "places": (3, k),
        "labels": (3, k),
        "weights": (3, k),
    }
    assert {name: rows.dtype for name, rows in batch.items() if rows.dtype != torch.int64} == {
        "weights": torch.float32
    }
    blank = data.blank(3)
    assert {name: (rows.shape, rows.dtype) for name, rows in blank.items()} == {
        name: (rows.shape, rows.dtype) for name, rows in batch.items()
    }
    assert (int(blank["weights"].sum()), int(blank["segments"].min())) == (0, 1)
    np.testing.assert_array_equal(batch["positions"], document_positions(batch["segments"].numpy()))
    for row, index in enumerate([5, 3, 4]):
        sample = data.sample(index)
        assert batch["tokens"][row].tolist() == sample.masked.inputs.tolist()
        assert batch["segments"][row].tolist() == sample.segments.tolist()
        assert batch["labels"][row].tolist() == sample.masked.labels.tolist()
    with pytest.raises(IndexError):
        data.sample(-1)


@pytest.mark.parametrize("name", ["red", "tiny", "bare"])
@pytest.mark.parametrize("rate", [0.15, 0.9])
@pytest.mark.parametrize("settings", [{}, {"packed": False}, {"packed": False, "long_documents": "cut"}])
def test_numbers_of_targets_need_no_tokens(
    sets: Path, name: str, rate: float, settings: dict[str, Any]
) -> None:
    data = masked(sets, name, rate=rate, seq_length=16, **settings)
    for index in range(150):
        assert data.targets([index]) == data.sample(index).masked.weights.sum()
    assert data.targets(range(20)) == data.batch(range(20))["weights"].sum()


def test_documents_of_one_letter_and_of_a_mask_in_letters(sets: Path) -> None:
    assert documents(sets, "bare")[0] == documents(sets, "tiny")[0][1:]
    data = masked(sets, "tiny", packed=False)
    assert passes(data) == 42, "empty documents are left out"
    assert {int(data.sample(index).masked.weights.sum()) for index in range(42)} == {1}
    literal = documents(sets, "tiny")[1]
    assert MASK not in literal
    assert Tokenizer(sets / "special.model").decode(literal) == "[MASK]"
    packed = masked(sets, "tiny")
    assert all((packed.sample(index).masked.weights == 1).all() for index in range(20))


def test_the_loss_of_knowing_frequencies(sets: Path) -> None:
    for name in ("red", "tiny", "bare", "plain"):
        counts = np.bincount([token for each in documents(sets, name) for token in each], minlength=300)
        marks = [CLS, SEP] if name in ("red", "tiny") else [SEP]
        text = np.delete(counts, marks)
        shares = text[text > 0] / text.sum()
        expected = -(shares * np.log(shares)).sum()
        assert target_entropy(load_manifest(sets / name)) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    manifest = load_manifest(sets / "red")
    assert target_entropy(manifest.model_copy(update={"unigram_entropy_nats": None})) is None


def test_labels_occur_as_often_as_their_tokens(sets: Path) -> None:
    data = masked(sets, "red", "blue")
    labels = Counter[int]()
    text: dict[int, float] = defaultdict(float)
    for index in range(1500):
        sample = data.sample(index)
        labels.update(sample.masked.labels.tolist())
        tokens, _ = original(data, index)
        plain = tokens[~data.vocabulary.special[tokens]]
        for token in plain:
            text[int(token)] += data.targets_per_sample / len(plain)
    number = sum(labels.values())
    for token, expected in text.items():
        assert abs(labels[token] - expected) <= 5 * (expected * (1 - expected / number)) ** 0.5 + 1


def test_what_cannot_be_masked_is_named(sets: Path) -> None:
    with pytest.raises(UserError, match=r"plain.tokenizer.model has no mask token: .*train --special mask"):
        masked(sets, "plain")
    with pytest.raises(UserError, match=r"red and .*bare: only one of them begins.*--begin-mark"):
        masked(sets, "red", "bare")
    with pytest.raises(UserError, match="masking.rate=0.001 leaves nothing"):
        masked(sets, "red", rate=0.001)
    with pytest.raises(UserError, match="the validation split has 0 tokens, one sample needs a document"):
        masked(sets, "tiny", split="validation", packed=False)


def test_what_masking_knows_of_a_vocabulary(sets: Path) -> None:
    tokenizer = Tokenizer(sets / "special.model")
    vocabulary = MaskVocabulary.of(tokenizer)
    assert np.flatnonzero(vocabulary.special).tolist() == [CLS, SEP, PAD, MASK]
    assert vocabulary.drawable.tolist() == list(range(5, 300)), "no mark, and not the unknown piece"
    for number, text in enumerate(tokenizer.token_bytes()):
        assert vocabulary.begins[number] == text.startswith((b" ", b"\n", b"\t", b"\r", b"\v", b"\f"))

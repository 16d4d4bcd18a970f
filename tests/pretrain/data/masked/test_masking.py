from __future__ import annotations

import hashlib

import numpy as np
import pytest

from model.errors import UserError
from pretrain.config.sections.masking import Masking
from pretrain.data.masked.masking import (
    Masked,
    MaskVocabulary,
    document_positions,
    mask_sample,
    places_per_sample,
    target_count,
)
from pretrain.data.order import sample_key

V, MARKS, MASK = 60, 5, 4
BEGINS = 40
"""Ids from here on begin with a space."""
VOCABULARY = MaskVocabulary(
    MASK,
    padding=3,
    special=np.arange(V) < MARKS,
    drawable=np.arange(MARKS, V),
    begins=np.arange(V) >= BEGINS,
    ends=np.arange(V) == V - 1,
)


def sample(length: int, seed: int, marks: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens, of one document, some of them marks."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(MARKS, V, length)
    tokens[generator.random(length) < marks] = 2
    return tokens, np.ones(length, dtype=np.int64)


def mask(tokens: np.ndarray, segments: np.ndarray, index: int = 0, **settings: object) -> Masked:
    return mask_sample(tokens, segments, Masking(**settings), VOCABULARY, sample_key("mask", 3, index))  # type: ignore[arg-type]


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize(("length", "rate"), [(128, 0.15), (37, 0.4), (512, 0.3), (2, 0.5)])
def test_every_sample_has_exactly_its_share_of_targets(length: int, rate: float, whole_words: bool) -> None:
    for index in range(50):
        tokens, segments = sample(length, index, marks=0.1 if length > 2 else 0)
        before = tokens.copy()
        masked = mask(tokens, segments, index, rate=rate, whole_words=whole_words)
        assert len(masked.places) == round(rate * length) == masked.weights.sum()
        assert (np.diff(masked.places) > 0).all()
        assert (masked.labels == tokens[masked.places]).all()
        assert not (tokens[masked.places] < MARKS).any(), "marks are never to be predicted"
        shown = masked.inputs[masked.places]
        assert ((shown == MASK) | (shown >= MARKS)).all(), "no mark stands in the place of a token"
        rest = np.delete(np.arange(length), masked.places)
        assert (masked.inputs[rest] == tokens[rest]).all()
        assert (tokens == before).all()


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({}, (0.8, 0.1, 0.1)),
        ({"masked_share": 1.0, "random_share": 0.0}, (1.0, 0.0, 0.0)),
        ({"masked_share": 0.5, "random_share": 0.3}, (0.5, 0.3, 0.2)),
    ],
)
def test_shares_of_hidden_exchanged_and_kept_tokens(
    settings: dict[str, float], shares: tuple[float, float, float]
) -> None:
    tokens, segments = sample(128, 0)
    found = np.zeros(3)
    drawn = np.zeros(V)
    for index in range(2000):
        masked = mask(tokens, segments, index, **settings)
        shown = masked.inputs[masked.places]
        same = shown == masked.labels
        found += [(shown == MASK).sum(), ((shown != MASK) & ~same).sum(), same.sum()]
        drawn += np.bincount(shown[(shown != MASK) & ~same], minlength=V)
    number = found.sum()
    assert number == 2000 * 19
    lucky = shares[1] / len(VOCABULARY.drawable)  # a random token may be the one that stood there
    for count, share in zip(found, (shares[0], shares[1] - lucky, shares[2] + lucky), strict=True):
        assert abs(count / number - share) <= 4.5 * (share * (1 - share) / number) ** 0.5
    if shares[1]:
        assert (drawn[:MARKS] == 0).all()
        assert (drawn[MARKS:] > 0).all()


@pytest.mark.parametrize("whole_words", [False, True])
def test_all_places_are_taken_equally_often(whole_words: bool) -> None:
    """Where words have equal lengths, whole words make no difference to a place alone."""
    tokens, segments = np.tile([BEGINS, MARKS], 20), np.ones(40, dtype=np.int64)
    taken = np.zeros(40)
    for index in range(2000):
        masked = mask(tokens, segments, index, rate=0.2, whole_words=whole_words)
        taken[masked.places] += 1
    assert (abs(taken / 2000 - 0.2) <= 4.5 * (0.2 * 0.8 / 2000) ** 0.5).all()


def test_a_mask_is_a_function_of_seed_and_index() -> None:
    """The numbers stand here: neither another numpy nor another order of draws goes unseen."""
    expected = int.from_bytes(hashlib.sha256(b"mask/3/7").digest()[:16], "little")
    assert sample_key("mask", 3, 7) == expected
    tokens, segments = np.arange(20) + MARKS, np.ones(20, dtype=np.int64)
    masked = mask(tokens, segments, 7, rate=0.3)
    assert masked.places.tolist() == [1, 3, 4, 16, 17, 19]
    assert masked.inputs[masked.places].tolist() == [4, 4, 4, 4, 28, 4]
    keys = {sample_key("mask", seed, index) for seed in (None, 0, 3, 30, 31) for index in range(40)}
    assert len(keys) == 200, "no two samples share a mask"
    assert sample_key("mask", None, 7) == int.from_bytes(hashlib.sha256(b"mask/7").digest()[:16], "little")


def words_of(tokens: np.ndarray, segments: np.ndarray) -> list[list[int]]:
    """Places of each word, the slow way."""
    words: list[list[int]] = []
    for place, token in enumerate(tokens):
        alone = place == 0 or token < MARKS or tokens[place - 1] < MARKS
        if alone or token >= BEGINS or tokens[place - 1] == V - 1 or segments[place] != segments[place - 1]:
            words.append([])
        words[-1].append(place)
    return words


def test_words_are_taken_whole_but_for_the_last() -> None:
    cut, chances = 0, [[0, 0] for _ in range(4)]
    for index in range(400):
        tokens, _ = sample(100, index % 7)
        segments = np.repeat([1, 2], 50)
        masked = mask(tokens, segments, index, whole_words=True)
        chosen = set(masked.places.tolist())
        words = [word for word in words_of(tokens, segments) if tokens[word[0]] >= MARKS]
        parts = [word for word in words if 0 < len(chosen & set(word)) < len(word)]
        assert len(parts) <= 1
        assert all(word[0] in chosen for word in parts), "the first pieces of a cut word are taken"
        cut += len(parts)
        for word in words:
            chances[min(len(word), 4) - 1][0] += word[0] in chosen
            chances[min(len(word), 4) - 1][1] += 1
    assert 0 < cut < 400
    shares = [taken / number for taken, number in chances]
    assert max(shares) - min(shares) < 0.04, "long words are not preferred to short ones"


@pytest.mark.parametrize("whole_words", [False, True])
def test_where_text_is_short_the_rest_has_no_weight(whole_words: bool) -> None:
    tokens = np.array([1, 10, 11, 12, 2] + [3] * 35)
    segments = np.array([1] * 5 + [0] * 35)
    for index in range(20):
        masked = mask(tokens, segments, index, rate=0.5, whole_words=whole_words)
        assert masked.weights.tolist() == [1.0] * 2 + [0.0] * 18  # round(5 / 2)
        assert set(masked.places[:2]) < {1, 2, 3}
        assert not masked.places[2:].any()
        assert not masked.labels[2:].any()
        assert (masked.inputs[4:] == tokens[4:]).all()
    for tokens in (np.array([1, 10, 2, 3]), np.array([1, 2, 3, 3])):
        masked = mask(tokens, np.array([1, 1, 1, 0]), rate=0.9, whole_words=whole_words)
        assert masked.weights.sum() == (tokens >= MARKS).sum()
    nothing = mask(np.full(8, 3), np.zeros(8, dtype=np.int64), whole_words=whole_words)
    assert (nothing.weights.sum(), len(nothing.weights)) == (0, 1)


def test_numbers_of_targets() -> None:
    assert [target_count(0.15, *sizes) for sizes in ((128, 120), (3, 1), (0, 0), (100, 7))] == [19, 1, 0, 7]
    assert places_per_sample(0.15, 128) == 19
    with pytest.raises(UserError, match=r"masking.rate=0.001 leaves nothing .*seq_length=128: .* 0.00391"):
        places_per_sample(0.001, 128)
    assert places_per_sample(0.00391, 128) == 1


def test_positions_start_again_with_every_document() -> None:
    segments = np.array([[1, 1, 1, 2, 3, 3, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2]])
    assert document_positions(segments).tolist() == [[0, 1, 2, 0, 0, 1, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6]]
    assert document_positions(segments[0]).tolist() == [0, 1, 2, 0, 0, 1, 0, 1]

"""Hidden spans: source and target give the text back, and chance is what it should be."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from model.errors import UserError
from pretrain.config.schema import Corpus
from pretrain.config.sections.spans import SpanCounts, Spans, span_counts
from pretrain.data.manifest import load_manifest
from pretrain.data.order import micro_batch_indices, sample_key
from pretrain.data.spans.corruption import corrupted, parts, span_lengths
from pretrain.data.spans.samples import SpanBlend, label_entropy, open_spans
from pretrain.data.tokens.train import special_names, train_tokenizer
from tests.pretrain.data.sets import blend, documents, write_set

LENGTHS = 40, 20
SPACED = {"density": 0.3, "mean_length": 2.0}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets `red` and `blue` with 12 sentinels, and `plain` without."""
    root = tmp_path_factory.mktemp("spans")
    (root / "text.txt").write_text("red blue plain 0123456789 " * 50)
    text = [str(root / "text.txt")]
    train_tokenizer(text, root / "t.model", vocab_size=300, special=special_names("pad,sentinels=12"))
    train_tokenizer(text, root / "plain.model", vocab_size=290)
    write_set(root / "red", root / "t.model", "red", 120)
    write_set(root / "blue", root / "t.model", "blue", 60)
    write_set(root / "plain", root / "plain.model", "plain", 20)
    return root


def opened(
    sets: Path,
    *names: str,
    split: str = "train",
    seed: int = 7,
    lengths: tuple[int, int] = LENGTHS,
    **settings: Any,
) -> SpanBlend:
    corpora = [Corpus(path=str(sets / name)) for name in names]
    return open_spans(corpora, split, lengths, seed, sets / "cache", Spans(**(settings or SPACED)))


def t5_lengths(inputs: int, density: float, mean: float) -> tuple[int, int]:
    """Text and targets of T5's code for inputs of a length, step by step."""

    def both(tokens: int) -> tuple[int, int]:
        noise = round(tokens * density)
        spans = round(noise / mean)
        return tokens - noise + spans + 1, noise + spans + 1

    tokens = inputs - 1
    while both(tokens + 1)[0] <= inputs:
        tokens += 1
    return tokens, both(tokens)[1]


@pytest.mark.parametrize("inputs", [32, 100, 128, 512, 1024])
@pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.15, 8.0), (0.5, 3.0), (0.3, 2.0), (0.5, 32.0)])
def test_lengths_are_those_of_t5(inputs: int, density: float, mean: float) -> None:
    text, target = t5_lengths(inputs, density, mean)
    found = span_counts(Spans(density=density, mean_length=mean), inputs, target)
    assert (found.tokens, found.target) == (text, target)
    assert found.source == inputs
    shorter = span_counts(Spans(density=density, mean_length=mean), inputs, target - 1)
    assert shorter.tokens < text, "what does not fit the decoder is not cut off"
    assert span_counts(Spans(density=density, mean_length=mean), inputs, 4 * inputs) == found


def test_the_published_lengths() -> None:
    """Encoder 512, decoder 114, of 568 tokens: the figures in T5's code."""
    assert span_counts(Spans(), 512, 114) == SpanCounts(568, 85, 28)


def put_back(source: list[int], target: list[int], sentinels: list[int]) -> list[int]:
    """The text, token by token: for a sentinel of the source the target says what stood there."""
    spans: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token in sentinels:
            assert token not in spans
            spans[token] = []
        else:
            spans[[*spans][-1]].append(token)
    assert [*spans] == sentinels == [token for token in source if token in sentinels]
    assert all(spans.values())
    return [one for token in source[:-1] for one in spans.get(token, [token])]


@pytest.mark.parametrize(
    "settings", [{}, SPACED, {"density": 0.5, "mean_length": 1}, {"density": 0.9, "mean_length": 9}]
)
def test_source_and_target_give_the_text_back(sets: Path, settings: dict[str, float]) -> None:
    data = opened(sets, "red", "blue", **dict[str, Any](settings or {"density": 0.15}))
    text = blend(sets, "red", "blue", seq_length=data.counts.tokens)
    marks = [data.eod_id] * 2
    for index in range(150):
        source, target = data.sample(index)
        assert (len(source), len(target)) == (data.counts.source, data.counts.target)
        assert [source[-1], target[-1]] == marks
        found = put_back(source.tolist(), target.tolist(), data.vocabulary.sentinels.tolist())
        assert found == text.sample(index)[:-1].tolist()


def test_batches_are_what_encoder_and_decoder_read(sets: Path) -> None:
    data = opened(sets, "red", lengths=(40, 30))
    batch = data.batch([3, 5])
    used = data.counts.target
    assert data.counts.source == 40 > used
    for row, index in enumerate((3, 5)):
        source, target = (side.tolist() for side in data.sample(index))
        assert batch["source"][row].tolist() == source
        assert batch["labels"][row].tolist() == target + [3] * (30 - used)
        assert batch["tokens"][row].tolist() == [data.eod_id, *target[:-1]] + [3] * (30 - used)
        assert batch["weights"][row].tolist() == [1] * used + [0] * (30 - used)
    assert torch.equal(batch["documents"], batch["weights"].long())
    assert bool((batch["source_documents"] == 1).all())
    assert data.targets([3, 5]) == data.tokens_before(2) == 2 * used == int(batch["weights"].sum())
    assert data.padding_share == pytest.approx((30 - used) / 70)
    assert data.padding_share == pytest.approx((30 - used) / 70)
    blank = data.blank(2)
    forms = [{name: (rows.shape, rows.dtype) for name, rows in one.items()} for one in (batch, blank)]
    assert forms[0] == forms[1]
    assert not blank["weights"].any()
    assert data.batch([]).keys() == batch.keys()
    [line] = data.report()
    padding = f"{1 - used / 30:.0%} of data.seq_length=30 is padding: set {used}"
    assert line.endswith(f"sources of 40 and targets of {used} tokens; {padding}")
    assert "padding" not in opened(sets, "red", lengths=(40, used)).report()[0]


def test_samples_depend_on_seed_and_number_alone(sets: Path) -> None:
    """Two ranks of a step read what one process reads, also after a restart in a later pass."""
    step, micro, size = 40, 2, 8
    whole = opened(sets, "red", "blue").batch(range(step * size, (step + 1) * size))
    for rank in (1, 0):
        again = opened(sets, "red", "blue")
        for number in range(2):
            indices = micro_batch_indices(step, number, rank, 2, micro, size)
            for name, tensor in again.batch(indices).items():
                place = slice(indices.start - step * size, indices.stop - step * size)
                assert torch.equal(tensor, whole[name][place])
    others = [opened(sets, "red", seed=seed, split=split).batch([0])["source"]
              for split in ("train", "validation") for seed in (7, 8)]  # fmt: skip
    assert not torch.equal(*others[:2])
    assert torch.equal(*others[2:])


def test_the_numbers_of_a_sample() -> None:
    """Neither another numpy nor another order of draws goes unseen."""
    assert sample_key("spans", 3, 7) == int.from_bytes(hashlib.sha256(b"spans/3/7").digest()[:16], "little")
    assert sample_key("spans", None, 7) == int.from_bytes(hashlib.sha256(b"spans/7").digest()[:16], "little")
    counts = SpanCounts.of(Spans(**SPACED), 20)
    keys = {sample_key("spans", seed, index) for seed in (None, 0, 3, 30, 31) for index in range(40)}
    assert len(keys) == 200, "no two samples, in whichever pass, share their spans' key"
    lengths = span_lengths(counts, sample_key("spans", 3, 7))
    assert lengths.tolist() == [[1, 2], [10, 1], [3, 3]]
    source, target = corrupted(np.arange(20), lengths, np.array([90, 91, 92]), 2)
    assert put_back(source.tolist(), target.tolist(), [90, 91, 92]) == list(range(20))


def test_all_ways_to_cut_are_equally_likely() -> None:
    generator = np.random.Philox(key=5)
    found = Counter(tuple(parts(generator.random_raw(6), 3).tolist()) for _ in range(15_000))
    ways = [way for way in itertools.product(range(1, 6), repeat=3) if sum(way) == 7]
    assert set(found) == set(ways)
    expected = 15_000 / len(ways)
    chi_square = sum((found[way] - expected) ** 2 / expected for way in ways)
    assert chi_square < 36, "14 degrees of freedom: one in a thousand is above 36.1"


def test_places_are_hidden_as_often_as_they_should() -> None:
    """Against all pairs of cuts of 4 hidden and 6 seen tokens into two, counted."""
    counts = SpanCounts(10, 4, 2)
    exact = np.zeros(10)
    ways = list(itertools.product(range(1, 6), range(1, 4)))
    for seen, hidden in ways:
        exact[seen : seen + hidden] += 1 / len(ways)
        exact[10 - (4 - hidden) :] += 1 / len(ways)
    found = np.zeros(10)
    number = 4000
    for index in range(number):
        lengths = span_lengths(counts, sample_key("spans", 1, index))
        ends = np.cumsum(lengths.ravel())
        for first, stop in zip(ends[::2], ends[1::2], strict=True):
            found[first:stop] += 1
    spread = 4.5 * np.sqrt(exact * (1 - exact) / number)
    assert (abs(found / number - exact) <= spread + 1e-12).all()


def test_the_entropy_and_the_frequencies_are_those_of_labels(sets: Path) -> None:
    data = opened(sets, "red")
    counts, share = data.counts, data.counts.hidden / data.counts.target
    text = np.bincount(np.concatenate(documents(sets, "red")), minlength=300)
    labels = share * text / text.sum()
    for mark in (*data.vocabulary.sentinels, data.eod_id):
        labels[mark] += 1 / counts.target
    assert labels.sum() == pytest.approx(1, rel=1e-12)
    entropy = -sum(p * math.log(p) for p in labels if p)
    found = label_entropy(load_manifest(sets / "red"), counts)
    assert found == pytest.approx(entropy, rel=1e-6)
    smoothed = share * (text + 1) / (text + 1).sum()
    for mark in (*data.vocabulary.sentinels, data.eod_id):
        smoothed[mark] += 1 / counts.target
    np.testing.assert_allclose(data.log_frequencies().numpy(), np.log(smoothed), rtol=1e-12)


def test_what_cannot_be_is_told(sets: Path) -> None:
    with pytest.raises(UserError, match=r"plain.* has no sentinels, .* hide \d+ spans .*sentinels=\d+`"):
        opened(sets, "plain")
    with pytest.raises(UserError, match=r"has 12 sentinels, .* hide 19 spans of a text: .*sentinels=19"):
        opened(sets, "red", lengths=(65, 60), density=0.3, mean_length=1.0)
    with pytest.raises(UserError, match=r"one sample needs 9081 for a text and the token after it; prepare"):
        opened(sets, "red", lengths=(9000, 200), split="validation", density=0.01, mean_length=9.0)
    with pytest.raises(ValidationError, match=r"less than one token between spans: set spans.mean_length=4"):
        Spans(density=0.8, mean_length=3)
    for lengths, name in (((2, 9), "source_length"), ((9, 2), "seq_length")):
        with pytest.raises(ValueError, match=rf"data\.{name}=2 is too short for train.task=span_corruption"):
            span_counts(Spans(), *lengths)


def test_texts_of_every_length_have_spans() -> None:
    draw = random.Random(1)
    for tokens in [*range(2, 40), 1000]:
        density = draw.uniform(0.001, 0.9)
        settings = Spans(density=density, mean_length=max(1.0, density / (1 - density)) + draw.random())
        counts = SpanCounts.of(settings, tokens)
        lengths = span_lengths(counts, sample_key("spans", 0, tokens))
        assert lengths.min() >= 1
        assert lengths.sum(axis=0).tolist() == [tokens - counts.hidden, counts.hidden]

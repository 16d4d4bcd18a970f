from __future__ import annotations

import random
import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model.errors import UserError
from pretrain.config.schema import Corpus
from pretrain.data.blend import Prefetcher, micro_batch_indices, open_blend
from pretrain.data.order import BlendPattern, EpochOrder
from tests.pretrain.data.sets import SEQ, blend, documents, write_sets


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("sets"))


def test_one_pass_reads_every_document_once_in_a_new_order(sets: Path) -> None:
    data = blend(sets, "red")
    count = data.samples_per_epoch[0]
    stored = documents(sets, "red")
    assert count == (sum(map(len, stored)) - 1) // SEQ
    passes = []
    for epoch in range(2):
        samples = [data.sample(epoch * count + index).tolist() for index in range(count)]
        assert {len(sample) for sample in samples} == {SEQ + 1}
        order = data._readers[0].order(epoch)
        assert isinstance(order, EpochOrder)
        assert sorted(order.samples.tolist()) == list(range(count))
        in_stream = [sample for _, sample in sorted(zip(order.samples.tolist(), samples, strict=True))]
        stream = in_stream[0] + [token for sample in in_stream[1:] for token in sample[1:]]
        assert all(left[-1] == right[0] for left, right in pairwise(in_stream)), "neighbours share one token"
        read = [[*document, data.eod_id] for document in split_at(stream, data.eod_id)]
        assert Counter(map(tuple, read[:-1])) <= Counter(map(tuple, stored))
        assert len(read) >= len(stored) - SEQ, "only the rest that fills no sample is left out"
        passes.append(read)
    assert passes[0] != passes[1]
    assert passes[0][:-1] != stored[: len(passes[0]) - 1]


def split_at(stream: list[int], mark: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in stream:
        if token == mark:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def test_a_sample_is_a_function_of_its_position(sets: Path) -> None:
    """A fresh reader that starts anywhere, as after a resume, sees what the first one saw."""
    first = blend(sets, "red", "blue", weights=(2.0, 1.0))
    straight = [first.sample(index) for index in range(600)]
    assert sum(first.samples_per_epoch) < 600, "several passes are covered"
    resumed = blend(sets, "red", "blue", weights=(2.0, 1.0))
    for index in random.Random(0).sample(range(600), 200):
        np.testing.assert_array_equal(resumed.sample(index), straight[index])
    np.testing.assert_array_equal(resumed.batch(range(300, 310)).numpy(), straight[300:310])
    for changed in (
        blend(sets, "red", "blue", weights=(2.0, 1.0), seed=8),
        blend(sets, "red", "blue", weights=(1.0, 2.0)),
    ):
        assert any((changed.sample(index) != straight[index]).any() for index in range(20))


def test_moving_the_folders_changes_nothing(sets: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").symlink_to(sets / "red")
    moved = open_blend([Corpus(path=str(tmp_path / "elsewhere"))], "train", SEQ, 7, None)
    assert (tmp_path / "index_cache").is_dir()
    np.testing.assert_array_equal(moved.batch(range(50)), blend(sets, "red").batch(range(50)))


def test_many_passes_over_little_data_leave_one_file(
    sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpora = [Corpus(path=str(sets / "red"))]
    few = open_blend(corpora, "train", SEQ, 7, tmp_path / "few")
    samples = range(4 * few.samples_per_epoch[0])
    read = few.batch(samples)
    assert len(list((tmp_path / "few").iterdir())) == 1
    monkeypatch.setattr("pretrain.data.blend.STORED_FROM", 0)
    many = open_blend(corpora, "train", SEQ, 7, tmp_path / "many")
    np.testing.assert_array_equal(many.batch(samples), read)
    assert len(list((tmp_path / "many").iterdir())) == 4


def test_positions_far_away(sets: Path) -> None:
    data = blend(sets, "red", "blue")
    assert data.sample(10**9 + 7).shape == (SEQ + 1,)
    with pytest.raises(IndexError, match="positions start at 0"):
        data.sample(-1)


def test_shares_follow_the_weights(sets: Path) -> None:
    data = blend(sets, "red", "blue", weights=(3.0, 1.0))
    corpora = [data._pattern.locate(index) for index in range(4000)]
    for length in (40, 400, 4000):
        assert abs(sum(corpus == 0 for corpus, _ in corpora[:length]) - 0.75 * length) <= 1
    assert [sample for corpus, sample in corpora if corpus == 1] == list(range(1000)), (
        "each corpus is read without gaps"
    )


def test_the_pattern_goes_on_across_blocks() -> None:
    pattern = BlendPattern([0.5, 0.3, 0.2], block=100)
    seen = [pattern.locate(index) for index in range(1000)]
    for corpus, share in enumerate((500, 300, 200)):
        assert [sample for number, sample in seen if number == corpus] == list(range(share))
    assert seen[:10] == [BlendPattern([0.5, 0.3, 0.2]).locate(index) for index in range(10)]
    with pytest.raises(UserError, match=r"data.corpora.1.weight=0.001"):
        BlendPattern([1.0, 0.001], block=100)


def test_batches_and_properties(sets: Path) -> None:
    data = blend(sets, "red")
    batch = data.batch([3, 1, 3])
    assert (batch.shape, batch.dtype) == ((3, SEQ + 1), torch.int64)
    assert torch.equal(batch[0], batch[2])
    assert batch[1].tolist() == data.sample(1).tolist()
    assert (data.vocab_size, data.eod_id, data.manifests[0].splits["train"].documents) == (
        290,
        2,
        len(documents(sets, "red")),
    )


def test_validation_has_one_order_that_no_seed_changes(sets: Path) -> None:
    data = blend(sets, "red", split="validation")
    count = data.samples_per_epoch[0]
    np.testing.assert_array_equal(
        data.batch(range(count)),
        blend(sets, "red", split="validation", seed=99).batch(range(count, 2 * count)),
    )


def test_mistakes_are_named(sets: Path, tmp_path: Path) -> None:
    tokens = sum(map(len, documents(sets, "short")))
    with pytest.raises(
        UserError,
        match=rf"short: the train split has {tokens} tokens, one sample needs seq_length \+ 1 = {tokens + 1}",
    ):
        blend(sets, "short", seq_length=tokens)
    assert blend(sets, "short", seq_length=tokens - 1).sample(0).shape == (tokens,)
    with pytest.raises(UserError, match="the validation split has 0 tokens.*train.eval_samples=0"):
        blend(sets, "short", split="validation")
    with pytest.raises(UserError, match=r"red and .*other were prepared with different tokenizers"):
        blend(sets, "red", "other")
    with pytest.raises(UserError, match="hold the same data"):
        blend(sets, "red", "red")
    with pytest.raises(UserError, match="absent: no readable dataset.json"):
        blend(sets, "absent")


def test_a_read_only_cache_is_said_to_many_and_not_needed_by_one(sets: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    corpora, cache = [Corpus(path=str(sets / "red"))], tmp_path / "file" / "cache"
    with pytest.raises(UserError, match="data.cache: no sample indices can be written"):
        open_blend(corpora, "train", SEQ, 7, cache)
    alone = open_blend(corpora, "train", SEQ, 7, cache, alone=True)
    np.testing.assert_array_equal(alone.batch(range(20)), blend(sets, "red").batch(range(20)))


def test_prefetching_keeps_order_measures_waiting_and_passes_errors_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits, now = threading.Event(), 0.0

    def perf_counter() -> float:
        waits.set()  # the first reading is that of a caller about to wait
        return now

    def fetch(position: int) -> int:
        nonlocal now
        if position == 5:
            assert waits.wait(240)
            now += 0.15
        if position == 8:
            raise OSError("disk gone")
        return position * position

    monkeypatch.setattr("pretrain.data.prefetch.time", SimpleNamespace(perf_counter=perf_counter))
    with Prefetcher(fetch, 5, 10) as loader:
        assert loader.get() == 25
        assert loader.last_wait_s == 0.15
        assert [loader.get(), loader.get()] == [36, 49]
        assert loader.last_wait_s == 0.0
        with pytest.raises(OSError, match="disk gone"):
            loader.get()
    assert list(Prefetcher(abs, 2, 3)) == [2, 3, 4]


def test_prefetching_works_while_the_caller_computes() -> None:
    fetched = [threading.Event() for _ in range(6)]
    with Prefetcher(lambda position: fetched[position].set(), 0, 6, depth=2) as loader:
        for position in range(6):
            assert all(event.wait(240) for event in fetched[position : position + 2]), (
                "nothing is loaded ahead of the caller"
            )
            assert not any(event.is_set() for event in fetched[position + 2 :])
            loader.get()


@pytest.mark.parametrize(("dp_size", "micro", "world"), [(1, 2, 12), (2, 3, 12), (4, 3, 12), (3, 1, 12)])
def test_a_step_uses_each_sample_once_whatever_the_layout(dp_size: int, micro: int, world: int) -> None:
    per_rank = world // (micro * dp_size)
    for step in (0, 5):
        used = [
            list(micro_batch_indices(step, k, rank, dp_size, micro, world))
            for k in range(per_rank)
            for rank in range(dp_size)
        ]
        assert [index for part in used for index in part] == list(range(step * world, (step + 1) * world))


def test_batch_sizes_that_do_not_divide_are_named() -> None:
    with pytest.raises(
        ValueError, match="a global batch of 12 does not divide into micro-batches of 5 over 2"
    ):
        micro_batch_indices(0, 0, 0, 2, 5, 12)
    with pytest.raises(ValueError, match="no micro-batch 3"):
        micro_batch_indices(0, 3, 0, 2, 2, 12)

"""Rows hold every pair once, and are functions of seed and number alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.errors import UserError
from pretrain.config.schema import Corpus
from pretrain.data.indexed import IndexedDataset
from pretrain.data.manifest import PAIRED
from pretrain.data.order import micro_batch_indices
from pretrain.data.pairs.packing import Packing, pack
from pretrain.data.pairs.samples import PairBlend, open_pairs
from pretrain.data.prepare_pairs import PairOptions, prepare_pairs
from pretrain.data.reading.pairs import Sides
from pretrain.data.tokens.train import train_tokenizer
from tests.pretrain.data.sets import write_set

LENGTHS = 40, 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets `pairs`, 300 pairs of 2 to 12 digits a side, some longer than a row, and `text`."""
    root = tmp_path_factory.mktemp("pairs")
    (root / "text.txt").write_text("0123456789 red " * 50)
    train_tokenizer([str(root / "text.txt")], root / "t.model", vocab_size=280)
    generator = np.random.Generator(np.random.Philox(3))
    lines = []
    for number in range(300):
        one, two = (generator.integers(0, 10, size) for size in generator.integers(2, 13, 2))
        text = "".join(map(str, one)) + ("9" * 60 if number % 50 == 0 else "")
        lines.append(f"{number:03d}{text}\t{''.join(map(str, two))}")
    (root / "p.tsv").write_text("\n".join(lines))
    given = PairOptions(
        [str(root / "p.tsv")], root / "pairs", root / "t.model", sides=Sides("1", "2"), workers=1
    )
    prepare_pairs(given)
    write_set(root / "text", root / "t.model", "red", 20)
    return root


def rows(folder: Path, seed: int = 7, split: str = "train") -> PairBlend:
    return open_pairs([Corpus(path=str(folder / "pairs"))], split, LENGTHS, seed, folder / "cache")


def test_a_pass_holds_every_pair_that_fits_once(folder: Path) -> None:
    blend = rows(folder)
    count = blend.samples_per_epoch[0]
    sides = [IndexedDataset(str(folder / "pairs" / name)) for name in PAIRED["train"]]
    pairs = [tuple(tuple(side[at].tolist()) for side in sides) for at in range(len(sides[0]))]
    wanted = Counter(pair for pair in pairs if len(pair[0]) <= LENGTHS[0] and len(pair[1]) <= LENGTHS[1])
    assert len(pairs) > sum(wanted.values())
    passes = []
    for first in (0, count):
        batch = blend.batch(range(first, first + count))
        found: Counter[tuple[tuple[int, ...], ...]] = Counter()
        for row in range(count):
            for number in range(1, int(batch["documents"][row].max()) + 1):
                source = batch["source"][row][batch["source_documents"][row] == number]
                inside = batch["documents"][row] == number
                labels, inputs = batch["labels"][row][inside], batch["tokens"][row][inside]
                assert inputs.tolist() == [blend.eod_id, *labels[:-1].tolist()]
                assert labels[-1] == source[-1] == blend.eod_id
                assert batch["positions"][row][inside].tolist() == list(range(len(labels)))
                assert (
                    batch["source_positions"][row][batch["source_documents"][row] == number][-1]
                    == len(source) - 1
                )
                found[tuple(source.tolist()), tuple(labels.tolist())] += 1
        assert found == wanted
        assert torch.equal(batch["weights"], (batch["documents"] > 0).float())
        assert int(batch["weights"].sum()) == blend.targets(range(first, first + count))
        assert not batch["source_positions"][batch["source_documents"] == 0].any()
        passes.append(batch["source"])
    assert not torch.equal(*passes)


def test_rows_depend_on_seed_and_number_alone(folder: Path) -> None:
    """Two ranks of a step read what one process reads, also after a restart in a third pass."""
    step, micro, size = 70, 2, 8
    whole = rows(folder).batch(range(step * size, (step + 1) * size))
    for rank in (1, 0):
        again = rows(folder)  # a new process
        for number in range(2):
            indices = micro_batch_indices(step, number, rank, 2, micro, size)
            batch = again.batch(indices)
            for name, tensor in batch.items():
                assert torch.equal(
                    tensor, whole[name][indices.start - step * size : indices.stop - step * size]
                )
    assert not torch.equal(
        rows(folder, seed=8).batch(range(8))["source"], rows(folder).batch(range(8))["source"]
    )
    held_out = [rows(folder, seed, "validation").batch([0])["source"] for seed in (7, 8)]
    assert torch.equal(*held_out)


def test_rows_are_full_and_what_is_left_out_is_told(folder: Path) -> None:
    blend = rows(folder)
    reader = blend._pairs[0]
    generator = np.random.Generator(np.random.Philox(1))
    lengths = generator.integers(3, 30, (4000, 2))
    packing = Packing.of(pack(lengths, 128, 128), lengths)
    assert max(packing.padding(128, 128)) < 0.1
    assert max(packing.sources.max(), packing.targets.max()) <= 128
    assert np.bincount(packing.pairs, minlength=4000).tolist() == [1] * 4000
    assert packing.targets.sum() == lengths[:, 1].sum()
    assert f"{reader.packing.left_out} pairs are longer than a row and left out" in reader.report()


def test_tokens_of_targets_are_counted_without_reading(folder: Path) -> None:
    """Over passes, and over data sets of which one comes three times as often."""
    one = rows(folder)
    mixed = PairBlend(one._pairs * 2, [1.0, 3.0], one.padding)
    count = one.samples_per_epoch[0]
    for blend in (one, mixed):
        for samples in (0, 1, 5, count, 2 * count + 3, 5):
            assert blend.tokens_before(samples) == blend.targets(range(samples))
    assert one.padding_share == pytest.approx(mixed.padding_share)


def test_blanks_have_the_form_of_a_batch(folder: Path) -> None:
    blend = rows(folder)
    forms = [{name: (rows.shape, rows.dtype) for name, rows in batch.items()}
             for batch in (blend.batch([0, 1]), blend.blank(2))]  # fmt: skip
    assert forms[0] == forms[1]


def test_data_without_pairs_that_fit_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="text holds no pairs.*prepare it with `fathom data prepare --pairs`"):
        open_pairs([Corpus(path=str(folder / "text"))], "train", LENGTHS, 7, folder / "cache")
    with pytest.raises(UserError, match="no pair of the train split fits data.source_length=2"):
        open_pairs([Corpus(path=str(folder / "pairs"))], "train", (2, 2), 7, folder / "cache")
    few = PairOptions([str(folder / "p.tsv")], folder / "few", folder / "t.model", (1, 0, 0), workers=1)
    prepare_pairs(replace(few, sides=Sides("1", "2")))
    with pytest.raises(UserError, match="few: the validation split has no pairs; .*train.eval_samples=0"):
        open_pairs([Corpus(path=str(folder / "few"))], "validation", LENGTHS, 7, folder / "cache")

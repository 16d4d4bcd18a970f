"""A split that a data set does not have, of every kind of data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from model.errors import UserError
from pretrain.config.schema import Corpus
from pretrain.data.blend import open_blend
from pretrain.data.dataset_admin import inspect_dataset
from pretrain.data.images.samples import ImageReader
from pretrain.data.pairs.samples import PairReader
from pretrain.data.speech.samples import ClipReader
from tests.pretrain.clips import write_speech
from tests.pretrain.pictures import picture_data
from tests.pretrain.small import small_data, small_pairs

Opens = Callable[[Path, str], object]


def speech_data(folder: Path) -> Path:
    write_speech(folder, 8)
    return folder / "data"


KINDS: dict[str, tuple[Callable[[Path], Path], Opens]] = {
    "text": (small_data, lambda data, split: open_blend([Corpus(path=str(data))], split, 8, 0, data)),
    "pairs": (small_pairs, lambda data, split: PairReader(str(data), split, (8, 8), 0, data, True)),
    "images": (picture_data, lambda data, split: ImageReader(str(data), split, 0, data)),
    "speech": (speech_data, lambda data, split: ClipReader(str(data), split, (999, 8), 0, data, True)),
}
"""How a data set is made, and how training and `fathom eval` open a split."""


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_split_is_named_beside_those_that_there_are(tmp_path: Path, kind: str) -> None:
    make, opens = KINDS[kind]
    data = make(tmp_path)
    for look in (inspect_dataset, opens):
        with pytest.raises(UserError) as caught:
            look(data, "foo")
        assert str(caught.value) == f"data set {data}: no split 'foo'; it has train, validation, test"

from __future__ import annotations

import numpy as np
import pytest

from pretrain.data.masked.single import Single

LENGTHS = np.array([1, 16, 17, 5, 160, 161, 31], dtype=np.int32)


def spans(cut: Single, key: int = 1) -> list[list[tuple[int, int, int]]]:
    index = cut.build(LENGTHS, key)
    number = cut.samples(int(LENGTHS.sum()), LENGTHS)
    assert len(index) == cut.stored(len(LENGTHS), number)
    order = cut.order(index, LENGTHS)
    return [list(order.spans(sample)) for sample in range(number)]


def test_parts_of_documents_are_alike_and_leave_nothing_out() -> None:
    parts = spans(Single(16, "split"))
    assert len(parts) == 1 + 1 + 2 + 1 + 10 + 11 + 2
    for document, length in enumerate(LENGTHS):
        own = sorted(part[0][1:] for part in parts if part[0][0] == document)
        sizes = [size for _, size in own]
        assert max(sizes) <= 16
        assert max(sizes) - min(sizes) <= 1
        assert [first for first, _ in own] == np.cumsum([0, *sizes])[:-1].tolist()
        assert sum(sizes) == length


def test_a_document_that_is_cut_keeps_its_end_mark() -> None:
    parts = spans(Single(16, "cut"))
    whole = {0: 1, 1: 16, 3: 5}
    expected = [
        [(document, 0, length)] if document in whole else [(document, 0, 15), (document, length - 1, 1)]
        for document, length in enumerate(LENGTHS.tolist())
    ]
    assert sorted(parts) == expected


@pytest.mark.parametrize("long", ["split", "cut"])
def test_every_pass_has_an_order_of_its_own(long: str) -> None:
    cut = Single(16, long)  # type: ignore[arg-type]
    assert spans(cut) == spans(cut)
    assert spans(cut, 1) != spans(cut, 2)
    assert sorted(spans(cut, 1)) == sorted(spans(cut, 2))
    assert cut.name not in (Single(17, cut.long).name, "length16")

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pretrain.config.sections.masking import Masking


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"masked_share": 1.0}, "masking.masked_share=1 and masking.random_share=0.1 add up to more than 1"),
        ({"long_documents": "cut"}, "masking.long_documents=cut has no effect with masking.packed=true"),
        ({"rate": 0.0}, "greater than or equal to 0.001"),
        ({"rate": 0.95}, "less than or equal to 0.9"),
        ({"masked_share": 0.0}, "greater than 0"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Masking(**given)


def test_shares_may_leave_nothing() -> None:
    assert Masking(masked_share=0.9, random_share=0.1).long == "split"
    assert Masking(masked_share=1.0, random_share=0.0, packed=False, long_documents="cut").long == "cut"

"""Megatron-core 0.16 gives back what it was given, not reduced, where that is not contiguous.

Nothing of ours may be.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.distributed import Group, launch
from tests.parallel.training import engine_of, given, run_config, train

CASES = {
    "tied": {},
    "untied, rotary, gated": given(
        tie_embeddings=False, position="rotary", activation="swiglu", num_query_groups=2
    ),
    "recomputed": given(tensor=2, recompute=given(granularity="full")),
}


def reduced() -> dict[str, list[bool]]:
    """Runs inside two ranks: whether each tensor that was reduced was contiguous.

    Reduced over tensor-parallel ranks.
    """
    from megatron.core.tensor_parallel import mappings

    seen: list[bool] = []
    reduce = mappings._reduce

    def noting(tensor: Tensor, group: Any) -> Tensor:
        seen.append(tensor.is_contiguous())
        result: Tensor = reduce(tensor, group)
        return result

    mappings._reduce = noting
    found = {}
    for name, fields in CASES.items():
        config = run_config(*((fields, given(tensor=2)) if "tensor" not in fields else ({}, fields)))
        train(config, engine_of(config), 0, 1)
        found[name], seen[:] = list(seen), []
    return found


def test_what_is_reduced_over_tensor_parallel_ranks_is_contiguous() -> None:
    for found in launch(Group(2, reduced))[0]:
        for name in CASES:
            assert len(found[name]) > 4, name  # forward and backward of every layer, and the embedding
            assert all(found[name]), name

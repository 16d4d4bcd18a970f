"""Gradients that are reduced while backward runs are those that are reduced after it.

The reduction does begin before backward ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from model.errors import UserError
from parallel.config import ParallelConfig
from parallel.engine import overlap
from parallel.engine.gradients import GradientBuffer, Group, Kind
from parallel.engine.overlap import PIECES, marks
from parallel.launch.one_process import single_process
from parallel.topology import check_layout
from tests import distributed
from tests.distributed import launch
from tests.parallel.training import MODEL, engine_of, given, run_config, train, whole_parameters
from tests.rows import local_parameter

STEPS = 3
DEEP = given(num_layers=12)
INTERLEAVED = given(pipeline=2, virtual_stages=3)
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    **{scheme: (2, given(scheme=scheme), {}, {}) for scheme in ("b2t", "spannorm", "mix_ln")},
    "zero 0": (2, {}, given(zero=0), {}),
    "zero 2": (2, {}, given(zero=2), {}),
    "bf16": (2, {}, {}, given(precision="bf16")),
    "recompute": (2, {}, given(recompute=given(granularity="full", num_layers=2)), {}),
    "untied llama": (
        2,
        given(
            tie_embeddings=False, normalization="rmsnorm", bias=False, position="rotary", activation="swiglu"
        ),
        {},
        {},
    ),
    "pipeline": (4, {}, given(pipeline=2), {}),
    "interleaved": (4, {}, INTERLEAVED, {}),
    "tensor": (4, {}, given(tensor=2, sequence_parallel=True), {}),
}


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[int, int, bool]]]:
    """Every piece whose reduction begins.

    (first element, element behind it, whether backward was still running).
    """
    pieces: list[tuple[int, int, bool]] = []
    start, reduce = GradientBuffer.start, GradientBuffer.reduce
    reducing = [False]

    def noted(self: GradientBuffer, low: int) -> None:
        pieces.append((low, self.started, not reducing[0]))
        start(self, low)

    def after(self: GradientBuffer) -> None:
        reducing[0] = True
        reduce(self)
        reducing[0] = False

    with (
        mock.patch.object(GradientBuffer, "start", noted),
        mock.patch.object(GradientBuffer, "reduce", after),
    ):
        yield pieces


def both(name: str) -> dict[str, Any]:
    """Runs inside all ranks: a case with the reduction in backward and after it."""
    _, model, parallel, train_fields = CASES[name]
    found: dict[str, Any] = {}
    for overlapped in (True, False):
        with mock.patch.object(
            overlap, "SMALLEST", 0
        ):  # or no buffer of a model this small would be reduced in pieces
            engine = engine_of(
                run_config(
                    DEEP | model,
                    parallel | given(overlap_grad_reduce=None if overlapped else False),
                    train_fields,
                )
            )
        with recording() as pieces:
            curve = train(run_config(DEEP | model, parallel, train_fields), engine, 0, STEPS)
        parameters, unequal = whole_parameters(engine)
        found[str(overlapped)] = {
            "losses": curve.losses,
            "norms": curve.norms,
            "parameters": parameters,
            "unequal": unequal,
            "pieces": pieces,
        }
    return found


def all_cases(world: int) -> dict[str, Any]:
    return {name: both(name) for name, (ranks, *_) in CASES.items() if ranks == world}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    two, four = launch(distributed.Group(2, all_cases, (2,)), distributed.Group(4, all_cases, (4,)))
    return two[0] | four[0]


@pytest.mark.parametrize("name", list(CASES))
def test_bit_identical_with_two_data_parallel_ranks(name: str, found: dict[str, Any]) -> None:
    with_overlap, without = found[name]["True"], found[name]["False"]
    assert with_overlap["losses"] == without["losses"]
    assert with_overlap["norms"] == without["norms"]
    assert not with_overlap["unequal"]
    assert all(
        torch.equal(tensor, without["parameters"][key]) for key, tensor in with_overlap["parameters"].items()
    )


@pytest.mark.parametrize("name", list(CASES))
def test_most_of_the_gradient_leaves_during_backward(name: str, found: dict[str, Any]) -> None:
    assert not found[name]["False"]["pieces"]
    pieces = found[name]["True"]["pieces"]
    early = sum(high - low for low, high, during in pieces if during)
    late = sum(high - low for low, high, during in pieces if not during)
    assert len([piece for piece in pieces if piece[2]]) >= 3 * STEPS
    assert early > late


def buffer_of(sizes: dict[str, int]) -> GradientBuffer:
    parameters = [local_parameter(name, nn.Parameter(torch.empty(size))) for name, size in sizes.items()]
    offsets = [sum(list(sizes.values())[:index]) for index in range(len(sizes))]
    return GradientBuffer(
        Group(Kind.REPLICATED, True, parameters),
        offsets,
        sum(sizes.values()),
        single_process(),
        sharded=False,
    )


def test_marks_cut_between_layers_from_the_end() -> None:
    sizes = (
        {"embedding.word": 50}
        | {f"decoder.layers.{layer}.{part}": 5 for layer in range(20) for part in ("a", "b")}
        | {"output": 30}
    )
    buffer = buffer_of(sizes)
    found = marks(buffer)
    total = buffer.flat.numel()
    lows = [low for _, low in found]
    assert lows == sorted(lows, reverse=True)
    assert all(high - low >= total / PIECES for low, high in zip(lows, [total, *lows], strict=False))
    for parameter, low in found:
        index = next(i for i, one in enumerate(buffer.parameters) if one is parameter)
        assert list(sizes)[index].endswith(".b")
        assert low == buffer.offsets[index + 1] == 50 + 10 * (1 + int(list(sizes)[index].split(".")[2]))


@pytest.mark.parametrize(
    ("fields", "world", "word"), [({}, 1, "one data-parallel rank"), ({"zero": 3}, 2, "parallel.zero=3")]
)
def test_overlap_that_would_do_nothing_is_refused(fields: dict[str, Any], world: int, word: str) -> None:
    from model.config import ModelConfig

    with pytest.raises(UserError, match=f"parallel.overlap_grad_reduce=true .*{word}"):
        check_layout(ParallelConfig(overlap_grad_reduce=True, **fields), ModelConfig(**MODEL), world)

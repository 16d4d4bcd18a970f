"""The parallel layouts that are compared with one process, and the comparison."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from model.depth.schemes import scheme_names
from pretrain.config.schema import RunConfig
from tests.distributed import Group, launch
from tests.parallel.training import Curve, given, run, run_config

STEPS = 10
# Adam divides by the square root of the second moment.
# A key bias has gradient zero but for rounding (softmax does not see it).
# With the default epsilon rounding noise would move it at full speed.
# This epsilon is far above that noise and below every real gradient's scale.
OPTIMIZER = given(eps=1e-6)
UNTIED = given(tie_embeddings=False)
LLAMA = given(
    num_query_groups=2,
    position="rotary",
    activation="swiglu",
    normalization="rmsnorm",
    bias=False,
    tie_embeddings=False,
)
DEEP = given(num_layers=8)
BF16 = given(precision="bf16")
WIDE = given(precision="bf16", fp32_residual=True)
FULL = given(recompute=given(granularity="full"))
SELECTIVE = given(recompute=given(granularity="selective"))
THREE = given(zero=3)
OFFLOAD = given(offload=given(optimizer=True))
TP, SP, PP = given(tensor=2), given(tensor=2, sequence_parallel=True), given(pipeline=2)
VP, SPLIT = given(pipeline=2, virtual_stages=2), given(pipeline=2, pipeline_split=[3, 1])
UNCLIPPED = given(clip_grad=0.0)
MUON = given(kind="muon")
DOCUMENTS = given(document_mask=True)
LOCAL = LLAMA | given(window=3, global_every=2, rotary_base_local=100)
# Steps of 4, then 8 samples; sequences of 4, 8, then 16 tokens.
GROWING = given(batch_rampup=given(start=4, steps=5), seq_length_warmup=given(start=4, steps=7))
# The branches of four layers come in over eight of the ten steps.
WARMING = given(branch=given(kind="linear", steps=2))


@dataclass(frozen=True)
class Tolerance:
    """How far a layout's training may be from the reference."""

    loss: float
    """Largest relative difference of any step."""
    norm: float
    """Largest relative difference of any step."""
    parameters: float
    """Largest absolute difference of any element at the end."""


# In ten steps at lr 1e-3 a weight travels up to 1e-2.
# The parameters may differ by a two-hundredth of that.
FP32 = Tolerance(loss=1e-6, norm=1e-6, parameters=5e-5)
# Sub-LN's branches are large and its gradient is steep over depth: rounding shows more,
# without any tensor parallelism too.
STEEP = Tolerance(loss=1e-6, norm=4e-6, parameters=5e-5)
# bf16 has 8 bits: one rounding that falls the other way is 4e-3 of a weight near 1.
# Sums over tensor-parallel ranks are rounded to bf16.
HALF = Tolerance(loss=2e-3, norm=3e-2, parameters=4e-2)


@dataclass(frozen=True)
class Case:
    """A layout and the model it is tried on."""

    name: str
    world: int
    parallel: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    reference_train: dict[str, Any] | None = None  # where the reference has other micro-batches than the case
    exact: bool = False
    """Losses and parameters must be bit-identical to those of one process."""

    @property
    def tolerance(self) -> Tolerance:
        if self.train.get("precision") == "bf16":
            return HALF
        return STEEP if self.model.get("scheme") == "subln" else FP32

    def config(self) -> RunConfig:
        return run_config(
            self.model, self.parallel, self.train, self.schedule, self.data, **(OPTIMIZER | self.optimizer)
        )

    def reference(self) -> RunConfig:
        train = self.train if self.reference_train is None else self.reference_train
        return run_config(self.model, {}, train, self.schedule, self.data, **(OPTIMIZER | self.optimizer))


def _one() -> list[Case]:
    return [
        Case(
            "8 micro-batches of 1 against 1 of 8",
            1,
            train=given(micro_batch_size=1),
            reference_train=given(micro_batch_size=8),
        ),
        Case("full recompute", 1, FULL, exact=True),
        Case(
            "full recompute, groups of 2",
            1,
            given(recompute=given(granularity="full", num_layers=2)),
            exact=True,
        ),
        Case("selective recompute", 1, SELECTIVE, exact=True),
        Case("full recompute, bf16, fp32 residual", 1, FULL, train=WIDE, exact=True),
        Case("full recompute, branch warm-up", 1, FULL, schedule=WARMING, exact=True),
        Case("ZeRO-0", 1, given(zero=0), exact=True),
        Case("ZeRO-2", 1, given(zero=2), exact=True),
        Case("ZeRO-3", 1, THREE, exact=True),
        Case("offload", 1, OFFLOAD, exact=True),
    ]


def _two() -> list[Case]:
    cases = [
        Case("TP2", 2, TP),
        Case("TP2 + SP", 2, SP),
        Case("PP2", 2, PP),
        Case("PP2 interleaved, VP2", 2, VP),
        Case("PP2, layers 3 + 1", 2, SPLIT),
    ]
    cases += [Case(f"DP2, ZeRO-{stage}", 2, given(zero=stage)) for stage in (0, 1, 2)]
    cases += [*_two_unclipped(), *_two_models(), *_two_half(), *_two_sharded()]
    for scheme in scheme_names():
        cases += [
            Case(f"TP2 + SP, {scheme}", 2, SP, given(scheme=scheme)),
            Case(f"PP2, {scheme}", 2, PP, given(scheme=scheme)),
        ]
    return cases


def _two_unclipped() -> list[Case]:
    """Nothing is summed in another order here: only the norm that clips is, so clipping is off."""
    return [
        Case("PP2, untied, unclipped", 2, PP, UNTIED, optimizer=UNCLIPPED, exact=True),
        Case("PP2 interleaved, untied, unclipped", 2, VP, UNTIED, optimizer=UNCLIPPED, exact=True),
        Case("PP2, layers 3 + 1, untied, unclipped", 2, SPLIT, UNTIED, optimizer=UNCLIPPED, exact=True),
        Case(
            "DP2, 1 micro-batch each, unclipped",
            2,
            {},
            train=given(micro_batch_size=4),
            optimizer=UNCLIPPED,
            exact=True,
        ),
    ]


def _two_models() -> list[Case]:
    return [
        Case("TP2 + SP, untied", 2, SP, UNTIED),
        Case("DP2, untied", 2, {}, UNTIED),
        Case("TP2, GQA rotary SwiGLU RMSNorm", 2, TP, LLAMA),
        Case("TP2 + SP, GQA rotary SwiGLU RMSNorm", 2, SP, LLAMA),
        Case("PP2, GQA rotary SwiGLU RMSNorm", 2, PP, LLAMA),
        Case("DP2, ZeRO-2, GQA rotary SwiGLU RMSNorm", 2, given(zero=2), LLAMA),
        Case("TP2 + SP, full recompute", 2, SP | FULL),
        Case("TP2, selective recompute", 2, TP | SELECTIVE),
        Case("PP2, full recompute", 2, PP | FULL),
        Case("PP2 interleaved, selective recompute", 2, VP | SELECTIVE),
        Case("TP2 + SP, branch warm-up", 2, SP, schedule=WARMING),
        Case(
            "PP2 interleaved, untied, unclipped, branch warm-up",
            2,
            VP,
            UNTIED,
            optimizer=UNCLIPPED,
            schedule=WARMING,
            exact=True,
        ),
        Case("TP2, hybridnorm", 2, TP, given(scheme="hybridnorm")),
        Case("TP2, GQA rotary SwiGLU RMSNorm, subln", 2, TP, LLAMA | given(scheme="subln")),
    ]


def _two_half() -> list[Case]:
    return [
        Case("TP2 + SP, bf16", 2, SP, train=BF16),
        Case("PP2, bf16", 2, PP, train=BF16),
        Case("TP2 + SP, bf16, fp32 residual", 2, SP, train=WIDE),
        Case(
            "PP2 interleaved, full recompute, untied, unclipped, bf16, fp32 residual",
            2,
            VP | FULL,
            UNTIED,
            train=WIDE,
            optimizer=UNCLIPPED,
            exact=True,
        ),
        Case(
            "PP2, b2t, untied, unclipped, bf16, fp32 residual",
            2,
            PP,
            UNTIED | given(scheme="b2t"),
            train=WIDE,
            optimizer=UNCLIPPED,
            exact=True,
        ),
        *[Case(f"DP2, ZeRO-{stage}, bf16", 2, given(zero=stage), train=BF16) for stage in (1, 2)],
    ]


def _two_sharded() -> list[Case]:
    """ZeRO-3, offload and Muon.

    Last: DeepSpeed's stage 3 puts another linear function in place of PyTorch's for good, after
    which nothing in 16 bits is exact any more.
    """
    return [
        Case("DP2, ZeRO-3, branch warm-up", 2, THREE, schedule=WARMING),
        Case("DP2, ZeRO-3, gpas", 2, THREE, given(scheme="gpas")),
        Case("DP2, ZeRO-3", 2, THREE),
        Case("DP2, ZeRO-3, untied", 2, THREE, UNTIED),
        Case("DP2, ZeRO-3, GQA rotary SwiGLU RMSNorm", 2, THREE, LLAMA),
        Case("DP2, ZeRO-3, full recompute", 2, THREE | FULL),
        Case("DP2, ZeRO-3, selective recompute", 2, THREE | SELECTIVE),
        Case("DP2, ZeRO-3, bf16", 2, THREE, train=BF16),
        Case("DP2, offload", 2, OFFLOAD),
        Case("DP2, ZeRO-2, offload, bf16", 2, OFFLOAD | given(zero=2), train=BF16),
        Case("DP2, Muon", 2, {}, optimizer=MUON),
        Case("TP2 + SP, Muon", 2, SP, optimizer=MUON),
        Case("DP2, Muon, bf16", 2, {}, train=BF16, optimizer=MUON),
    ]


def _four() -> list[Case]:
    tp_pp, tp_dp, pp_dp = (
        given(tensor=2, pipeline=2),
        given(tensor=2, sequence_parallel=True),
        given(pipeline=2),
    )
    return [
        Case("TP2 x PP2", 4, tp_pp),
        Case("TP2 x PP2 + SP", 4, tp_pp | given(sequence_parallel=True)),
        Case("TP2 x PP2 interleaved + SP", 4, tp_pp | given(sequence_parallel=True, virtual_stages=2)),
        *[Case(f"TP2 x DP2 + SP, ZeRO-{stage}", 4, tp_dp | given(zero=stage)) for stage in (0, 1, 2)],
        *[Case(f"PP2 x DP2, ZeRO-{stage}", 4, pp_dp | given(zero=stage)) for stage in (0, 1, 2)],
        Case("PP2 interleaved x DP2, ZeRO-2", 4, given(pipeline=2, virtual_stages=2, zero=2)),
        Case("PP4", 4, given(pipeline=4)),
        Case("TP4 + SP", 4, given(tensor=4, sequence_parallel=True)),
        Case("DP4, ZeRO-2", 4, given(zero=2)),
        Case("TP2 x PP2 + SP, GQA rotary SwiGLU RMSNorm", 4, tp_pp | given(sequence_parallel=True), LLAMA),
        Case(
            "TP2 x PP2 + SP, b2t, full recompute",
            4,
            tp_pp | given(sequence_parallel=True) | FULL,
            given(scheme="b2t"),
        ),
        Case("PP2 x DP2, untied, ZeRO-1", 4, pp_dp, UNTIED),
        Case("TP2 x DP2 + SP, bf16, ZeRO-2", 4, tp_dp | given(zero=2), train=BF16),
        Case("PP2 x DP2, bf16, ZeRO-2", 4, pp_dp | given(zero=2), train=BF16),
        Case("TP2 x DP2 + SP, ZeRO-3", 4, tp_dp | THREE),
        Case("TP2 x DP2 + SP, ZeRO-2, Muon", 4, tp_dp | given(zero=2), optimizer=MUON),
    ]


def _eight() -> list[Case]:
    sp = given(sequence_parallel=True)
    return [
        *[
            Case(f"TP2 x PP2 x DP2 + SP, ZeRO-{stage}", 8, given(tensor=2, pipeline=2, zero=stage) | sp)
            for stage in (1, 2)
        ],
        Case(
            "TP2 x PP2 interleaved x DP2 + SP, ZeRO-2",
            8,
            given(tensor=2, pipeline=2, virtual_stages=2, zero=2) | sp,
        ),
        Case(
            "TP2 x PP4 interleaved + SP, 8 layers",
            8,
            given(tensor=2, pipeline=4, virtual_stages=2) | sp,
            DEEP,
        ),
        Case("TP4 x PP2 + SP", 8, given(tensor=4, pipeline=2) | sp),
        Case("TP2 x DP4 + SP, ZeRO-2, untied", 8, given(tensor=2, zero=2) | sp, UNTIED),
        Case(
            "PP4 x DP2, layers 2 + 3 + 2 + 1, ZeRO-2",
            8,
            given(pipeline=4, pipeline_split=[2, 3, 2, 1], zero=2),
            DEEP,
        ),
        Case("TP2 x PP2 x DP2 + SP, bf16, ZeRO-2", 8, given(tensor=2, pipeline=2, zero=2) | sp, train=BF16),
    ]


CASES: dict[int, list[Case]] = {1: _one(), 2: _two(), 4: _four(), 8: _eight()}
HELD_BY = {
    "TP2": "TP2, selective recompute",
    "PP2 interleaved, VP2": "PP2 interleaved, selective recompute",
    "PP2, layers 3 + 1": "PP2, layers 3 + 1, untied, unclipped",
    "PP2 interleaved, untied, unclipped": "PP2 interleaved, untied, unclipped, branch warm-up",
    "PP2, full recompute": "PP2 interleaved, full recompute, untied, unclipped, bf16, fp32 residual",
    "PP2, GQA rotary SwiGLU RMSNorm": "TP2 x PP2 + SP, GQA rotary SwiGLU RMSNorm",
    "TP2, GQA rotary SwiGLU RMSNorm": "TP2, GQA rotary SwiGLU RMSNorm, subln",
    "TP2 + SP, untied": "TP2 + SP, GQA rotary SwiGLU RMSNorm",
    "DP2, ZeRO-1": "DP2, 1 micro-batch each, unclipped",
    "DP2, untied": "DP2, ZeRO-2, GQA rotary SwiGLU RMSNorm",
    "DP2, ZeRO-3": "DP2, ZeRO-3, selective recompute",
    "DP2, ZeRO-3, untied": "DP2, ZeRO-3, GQA rotary SwiGLU RMSNorm",
    "DP2, Muon": "TP2 x DP2 + SP, ZeRO-2, Muon",
    # Schemes whose layers hold the same modules. What a scheme's parameters are reduced by is
    # asserted for each in `engine/test_gradients.py`.
    "TP2 + SP, deepscalelm_pre_ln": "TP2 + SP",
    "TP2 + SP, pre_ln": "TP2 + SP",
    "TP2 + SP, layernorm_scaling": "TP2 + SP",
    "TP2 + SP, deepnorm": "TP2 + SP, post_ln",
    "TP2 + SP, deepscalelm_post_ln": "TP2 + SP, spannorm",
    **{f"PP2, {scheme}": f"TP2 + SP, {scheme}" for scheme in scheme_names()},
}
"""Cases of two processes that are left to the slow tests -> cases with all their parts."""
QUICK_OF_FOUR = (
    "TP2 x PP2 interleaved + SP",
    "TP2 x DP2 + SP, ZeRO-2",
    "PP2 interleaved x DP2, ZeRO-2",
    "TP2 x PP2 + SP, GQA rotary SwiGLU RMSNorm",
    "TP2 x PP2 + SP, b2t, full recompute",
    "TP2 x DP2 + SP, ZeRO-3",
    "TP2 x DP2 + SP, ZeRO-2, Muon",
)
"""The least of four processes in which every pair of ways to cut stands once."""


def is_quick(case: Case) -> bool:
    """Whether every run of the tests measures it."""
    return case.world == 1 or (case.world == 2 and case.name not in HELD_BY) or case.name in QUICK_OF_FOUR


@dataclass(frozen=True)
class Row:
    """A measured cell of the table; differences as in `Tolerance`."""

    name: str
    world: int
    loss: float
    norm: float
    parameters: float
    identical: bool
    """Losses and parameters are bit for bit those of one process."""
    unequal: tuple[str, ...]


def run_all(configs: list[RunConfig]) -> list[Curve | None]:
    """Runs inside a rank: the training of each configuration; ranks but the first give None."""
    curves = []
    for config in configs:
        try:
            curve = run(config, STEPS)
            curves.append(curve if torch.distributed.get_rank() == 0 else None)
        except Exception as error:
            raise RuntimeError(
                f"the case with {config.parallel!r} {config.model.scheme} {config.train.precision} failed"
            ) from error
    return curves


def selected(request: pytest.FixtureRequest, cases: Iterable[Case]) -> list[Case]:
    """The cases of the module that this session tests: `-k` measures no others."""
    items = [item for item in request.session.items if item.getparent(pytest.Module) is request.node]
    asked = [item.callspec.params.get("case") for item in items if hasattr(item, "callspec")]
    return [case for case in cases if case in asked]


def measure(cases: Iterable[Case], timeout: float = 1500.0) -> dict[str, Row]:
    """Trains the cases and their references, and compares them."""
    cases = sorted(cases, key=lambda case: case.world)
    references = {case.reference().model_dump_json(): case.reference() for case in cases}
    by_world = [
        (world, [case.config() for case in group])
        for world, group in itertools.groupby(cases, key=lambda case: case.world)
    ]
    groups = [
        Group(1, run_all, (list(references.values()),)),
        *(Group(world, run_all, (configs,)) for world, configs in by_world),
    ]
    results = launch(*groups, timeout=timeout)
    expected = dict(zip(references, results[0][0], strict=True))
    curves = [curve for ranks in results[1:] for curve in ranks[0]]
    return {
        case.name: compare(case, curve, expected[case.reference().model_dump_json()])
        for case, curve in zip(cases, curves, strict=True)
    }


def compare(case: Case, curve: Curve, reference: Curve) -> Row:
    """Differences of a case from its reference.

    Raises AssertionError where names or shapes of parameters differ.
    """
    shapes = [
        {name: tuple(value.shape) for name, value in one.parameters.items()} for one in (curve, reference)
    ]
    assert shapes[0] == shapes[1], f"{case.name}: other parameters than one process has"
    return Row(
        case.name,
        case.world,
        loss=_relative(curve.losses, reference.losses),
        norm=_relative(curve.norms, reference.norms),
        parameters=max(
            float((value - reference.parameters[name]).abs().max())
            for name, value in curve.parameters.items()
        ),
        identical=curve.losses == reference.losses
        and all(value.equal(reference.parameters[name]) for name, value in curve.parameters.items()),
        unequal=tuple(curve.unequal),
    )


def _relative(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def check(case: Case, row: Row) -> None:
    """Holds a row to what its case allows."""
    assert not row.unequal, f"ranks hold different values of {row.unequal}"
    assert row.loss <= case.tolerance.loss
    assert row.norm <= case.tolerance.norm
    assert row.parameters <= case.tolerance.parameters
    if case.exact:
        assert row.identical, "losses and parameters must be bit for bit those of one process"


def ids(cases: list[Case]) -> list[str]:
    """Their names, for pytest."""
    return [case.name for case in cases]

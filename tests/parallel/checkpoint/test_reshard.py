"""A checkpoint of one layout goes on under another, there and back.

Compared are every tensor and moment, then the curve.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.checkpoint.format import STATE_KINDS
from parallel.checkpoint.reader import open_checkpoint
from tests.distributed import Group, launch
from tests.parallel.checkpoint.states import bring, keep
from tests.parallel.layouts import LLAMA
from tests.parallel.training import ENCODER, SEQ2SEQ, VIT, engine_of, given, run_config, train

START, END = 3, 9
MODELS = {
    "tied": {},
    # Gated, so that a tensor-parallel part is two blocks.
    # Grouped, so that query, key and value have other sizes.
    "gated": LLAMA,
    # Its two stacks share neither words nor sizes.
    "crossed": SEQ2SEQ
    | given(
        share_embeddings=False,
        position="sinusoidal",
        logit_bias=True,
        encoder_ffn_hidden_size=48,
        encoder_attention_heads=2,
        head_dim=8,
    ),
    # A map of patches, a class token, an output projection and its bias that tensor parts share.
    "images": VIT,
    # A head of its own, with a bias that tensor parts share, and two tables beside words.
    "encoder": ENCODER,
}
SOURCE = given(tensor=2, pipeline=2, sequence_parallel=True)
TWO = {
    "DP2, ZeRO-1": given(),
    "DP2, ZeRO-0": given(zero=0),
    "DP2, ZeRO-2": given(zero=2),
    "DP2, ZeRO-3": given(zero=3),
    "DP2, offload": given(offload=given(optimizer=True)),
    "PP2": given(pipeline=2),
    "PP2 interleaved": given(pipeline=2, virtual_stages=2),
    "TP2": given(tensor=2),
    "CP2, ZeRO-2": given(context=2, zero=2),
    "CP2, ZeRO-3": given(context=2, zero=3),
    "PP2, layers 2 + 6": given(pipeline=2, pipeline_split=[2, 6]),
}
# Back in four processes: the layout it came from and others.
# Each is from a checkpoint that a layout of two processes wrote.
FOUR = {
    "TP2 x PP2 from DP2, ZeRO-1": ("DP2, ZeRO-1", SOURCE),
    "TP2 x PP2 from PP2": ("PP2", SOURCE),
    "PP2 x DP2, ZeRO-2 from DP2, ZeRO-0": ("DP2, ZeRO-0", given(pipeline=2, zero=2)),
    "TP2 x DP2 from TP2": ("TP2", given(tensor=2, zero=2)),
    "TP2 x DP2, ZeRO-3 from DP2, ZeRO-3": ("DP2, ZeRO-3", given(tensor=2, zero=3)),
    "PP4 from PP2 interleaved": ("PP2 interleaved", given(pipeline=4)),
    "PP2, layers 1 + 3, x DP2 from DP2, ZeRO-2": ("DP2, ZeRO-2", given(pipeline=2, pipeline_split=[1, 3])),
    "PP2, layers 5 + 3, x DP2 from DP2, ZeRO-2": ("DP2, ZeRO-2", given(pipeline=2, pipeline_split=[5, 3])),
    "PP4, layers 1 + 2 + 2 + 3 from PP2, layers 2 + 6": (
        "PP2, layers 2 + 6",
        given(pipeline=4, pipeline_split=[1, 2, 2, 3]),
    ),
    "CP4 from CP2, ZeRO-2": ("CP2, ZeRO-2", given(context=4)),
    "TP2 x CP2 from CP2, ZeRO-3": ("CP2, ZeRO-3", given(context=2, tensor=2, sequence_parallel=True)),
    "DP4 from CP2, ZeRO-2": ("CP2, ZeRO-2", given(zero=2)),
    "TP2 x PP2 interleaved from TP2": ("TP2", SOURCE | given(virtual_stages=2)),
}
# Layouts of eight layers in two stacks; a decoder of four layers has one of its own.
OF_STACKS = (
    "PP2, layers 2 + 6",
    "PP2, layers 5 + 3, x DP2 from DP2, ZeRO-2",
    "PP4, layers 1 + 2 + 2 + 3 from PP2, layers 2 + 6",
    "TP2 x PP2 interleaved from TP2",
)
CUT_SEQUENCES = (
    "CP2, ZeRO-2",
    "CP2, ZeRO-3",
    "CP4 from CP2, ZeRO-2",
    "TP2 x CP2 from CP2, ZeRO-3",
    "DP4 from CP2, ZeRO-2",
)
OF_DECODERS = ("PP2, layers 1 + 3, x DP2 from DP2, ZeRO-2", *CUT_SEQUENCES)
# Layouts in which a gated, grouped model is cut in another way than in the one before.
# The rest says nothing new about it.
CUT_OTHERWISE = ("DP2, ZeRO-1", "TP2", "TP2 x PP2 from DP2, ZeRO-1", "TP2 x DP2 from TP2")
# The least that moves two stacks between tensor parts, stages that hold both, and ZeRO.
CUT_IN_STACKS = ("DP2, ZeRO-3", "PP2 interleaved", "TP2 x DP2, ZeRO-3 from DP2, ZeRO-3")
# The least that cuts a head between tensor parts, and moves it to the last stage.
CUT_A_HEAD = ("PP2", "TP2", "TP2 x DP2 from TP2")
EVERY = (*TWO, *FOUR)


def cases_of(model: str, targets: Iterable[str]) -> list[str]:
    return [f"{target}, {model}" for target in targets]


QUICK = [
    *cases_of("tied", [target for target in EVERY if target not in (*OF_STACKS, *CUT_SEQUENCES)]),
    *cases_of("gated", CUT_OTHERWISE),
    *cases_of("crossed", CUT_IN_STACKS),
    *cases_of("images", CUT_A_HEAD),
    *cases_of("encoder", CUT_A_HEAD),
]
SLOW = [
    *cases_of("crossed", [target for target in EVERY if target not in (*OF_DECODERS, *CUT_IN_STACKS)]),
    *(
        case
        for model in ("images", "encoder")
        for case in cases_of(
            model, [one for one in EVERY if one not in (*OF_STACKS, *CUT_SEQUENCES, *CUT_A_HEAD)]
        )
    ),
    *cases_of("gated", CUT_SEQUENCES),
]


def begin(root: str, models: list[str]) -> dict[str, Any]:
    """Runs inside four ranks: trains, saves, and goes on."""
    curves: dict[str, Any] = {}
    for name in models:
        config = run_config(MODELS[name], SOURCE, eps=1e-6)
        engine = engine_of(config)
        train(config, engine, 0, START)
        keep(engine, config, Path(root) / name / "source", START)
        curves[name] = train(config, engine, START, END).losses
    return curves


def go_on(root: str, layouts: dict[str, tuple[str, dict[str, Any]]], cases: list[str]) -> dict[str, Any]:
    """Runs inside ranks: for each case loads (source folder, layout).

    It saves at once under the layout's name, and trains to the end.
    """
    curves: dict[str, Any] = {}
    for case in cases:
        target, _, name = case.rpartition(", ")
        if target not in layouts:
            continue
        source, parallel = layouts[target]
        config = run_config(MODELS[name], parallel, given(seed=77), eps=1e-6)
        engine = engine_of(config)
        streams = bring(engine, Path(root) / name / source)
        keep(engine, config, Path(root) / name / target, START)
        curves[case] = (streams, train(config, engine, START, END).losses)
    return curves


def measure(root: str, cases: list[str]) -> dict[str, Any]:
    """Checkpoints and curves of the cases, and of those that they start from."""
    split = [case.rpartition(", ") for case in cases]
    sources = [f"{FOUR[target][0]}, {name}" for target, _, name in split if target in FOUR]
    cases = list(dict.fromkeys([*sources, *cases]))
    two = {target: ("source", parallel) for target, parallel in TWO.items()}
    source, there, back = launch(
        Group(4, begin, (root, list(dict.fromkeys(name for *_, name in split)))),
        Group(2, go_on, (root, two, cases)),
        Group(4, go_on, (root, FOUR, cases)),
    )
    return {"root": root, "source": source[0], "curves": there[0] | back[0]}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measure(str(tmp_path_factory.mktemp("reshard")), QUICK)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measure(str(tmp_path_factory.mktemp("reshard")), SLOW)


@pytest.fixture
def found(request: pytest.FixtureRequest, case: str) -> dict[str, Any]:
    """What was measured together with this case."""
    measured: dict[str, Any] = request.getfixturevalue("quick" if case in QUICK else "slow")
    return measured


every_case = pytest.mark.parametrize(
    "case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]
)


@every_case
def test_every_tensor_and_moment_is_the_same(found: dict[str, Any], case: str) -> None:
    target, _, model = case.rpartition(", ")
    folder = Path(found["root"]) / model
    source, copy = open_checkpoint(folder / "source"), open_checkpoint(folder / target)
    assert sorted(source.names()) == sorted(copy.names())
    assert source.manifest.progress == copy.manifest.progress
    for name in source.names():
        for kind in STATE_KINDS:
            assert torch.equal(source.tensor(name, kind), copy.tensor(name, kind)), f"{kind} of {name}"


@every_case
def test_the_curve_goes_on(found: dict[str, Any], case: str) -> None:
    streams, losses = found["curves"][case]
    assert not streams, "random states belong to the layout that saved them"
    assert losses == pytest.approx(found["source"][case.rpartition(", ")[2]], rel=1e-5)
    assert len(losses) == END - START

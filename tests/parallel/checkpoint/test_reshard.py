"""A checkpoint of one layout goes on under another, there and back.

Compared are every tensor and moment, then the curve.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.checkpoint.format import STATE_KINDS
from parallel.checkpoint.reader import open_checkpoint
from tests.distributed import Group, launch
from tests.parallel.checkpoint.states import bring, keep
from tests.parallel.training import engine_of, given, run_config, train

START, END = 3, 9
# Layouts in which a gated, grouped model is cut in another way than in the one before.
# The rest says nothing new about it.
CUT_OTHERWISE = ("DP2, ZeRO-1", "TP2", "TP2 x PP2 from DP2, ZeRO-1", "TP2 x DP2 from TP2")
MODELS = {
    "tied": {},
    # Gated, so that a tensor-parallel part is two blocks.
    # Grouped, so that query, key and value have other sizes.
    "gated": given(
        num_query_groups=2,
        position="rotary",
        activation="swiglu",
        normalization="rmsnorm",
        bias=False,
        tie_embeddings=False,
    ),
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
}


def begin(root: str) -> dict[str, Any]:
    """Runs inside four ranks: trains, saves, and goes on."""
    curves: dict[str, Any] = {}
    for name, model in MODELS.items():
        config = run_config(model, SOURCE, eps=1e-6)
        engine = engine_of(config)
        train(config, engine, 0, START)
        keep(engine, config, Path(root) / name / "source", START)
        curves[name] = train(config, engine, START, END).losses
    return curves


def go_on(root: str, layouts: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Runs inside ranks: for each layout and model loads (source folder, layout).

    It saves at once under the layout's name, and trains to the end.
    """
    curves: dict[str, Any] = {}
    for name, model in MODELS.items():
        for target, (source, parallel) in layouts.items():
            if f"{target}, {name}" not in CASES:
                continue
            config = run_config(model, parallel, given(seed=77), eps=1e-6)
            engine = engine_of(config)
            streams = bring(engine, Path(root) / name / source)
            keep(engine, config, Path(root) / name / target, START)
            curves[f"{target}, {name}"] = (streams, train(config, engine, START, END).losses)
    return curves


CASES = [
    f"{target}, {name}"
    for name in MODELS
    for target in (*TWO, *FOUR)
    if name == "tied" or target in CUT_OTHERWISE
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = str(tmp_path_factory.mktemp("reshard"))
    two = {target: ("source", parallel) for target, parallel in TWO.items()}
    source, there, back = launch(
        Group(4, begin, (root,)), Group(2, go_on, (root, two)), Group(4, go_on, (root, FOUR))
    )
    return {"root": root, "source": source[0], "curves": there[0] | back[0]}


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_and_moment_is_the_same(found: dict[str, Any], case: str) -> None:
    target, _, model = case.rpartition(", ")
    folder = Path(found["root"]) / model
    source, copy = open_checkpoint(folder / "source"), open_checkpoint(folder / target)
    assert sorted(source.names()) == sorted(copy.names())
    assert source.manifest.progress == copy.manifest.progress
    for name in source.names():
        for kind in STATE_KINDS:
            assert torch.equal(source.tensor(name, kind), copy.tensor(name, kind)), f"{kind} of {name}"


@pytest.mark.parametrize("case", CASES)
def test_the_curve_goes_on(found: dict[str, Any], case: str) -> None:
    streams, losses = found["curves"][case]
    assert not streams, "random states belong to the layout that saved them"
    assert losses == pytest.approx(found["source"][case.rpartition(", ")[2]], rel=1e-5)
    assert len(losses) == END - START

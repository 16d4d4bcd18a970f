"""Our Triton kernels, of joins, activations, heads and products.

By its interpreter, and compiled for a GPU that need not be there.

Triton comes into a folder beside the environment (1 GB): where it is installed, Megatron-core loads
it in every process. On a GPU: `tests/gpu/test_gpu_joins.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model.depth.schemes import SCHEMES
from tests.beside import beside

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 1700
VERSION, VARIABLE = "3.9.0", "FATHOM_TRITON"


def found(module: str, folder: Path, **environment: str) -> dict[str, Any]:
    """What a module beside this file wrote. Skips, with the reason, where Triton cannot be had."""
    triton, why = beside("triton", VERSION, VARIABLE, seconds=600)
    if triton is None:
        pytest.skip(why)
    path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{triton}", "TRITON_CACHE_DIR": str(folder / "cache")}
    output = folder / f"{module}.json"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"tests.model.layers.{module}", str(output)],
        cwd=ROOT,
        env={**os.environ, **path, **environment},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(output.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found("join_worker", tmp_path_factory.mktemp("join"), TRITON_INTERPRET="1")


def test_results_and_gradients_are_the_reference_s(interpreted: dict[str, Any]) -> None:
    """Every set of terms, at odd sizes: fp64 is exact, others are but for rounding."""
    # In bf16 a norm reads a stream that was rounded to 2^-8, and its result is rounded so again.
    limits = {"fp64": 2e-15, "fp32": 1e-6, "bf16": 3 * 2.0**-8}
    errors = interpreted["kernels"]
    assert len(errors) == 30
    assert {
        name: error for name, error in errors.items() if error > limits[name[:4]] and name != "fp32 stream"
    } == {}
    assert errors["fp32 stream"] < 2.0**-7


def test_activations_and_gradients_are_pytorch_s(interpreted: dict[str, Any]) -> None:
    """Every activation in every format, with and without gates and biases."""
    limits = {"fp64": 2e-15, "fp32": 1e-6, "bf16": 2.0**-7}
    errors = interpreted["activations"]
    assert len(errors) == 15
    assert {name: error for name, error in errors.items() if error > limits[name[:4]]} == {}


def test_activations_with_norms_and_gradients_are_pytorch_s(interpreted: dict[str, Any]) -> None:
    """Every activation with and without gates, biases and means."""
    limits = {"fp64": 4e-15, "fp32": 1e-6, "bf16": 2.0**-7}
    errors = interpreted["normed"]
    assert len(errors) == 81
    assert {name: error for name, error in errors.items() if error > limits[name[:4]]} == {}


def test_heads_and_gradients_are_the_reference_s(interpreted: dict[str, Any]) -> None:
    """Grouped or not, turned or not, with gradients that lie in any order."""
    limits = {"fp64": 2e-15, "fp32": 1e-6, "bf16": 2.0**-7}
    errors = interpreted["heads"]
    assert len(errors) == 21
    assert {name: error for name, error in errors.items() if error > limits[name[:4]]} == {}


def test_feed_forwards_and_gradients_are_the_reference_s(interpreted: dict[str, Any]) -> None:
    """Every activation inside of products; in bf16 as near to fp64 as PyTorch's own operators.

    But for what the interpreter cuts off where a GPU rounds, which is twice as much.
    """
    limits = {"fp64": 2e-15, "fp32": 1e-6}
    errors = interpreted["products"]
    assert len(errors) == 15
    assert {
        name: found
        for name, found in errors.items()
        if found["ours"] > limits.get(name[:4], 4 * found["parts"])
    } == {}


def test_dropout_is_drawn_again_from_its_seed(interpreted: dict[str, Any]) -> None:
    seen = interpreted["dropout"]
    assert seen["values"] == pytest.approx([0.0, 0.5 / 0.75], rel=1e-6)
    assert seen["backward"]
    assert seen["repeated"]
    assert seen["new"]
    # 30,000 elements: five standard deviations of the share, of a row's, and of a product of two.
    assert seen["share"] == pytest.approx(0.75, abs=0.0125)
    assert min(seen["rows"]) > 0.5
    assert max(seen["rows"]) < 0.96
    assert {name: value for name, value in seen["neighbours"].items() if abs(value) > 0.0055} == {}


@pytest.mark.parametrize("scheme", [*SCHEMES, "llama", "llama, subln"])
def test_every_scheme_computes_the_same(interpreted: dict[str, Any], scheme: str) -> None:
    """As with joins and norms apart, in fp64, and with activations inside of products.

    Gradients also where passes and products add them to sums.
    """
    seen = interpreted["models"][scheme]
    assert seen["loss"] < 1e-14
    assert seen["gradients"] < 1e-12
    # A norm between activation and second product.
    assert seen["fed"] == (0 if "subln" in scheme else 3)
    # No norm before attention.
    assert seen["joins"] == {"hybridnorm": 4}.get(scheme, 6)
    assert seen["norms"] == 3 * ("subln" in scheme)


def test_a_model_with_dropout_keeps_no_mask(interpreted: dict[str, Any]) -> None:
    """And recomputation, which cannot reach from layer to layer, drops the same elements."""
    seen = interpreted["dropped"]
    masks = 6 * 2 * 32 * 64 * 8  # six joins; a mask has the branch's format on a CPU
    apart, joined = seen["plain apart"], seen["plain joined"]
    assert apart["bytes"] - joined["bytes"] >= masks
    assert seen["recomputed joined"]["loss"] == pytest.approx(joined["loss"], rel=1e-13)
    assert seen["recomputed joined"]["norm"] == pytest.approx(joined["norm"], rel=1e-11)


def test_the_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """What the interpreter takes, Triton's compiler may not."""
    sizes = found("join_compile_worker", tmp_path)
    assert len(sizes) == 21
    assert min(sizes.values()) > 0

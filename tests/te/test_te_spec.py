"""Layers from Transformer Engine's parts against layers from PyTorch's.

The same parameters, the same places in the whole, the same function.

Without a GPU: modules are real, built on the meta device and on the CPU.
For the function their forward passes are plain PyTorch (`tests.te.kernels`).
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from model.config import ModelConfig
from model.depth.schemes import SCHEMES
from model.parameters.names import canonical_name
from tests.te import extension, standin
from tests.te.worker import ACTIVATIONS, CROSSED, DEGREES, LAYERS, NORMS, WINDOWS
from tests.test_dependencies import declared

CASES = ["-".join(parts) for parts in itertools.product(SCHEMES, NORMS, ACTIVATIONS)]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, found: dict[str, Any]) -> dict[str, Any]:
    return found["described"][request.param]


def differing(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Entries that are not in both or not equal.

    Short, where pytest's own comparison of large dictionaries takes minutes.
    """
    return {
        key: (ours.get(key), theirs.get(key))
        for key in ours.keys() | theirs.keys()
        if ours.get(key) != theirs.get(key)
    }


@pytest.mark.parametrize("tensor", DEGREES)
def test_parameters_are_those_of_the_local_layers(case: dict[str, Any], tensor: int) -> None:
    """Canonical names, shapes, cuts over tensor-parallel ranks.

    Also the attributes that decide how gradients are reduced.
    """
    local, te = case[f"local-{tensor}"]["parameters"], case[f"te-{tensor}"]["parameters"]
    assert not differing(te, local)
    assert any(entry["shard"][2] == tensor for entry in te.values())
    assert any(entry["sequence_parallel"] for entry in te.values()) is (tensor > 1)


@pytest.mark.parametrize("tensor", DEGREES)
def test_sharded_state_dict_is_that_of_the_local_layers(case: dict[str, Any], tensor: int) -> None:
    local, te = case[f"local-{tensor}"]["sharded"], case[f"te-{tensor}"]["sharded"]
    assert not differing(te, local)
    assert len(te) >= 8


@pytest.mark.parametrize("tensor", DEGREES)
def test_the_meta_device_gives_the_same_shapes(case: dict[str, Any], tensor: int) -> None:
    described, meta = case[f"te-{tensor}"], case[f"meta-{tensor}"]
    placed = ModelConfig(num_layers=64, hidden_size=1, num_attention_heads=1).placed_layers()
    assert all(
        shape == described["parameters"][canonical_name(name, 0, placed)]["shape"]
        for name, shape in meta.items()
    )
    assert {name for name in described["own names"] if name.startswith("decoder.layers.")} <= meta.keys()


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_norms_are_fused_wherever_the_plan_allows(scheme: str, found: dict[str, Any]) -> None:
    names = set(found["described"][f"{scheme}-layernorm-gelu"]["te-1"]["own names"])
    expected = set()
    for index, layer in enumerate(SCHEMES[scheme].plan(LAYERS)):
        for plan, apart, fused in (
            (layer.attention, "input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
            (layer.mlp, "pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
        ):
            if plan.norm_in:
                expected |= {
                    f"decoder.layers.{index}.{fused if plan.input_scale == 1.0 else apart}{kind}"
                    for kind in ("weight", "bias")
                }
    inner = re.compile(r"self_attention\.[qkv]_layernorm\.")
    norms = {name for name in names if "layernorm." in name or "layer_norm_" in name}
    entrances = {name for name in norms if not inner.search(name)} - {
        f"decoder.final_layernorm.{kind}" for kind in ("weight", "bias")
    }
    assert entrances == expected


@pytest.mark.parametrize("name", [*CASES, "grouped-rotary-untied", *WINDOWS, *CROSSED])
def test_the_function_is_that_of_the_local_layers(name: str, found: dict[str, Any]) -> None:
    """Loss and all gradients of one weight file read by both, in float64.

    No layer keeps its normed input.
    """
    assert found["compared"][name]["loss"] < 1e-12
    assert found["compared"][name]["gradient"] < 1e-12


def test_bf16_is_alike_in_both_kinds(found: dict[str, Any]) -> None:
    """Schemes with residual constants at 384 layers, and all of them with an fp32 stream.

    There norms are other parts.
    """
    assert len([name for name in found["half"] if "fp32 residual" in name]) == len(SCHEMES)
    assert "deepscalelm_pre_ln" in found["half"]
    for name, cosines in found["half"].items():
        assert min(cosines.values()) > 0.995, name
        assert cosines["te"] == pytest.approx(cosines["local"], abs=1e-3), name


def test_attention_is_told_of_the_ranks_that_share_a_sequence(found: dict[str, Any]) -> None:
    """Transformer Engine's cuts in the same zigzag; a soft cap is ours and gathers by itself."""
    told = {"class": "TEContextAttention", "size": 4, "ranks": [0, 1, 2, 3], "way": "p2p"}
    assert found["context"] == {"plain": told, "capped": {"class": "ContextCapped"}}


def test_the_stand_in_has_no_kernels() -> None:
    with pytest.raises(RuntimeError, match=r"rmsnorm_fwd: there are no kernels"):
        extension.rmsnorm_fwd()


def test_a_folder_without_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(standin.VARIABLE, str(tmp_path))
    standin.python_part.cache_clear()
    folder, why = standin.python_part(extension.NEWEST)
    standin.python_part.cache_clear()
    assert folder is None
    assert f"{standin.VARIABLE}={tmp_path} holds no transformer-engine-{extension.NEWEST}" in why


def test_both_ends_of_the_range_are_tested() -> None:
    """The oldest release that it has, and one of its newest minor release."""
    oldest, newest = Version(extension.OLDEST), Version(extension.NEWEST)
    wanted = f">={oldest.major}.{oldest.minor},<{newest.major}.{newest.minor + 1}"
    assert declared("te")["transformer-engine"] == wanted

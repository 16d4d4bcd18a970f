"""Training over both kinds of layers, without a GPU.

A checkpoint of one goes on in the other, and FP8's state goes through a file.
"""

from __future__ import annotations

from typing import Any

import pytest

from model.depth.schemes import SCHEMES
from tests.te.context import CASES, WORLDS
from tests.te.worker import LAYERS

RECIPES = {
    "delayed": "TEDelayedScaling",
    "tensorwise": "Float8CurrentScaling",
    "blockwise": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES)
def test_sequences_that_are_cut_have_the_loss_and_gradients_of_one_process(
    case: str, world: int, engines: dict[str, Any]
) -> None:
    """In fp64, against PyTorch's layers in one process."""
    assert engines["context"][f"{case}, {world}"] < 1e-13


def test_where_sequences_are_cut_documents_are_ours_and_the_ring_has_the_rest(
    engines: dict[str, Any],
) -> None:
    assert engines["context"]["bf16"] == {"documents": "ours", "plain": "a ring of keys"}


@pytest.mark.parametrize("exchange", ["local to te", "te to local"])
def test_a_checkpoint_goes_on_in_the_other_kind_of_layers(exchange: str, engines: dict[str, Any]) -> None:
    losses = engines[exchange]
    assert losses["reader"] == pytest.approx(losses["writer"], rel=1e-6)
    assert losses["reader"] != pytest.approx(losses["before"], rel=1e-3)


@pytest.mark.parametrize("fact", ["restored", "ignored", "equal", "in force"])
def test_the_state_of_delayed_scaling_goes_through_a_file(fact: str, engines: dict[str, Any]) -> None:
    """restored: the file is read; ignored: other recipes write and read none.

    equal: every number; in force: the quantizers hold what was read as a forward pass begins.
    """
    assert engines["fp8 state"][fact] is True
    assert engines["fp8 state"]["tensors"] == 4 * 2 * 4


@pytest.mark.parametrize("zero", ["zero 1", "zero 3"])
def test_fp8_weights_are_cast_once_a_step(zero: str, engines: dict[str, Any]) -> None:
    """Two steps of two micro-batches: the second one of each step uses the first one's casts.

    The second step makes new ones.
    """
    assert engines["weight casts"][zero] == [True, False, True, False]


def test_attention_without_dropout_leaves_random_states_alone(engines: dict[str, Any]) -> None:
    assert engines["random states"] == {"0.0": [False] * 3, "0.1": [True] * 3}


def test_its_products_have_a_switch_for_adding_to_sums(engines: dict[str, Any]) -> None:
    assert engines["summed"] == [True] * 8


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_steps_by_a_cuda_graph_are_bit_identical(scheme: str, engines: dict[str, Any]) -> None:
    losses = engines["graphed"][scheme]
    assert losses["graph"] == losses["eager"]
    assert losses["counts"] == [1, 3]


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_recipe_reaches_the_linear_layers(recipe: str, engines: dict[str, Any]) -> None:
    """In every layer, two fused norms each; with the first and last spared, in all but these."""
    assert engines["fp8 contexts"][recipe] == [RECIPES[recipe]] * 2 * LAYERS
    if recipe != "delayed":
        assert (
            engines["fp8 contexts"][f"{recipe} spared"]
            == [None] * 2 + [RECIPES[recipe]] * 2 * (LAYERS - 2) + [None] * 2
        )

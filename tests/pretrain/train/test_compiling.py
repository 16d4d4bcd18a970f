"""`train.compile` and `train.cuda_graph` are refused where they would fail or do nothing."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from model.errors import UserError
from parallel.hardware.precision import Numerics
from pretrain.config.schema import RunConfig
from pretrain.train.compiling import check_graphs, compile_chunks
from tests.parallel.training import DROPOUT

LOCAL, TE = Numerics(torch.float32, "local"), Numerics(torch.bfloat16, "te")


def config(**sections: dict[str, Any]) -> RunConfig:
    base: dict[str, Any] = {
        "name": "compile",
        "model": {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4},
        "data": {"corpora": [{"path": "none"}], "seq_length": 16},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "compile": True},
    }
    return RunConfig.model_validate(
        {
            key: base.get(key, {}) | sections.get(key, {}) if key != "name" else "compile"
            for key in {**base, **sections}
        }
    )


SP, FULL = {"tensor": 2, "sequence_parallel": True}, {"recompute": {"granularity": "full"}}


@pytest.mark.parametrize("train", [{}, {"compile": False, "cuda_graph": True}, {"cuda_graph": True}])
@pytest.mark.parametrize(
    "sections", [{"model": DROPOUT, "parallel": SP}, {"parallel": SP | FULL}, {"parallel": {"pipeline": 2}}]
)
def test_runs_with_collectives_recomputation_and_dropout_are_accepted(
    sections: dict[str, Any], train: dict[str, Any]
) -> None:
    config(**sections | {"train": train | {"kernels": "local"}})


HEADS: dict[str, Any] = {"parallel": {"tensor": 2}, "model": {"attention_dropout": 0.1}}


def test_a_graph_whose_full_recomputation_drops_attention_again_is_refused() -> None:
    with pytest.raises(ValidationError, match="attention_dropout=0.1 would compute again"):
        config(
            parallel=FULL,
            model={"attention_dropout": 0.1},
            train={"compile": False, "cuda_graph": True},
        )


def test_layers_that_would_draw_from_two_streams_are_not_compiled() -> None:
    """With kernels=auto it depends on the machine, which is known when layers are built."""
    with pytest.raises(UserError, match="train.compile=true .*parallel.sequence_parallel=true"):
        compile_chunks(config(**HEADS), LOCAL, [])


def test_compiling_joins_of_one_addition_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"train.compile=true has no effect with model.scheme=pre_ln .*train.compile=false"
    ):
        compile_chunks(config(model={"scheme": "pre_ln"}), TE, [])


def test_a_graph_on_a_machine_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="train.cuda_graph=true needs a GPU"):
        check_graphs(128)


@pytest.mark.parametrize("variable", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_a_graph_with_memory_that_may_move_needs_another_variable(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_graphs(128)
    monkeypatch.setenv(variable, "expandable_segments:True")
    with pytest.raises(UserError, match=f"{variable}=.*NCCL_GRAPH_REGISTER=0"):
        check_graphs(128)
    monkeypatch.setenv("NCCL_GRAPH_REGISTER", "0")
    check_graphs(128)


@pytest.mark.parametrize(
    ("cudnn", "length", "refused"), [(91500, 200, True), (91501, 200, False), (91002, 256, False)]
)
def test_lengths_that_old_attention_kernels_do_not_take_in_graphs(
    cudnn: int, length: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    with (
        pytest.raises(UserError, match=r"data.seq_length=200, not a multiple of 128: cuDNN 9.15,")
        if refused
        else contextlib.nullcontext()
    ):
        check_graphs(length)

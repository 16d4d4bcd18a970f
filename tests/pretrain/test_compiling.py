"""`train.compile` and `train.cuda_graph` are refused where they would fail or do nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.errors import UserError
from parallel.precision import Numerics
from parallel.topology import check_layout
from pretrain.compiling import check_compile, check_cuda_graph, compile_chunks
from pretrain.config import RunConfig

LOCAL, TE = Numerics(torch.float32, "local"), Numerics(torch.bfloat16, "te")


def config(**sections: dict[str, Any]) -> RunConfig:
    base: dict[str, Any] = {
        "name": "compile",
        "model": {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4},
        "data": {"corpora": [{"path": "none"}], "seq_length": 16},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "compile": True},
    }
    return RunConfig.model_validate({key: base.get(key, {}) | sections.get(key, {}) if key != "name" else "compile" for key in {**base, **sections}})


def test_plain_run_is_accepted() -> None:
    check_compile(config(), LOCAL)


@pytest.mark.parametrize(
    ("sections", "numerics", "word"),
    [
        ({"parallel": {"recompute": {"granularity": "full"}}}, LOCAL, "recompute.granularity=full"),
        ({"parallel": {"tensor": 2}}, LOCAL, "parallel.tensor=2"),
        ({"parallel": {"zero": 3}}, LOCAL, "parallel.zero=3"),
        ({"model": {"hidden_dropout": 0.1}}, LOCAL, "model.hidden_dropout=0"),
        ({"model": {"hidden_dropout": 0.1}}, TE, "model.hidden_dropout=0"),
        ({"parallel": {"zero": 3}}, TE, "parallel.zero=3"),
    ],
)
def test_what_does_not_combine_is_named(sections: dict[str, dict[str, Any]], numerics: Numerics, word: str) -> None:
    with pytest.raises(UserError, match=f"train.compile=true .*{word}"):
        check_compile(config(**sections), numerics)


def test_joins_between_transformer_engine_s_parts_may_be_tensor_parallel() -> None:
    check_compile(config(parallel={"tensor": 2}), TE)


def test_compiling_joins_of_one_addition_is_refused() -> None:
    with pytest.raises(UserError, match=r"train.compile=true has no effect with model.scheme=pre_ln .*train.compile=false"):
        compile_chunks(config(model={"scheme": "pre_ln"}), TE, [])


def graphable(**sections: Any) -> tuple[RunConfig, Any]:
    run = config(**sections)
    processes = run.parallel.tensor * run.parallel.pipeline
    return run, check_layout(run.parallel, run.model, processes)


def test_a_graph_on_a_machine_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="train.cuda_graph=true needs a GPU"):
        check_cuda_graph(*graphable())


@pytest.mark.parametrize(
    ("sections", "word"),
    [
        ({"parallel": {"pipeline": 2}}, "parallel.pipeline=2"),
        ({"parallel": {"zero": 3}}, "parallel.zero=3"),
        ({"parallel": {"recompute": {"granularity": "selective"}}}, "recompute.granularity=selective"),
        ({"model": {"attention_dropout": 0.1}}, "model.attention_dropout=0"),
    ],
)
def test_what_a_graph_does_not_combine_with_is_named(sections: dict[str, Any], word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_cuda_graph(*graphable(parallel={"tensor": 2}))
    with pytest.raises(UserError, match=f"train.cuda_graph=true .*{word}"):
        check_cuda_graph(*graphable(**sections))


def test_a_graph_with_memory_that_may_move_needs_another_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with pytest.raises(UserError, match="NCCL_GRAPH_REGISTER=0"):
        check_cuda_graph(*graphable())
    monkeypatch.setenv("NCCL_GRAPH_REGISTER", "0")
    check_cuda_graph(*graphable())

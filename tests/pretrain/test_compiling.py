"""`train.compile` is refused where it would fail or do nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.errors import UserError
from parallel.precision import Numerics
from pretrain.compiling import check_compile
from pretrain.config import RunConfig

LOCAL = Numerics(torch.float32, "local")


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
        ({}, Numerics(torch.bfloat16, "te"), "train.kernels=local"),
        ({"parallel": {"recompute": {"granularity": "full"}}}, LOCAL, "recompute.granularity=full"),
        ({"parallel": {"tensor": 2}}, LOCAL, "parallel.tensor=2"),
        ({"parallel": {"zero": 3}}, LOCAL, "parallel.zero=3"),
        ({"model": {"hidden_dropout": 0.1}}, LOCAL, "model.hidden_dropout=0"),
    ],
)
def test_what_does_not_combine_is_named(sections: dict[str, dict[str, Any]], numerics: Numerics, word: str) -> None:
    with pytest.raises(UserError, match=f"train.compile=true .*{word}"):
        check_compile(config(**sections), numerics)

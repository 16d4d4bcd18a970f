"""Names of DeepSpeed that are not public: one file touches them, and each is checked.

A first step that moves nothing ends the run.
"""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from model.errors import UserError
from parallel.engine import deepspeed_api as api
from parallel.engine.engine import Engine
from parallel.engine.self_check import Sample, check_moved, watch
from parallel.launch.one_process import single_process
from pretrain.data.samples import next_tokens
from pretrain.train.build import build_engine
from tests.parallel.training import forward_step, run_config, sample

ROOT = Path(api.__file__).parents[2]
HOME = "parallel/engine/deepspeed_api.py"


def test_one_file_touches_the_private_names_of_deepspeed() -> None:
    source = (ROOT / HOME).read_text()
    names = set(re.findall(r'(?:require|_set)\(.+?, "(\w+)"', source)) | set(
        re.findall(r'^        "(\w+)": \(', source, re.M)
    )
    assert {"_broadcast_model", "averaged_gradients", "micro_step_id", "build_shm_op"} <= names
    public = {"device"}
    pattern = re.compile(r"(?<!def )\b(" + "|".join(sorted(names - public)) + r")\b")
    found = {
        str(path.relative_to(ROOT)): pattern.findall(path.read_text())
        for package in ("model", "parallel", "pretrain", "tools")
        for path in (ROOT / package).rglob("*.py")
        if pattern.search(path.read_text())
    }
    assert set(found) == {HOME}


def test_a_release_without_a_name_or_with_another_signature_is_refused_in_one_line() -> None:
    class Optimizer:
        def step(self, closure: object = None) -> None: ...

    assert api.require(Optimizer, "step", ["self", "closure"]) is Optimizer.step
    with pytest.raises(UserError, match=r"deepspeed [\d.]+ has no Optimizer._gone.*install deepspeed.*0\.19"):
        api.require(Optimizer, "_gone")
    with pytest.raises(UserError, match=r"has Optimizer.step\(self, closure\) for \(self\)"):
        api.require(Optimizer, "step", ["self"])
    optimizer: Any = Optimizer()
    optimizer.device = "cpu"
    with pytest.raises(UserError, match="has no Optimizer._get_norm_groups"):
        api.skip_norm(optimizer)


def test_gradient_hooks_that_are_left_are_refused() -> None:
    class Optimizer:
        _grad_acc_hooks: list[object] = []  # noqa: RUF012

    parameter = nn.Parameter(torch.ones(2))
    api.drop_gradient_hooks(Optimizer(), [parameter])  # type: ignore[arg-type]
    parameter.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(UserError, match="keeps hooks on the gradients of 1 parameters"):
        api.drop_gradient_hooks(Optimizer(), [parameter])  # type: ignore[arg-type]


def step(engine: Engine) -> None:
    engine.set_lr(1e-3)
    engine.train_step(forward_step, lambda: iter([next_tokens(sample(0)[None])]), 1)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_first_step_that_moves_nothing_ends_the_run(zero: int, monkeypatch: pytest.MonkeyPatch) -> None:
    topology = copy.copy(single_process())
    topology.layout = replace(topology.layout, zero=zero)
    config = run_config(parallel={"zero": zero}, train={"micro_batch_size": 1, "global_batch_size": 1})
    engine = build_engine(config, topology)
    monkeypatch.setattr(type(engine.deepspeed), "step", lambda self: None)
    with pytest.raises(RuntimeError, match=r"master weights of \S+ and of others where they were"):
        step(engine)
    monkeypatch.undo()
    step(engine)
    assert engine.checked


def test_weights_that_a_step_cannot_move_visibly_are_not_looked_at() -> None:
    weights, gradient = torch.tensor([1.0, 1.0, 1e-3, 1e-3]), torch.tensor([1.0, 0.0, 1e-3, 1e-20])
    watched = watch([Sample("w", weights, gradient, rate=1e-7, eps=1e-8)])
    assert [one.index.tolist() for one in watched] == [[2]]
    with pytest.raises(RuntimeError, match="of w and"):
        check_moved(watched)
    weights[2] += 1e-7
    check_moved(watched)
    assert not watch([Sample("w", weights, gradient, rate=0.0, eps=1e-8)])

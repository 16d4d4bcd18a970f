"""A short training run for every scheme and precision, through the engine.

One batch, learnt by heart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model.depth.schemes import SCHEMES
from parallel.checkpoint.loader import load
from parallel.checkpoint.reader import open_checkpoint
from parallel.checkpoint.writer import save
from parallel.engine.engine import Engine
from parallel.hardware.fp8_state import checkpoint_file, restore
from parallel.hardware.precision import RECIPES
from parallel.launch.one_process import single_process
from pretrain.config.schema import RunConfig
from pretrain.data.samples import next_tokens
from pretrain.train.build import build_engine
from tests.gpu.gpu_models import SEQ, SHAPE, tokens
from tests.gpu.test_gpu_numerics import needs
from tests.parallel.training import forward_step

STEPS, BATCH, MICRO, RATE = 20, 4, 2, 2e-3
LEARNT = 0.5
"""Share of the first loss below which the last one must lie.

Seen on a CPU over all schemes, in fp32, bf16 and emulated FP8: at most 0.36.
"""


def run_config(**fields: Any) -> RunConfig:
    """A run of the small model; its data set does not exist, batches come from `tokens`."""
    own = ("scheme", "hidden_dropout", "attention_dropout")
    model = SHAPE | {key: fields.pop(key) for key in own if key in fields}
    parallel = {"recompute": fields.pop("recompute")} if "recompute" in fields else {}
    return RunConfig(
        name="small",
        model=model,
        parallel=parallel,
        data={"corpora": [{"path": "none"}], "seq_length": SEQ},
        optimizer={"lr": RATE},
        train={"steps": STEPS, "global_batch_size": BATCH, "micro_batch_size": MICRO, "seed": 1} | fields,
    )


def train(config: RunConfig, steps: int = STEPS, engine: Engine | None = None) -> tuple[list[float], Engine]:
    """Losses of the steps, each on the same micro-batches."""
    engine = engine or build_engine(config, single_process())
    engine.set_lr(config.optimizer.lr)
    batches = [next_tokens(tokens(seed, MICRO)) for seed in range(BATCH // MICRO)]
    losses = []
    for _ in range(steps):
        result = engine.train_step(forward_step, lambda: iter(batches), len(batches))
        assert result.applied
        losses.append(result.loss)
    return losses, engine


def check_learns(**fields: Any) -> None:
    losses, engine = train(run_config(**fields))
    assert losses[-1] < LEARNT * losses[0], losses
    assert all(torch.isfinite(named.parameter).all() for named in engine.parameters)


@pytest.mark.parametrize(
    "scheme", ["b2t", "deepscalelm_pre_ln", *(pytest.param(name, marks=pytest.mark.gpu) for name in SCHEMES)]
)
def test_local_fp32(scheme: str) -> None:
    check_learns(scheme=scheme, precision="fp32", kernels="local")


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_local_bf16(scheme: str) -> None:
    check_learns(scheme=scheme, precision="bf16", kernels="local")


@pytest.mark.te
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_transformer_engine_bf16(scheme: str) -> None:
    check_learns(scheme=scheme, precision="bf16", kernels="te")


@pytest.mark.te
@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_transformer_engine_fp8(recipe: str, scheme: str) -> None:
    needs(recipe)
    check_learns(scheme=scheme, precision="bf16", fp8={"recipe": recipe})


def check_goes_on(folder: Path, first: RunConfig, second: RunConfig, tolerance: float) -> None:
    """A checkpoint of one run goes on in another: losses of the next steps."""
    _, one = train(first, STEPS // 2)
    extra = checkpoint_file(one.chunks, one.topology)
    save(
        one, folder, STEPS // 2, progress={"optimizer_step": STEPS // 2}, config={}, versions={}, extra=extra
    )
    other = build_engine(second, single_process())
    reader = open_checkpoint(folder)
    load(other, reader)
    restore(other.chunks, reader.folder)
    assert train(second, 3, other)[0] == pytest.approx(train(first, 3, one)[0], rel=tolerance)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.gpu)])
def test_a_checkpoint_goes_on(precision: str, tmp_path: Path) -> None:
    config = run_config(scheme="b2t", precision=precision, kernels="local")
    check_goes_on(tmp_path, config, config, 1e-4)


@pytest.mark.te
@pytest.mark.parametrize(("writer", "reader"), [("local", "te"), ("te", "local")])
def test_a_checkpoint_goes_on_in_the_other_kind_of_layers(writer: str, reader: str, tmp_path: Path) -> None:
    first, second = (run_config(scheme="b2t", precision="bf16", kernels=kind) for kind in (writer, reader))
    check_goes_on(tmp_path, first, second, 0.02)


@pytest.mark.te
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_checkpoint_goes_on_in_fp8(recipe: str, tmp_path: Path) -> None:
    """With the state of delayed scaling, the same steps follow; without it, scales start at 1."""
    needs(recipe)
    config = run_config(scheme="b2t", fp8={"recipe": recipe}, precision="bf16")
    check_goes_on(tmp_path, config, config, 2e-3)

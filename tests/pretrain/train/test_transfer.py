"""How far a few steps move the stream, over width and depth: the coordinate check of CompleteP."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from parallel.launch.one_process import single_process
from pretrain.train.build import build_engine
from tests.parallel.training import given, run_config, sample, train

BASE = (32, 4)
WIDE, DEEP = (128, 4), (32, 64)
STEPS, RATE, SCHEMES = 3, 4e-3, ("pre_ln", "deepscalelm_pre_ln")


@functools.cache
def moved(scheme: str, size: tuple[int, int], transfer: bool) -> float:
    """Root mean square change of the stream after the last layer, over its size at the start.

    size: width and layers; heads are 8 wide.
    """
    width, layers = size
    model = given(scheme=scheme, num_layers=layers, hidden_size=width, num_attention_heads=width // 8)
    if transfer:
        model["transfer"] = given(method="completep", base_layers=BASE[1], base_hidden=BASE[0])
    config = run_config(model, train=given(micro_batch_size=8), lr=RATE)
    engine = build_engine(config, single_process())
    (chunk,) = engine.chunks
    tokens = torch.stack([sample(1000 + index) for index in range(8)])[:, :-1]

    def stream() -> Tensor:
        seen: list[Tensor] = []
        last = chunk.decoder.layers[-1]  # type: ignore[union-attr,index]

        def keep(module: nn.Module, args: object, output: tuple[Tensor, object]) -> None:
            seen.append(output[0].double() * module.plan.leaving)  # type: ignore[union-attr,operator]

        handle = last.register_forward_hook(keep)  # type: ignore[union-attr,operator]
        with torch.no_grad():
            chunk({"tokens": tokens})
        handle.remove()
        return seen[0]

    before = stream()
    train(config, engine, 0, STEPS)
    return float((stream() - before).square().mean().sqrt() / before.square().mean().sqrt())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [WIDE, (64, 4), (32, 16), DEEP], ids=str)
def test_steps_move_the_stream_as_far_as_at_the_base(scheme: str, size: tuple[int, int]) -> None:
    ratio = moved(scheme, size, True) / moved(scheme, BASE, False)
    assert 0.6 < ratio < 1.6


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [WIDE, DEEP], ids=["wide", "deep"])
def test_without_it_they_move_it_farther(scheme: str, size: tuple[int, int]) -> None:
    assert moved(scheme, size, False) / moved(scheme, BASE, False) > 2.4

"""`python -m benchmarks.ablation`: what each of our ways to save time buys.

Fathom's optimizer step as it is, by turns with the same step where one of them is taken back.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict
from unittest.mock import patch

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor

from benchmarks.peers import Contestant, Fathom, Shape, fathom_deepspeed
from benchmarks.results import write_results
from benchmarks.run import SHAPES
from benchmarks.turns import allocator, ratio_table, spread, turns
from parallel.engine.deepspeed_api import weights_cut_anew

if TYPE_CHECKING:
    from model.network.language_model import LanguageModel

ALL = "Fathom as it is"


def _torch_loss(self: LanguageModel, labels: Tensor, logits: Tensor) -> Tensor:
    logits_nv = logits[..., : self.true_vocab].float().flatten(0, 1)
    return (
        F.cross_entropy(logits_nv, labels.t().flatten(), reduction="none")
        .view(labels.shape[1], labels.shape[0])
        .t()
    )


def _deepspeed_slices(contestant: Fathom) -> AbstractContextManager[object]:
    optimizer = contestant.engine.optimizer
    return patch.object(optimizer, "_update_model_bit16_weights", weights_cut_anew(optimizer))


def _torch_cross_entropy(contestant: Fathom) -> AbstractContextManager[object]:
    from model.network.language_model import LanguageModel

    return patch.object(LanguageModel, "losses", _torch_loss)


def _attention_in_place(contestant: Fathom) -> AbstractContextManager[object]:
    from model.layers import torch_parts

    return patch.object(torch_parts, "COPIED_FROM", 1 << 62)


@contextlib.contextmanager
def _megatron_parts(contestant: Fathom) -> Iterator[None]:
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.mlp import MLP

    from model.layers import torch_parts

    pairs = (
        (torch_parts.ColumnLinear, ColumnParallelLinear),
        (torch_parts.RowLinear, RowParallelLinear),
        (torch_parts.LocalSelfAttention, SelfAttention),
        (torch_parts.LocalMLP, MLP),
    )
    with contextlib.ExitStack() as stack:
        for ours, theirs in pairs:
            stack.enter_context(patch.object(ours, "forward", theirs.forward))
        yield


Maker = Callable[[Shape], Contestant]
Different = Callable[[Any], AbstractContextManager[object]]
"""Of the contestant, which each entry knows the class of."""


class Report(TypedDict):
    """Step times with one thing taken back over the step as it is, by what was taken back."""

    ratios: dict[str, dict[str, float]]
    best: dict[str, float]
    """Of the quickest steps."""
    seconds: dict[str, list[float]]


TAKEN_BACK: dict[str, tuple[Maker, Different, bool]] = {
    ALL: (Fathom, contextlib.nullcontext, True),
    "DeepSpeed accumulates and reduces gradients": (fathom_deepspeed, contextlib.nullcontext, True),
    "Megatron-core's linear layers, attention and feed-forward": (Fathom, _megatron_parts, True),
    "the C library gives freed memory back": (Fathom, contextlib.nullcontext, False),
    "PyTorch's cross-entropy": (Fathom, _torch_cross_entropy, True),
    "DeepSpeed cuts weights anew after each step": (Fathom, _deepspeed_slices, True),
    "attention reads heads where they lie": (Fathom, _attention_in_place, True),
}
"""What is taken back.

How the contestant is made, what is different while it takes a step,
and whether freed memory is kept.
"""


def measure(shape: Shape, rounds: int) -> Report:
    """Step time with one thing taken back over the step time as it is, by turns."""
    tokens = shape.sample()
    shared = {make: make(shape) for make in {make for make, _, _ in TAKEN_BACK.values()}}

    def step(make: Maker, different: Different) -> None:
        with different(shared[make]):
            shared[make].step(tokens)

    actions = {
        name: functools.partial(step, make, different) for name, (make, different, _) in TAKEN_BACK.items()
    }
    seconds = turns(
        actions,
        rounds,
        {name: functools.partial(allocator, keeps=keeps) for name, (_, _, keeps) in TAKEN_BACK.items()},
    )
    ratios = {
        name: spread([own / base for own, base in zip(times, seconds[ALL], strict=True)])
        for name, times in seconds.items()
        if name != ALL
    }
    best = {name: min(times) / min(seconds[ALL]) for name, times in seconds.items() if name != ALL}
    return {"ratios": ratios, "best": best, "seconds": seconds}


def main(
    shapes: str = typer.Option(",".join(SHAPES), help="Shapes to measure, by name."),
    rounds: int = typer.Option(5, min=2, help="Counted rounds."),
    out: Path | None = typer.Option(None, help="File for the JSON."),
) -> None:
    """Measure and print."""
    from parallel.launch.one_process import single_process

    single_process()
    torch.set_num_threads(1)
    report = {name: measure(SHAPES[name], rounds) for name in shapes.split(",")}
    for name, result in report.items():
        Console(width=110).print(
            ratio_table(
                f"{name}: step time with one thing taken back, over the step as it is",
                "ratio",
                result["ratios"],
            )
        )
        print(
            "of the quickest steps:",
            ", ".join(f"{what} {ratio:.3f}" for what, ratio in result["best"].items()),
        )
    if out is not None:
        write_results(out, {"shapes": report})


if __name__ == "__main__":
    typer.run(main)

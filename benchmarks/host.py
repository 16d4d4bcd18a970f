"""Host time of a layer with joined kernels over one without, where nothing is computed.

`python -m benchmarks.host`. On a CPU, at a size whose arithmetic is next to nothing. Kernels of our
own are left out, and so is what their launch costs: what remains is the Python around them, which
`OWN_HOST` of `pretrain/plan/counted.py` stands for.
"""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.results import RESULTS, write_results
from model.config import ModelConfig
from model.layers import launching
from model.layers.one_pass import pass_at_once
from model.layers.transformer_config import transformer_config
from model.network.language_model import LanguageModel
from parallel.launch.one_process import single_process

LAYERS, SEQ, VOCAB, STEPS = 24, 4, 64, 30
KERNELS = {
    "join_kernel": ("forward", "backward"),
    "activation_kernel": ("forward", "backward"),
    "heads_kernel": ("forward", "backward"),
    "normed_kernel": ("forward", "backward"),
    "parts_kernel": ("total",),
}
POSITIONS = ("learned", "rotary")


class _Nothing:
    """Stands for a kernel."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *given, **shape: None


def leave_kernels_out() -> None:
    """Puts nothing in the place of every kernel, before anybody imports one."""
    for name, functions in KERNELS.items():
        module: Any = types.ModuleType(f"model.layers.{name}")
        for function in functions:
            setattr(module, function, _Nothing())
        sys.modules[module.__name__] = module
    language: Any = types.ModuleType("triton.language")
    language.float32 = language.float64 = None
    sys.modules.update({"triton": types.ModuleType("triton"), "triton.language": language})
    launching.triton_format.cache_clear()


def build(position: str) -> LanguageModel:
    """A narrow model in fp32."""
    config = ModelConfig.model_validate(
        {
            "scheme": "pre_ln",
            "num_layers": LAYERS,
            "hidden_size": 64,
            "num_attention_heads": 2,
            "vocab_size": VOCAB,
            "max_position_embeddings": SEQ,
            "position": position,
        }
    )
    return LanguageModel(config, transformer_config(config), seq_length=SEQ).train()


def seconds(model: LanguageModel, tokens: Tensor) -> float:
    """Processor time of one pass forward and backward."""
    model.zero_grad()
    begin = time.process_time()
    model({"tokens": tokens, "labels": tokens}).mean().backward()
    return time.process_time() - begin


def main() -> None:
    """Both kinds of layers by turns; prints the quickest passes and writes them."""
    torch.set_num_threads(1)
    single_process()
    leave_kernels_out()
    tokens = torch.randint(0, VOCAB, (1, SEQ))
    found = {}
    for position in POSITIONS:
        models = {"apart": build(position), "joined": build(position)}
        pass_at_once([models["joined"]], "triton")
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(STEPS):
            for name, model in models.items():
                times[name].append(seconds(model, tokens))
        found[position] = {name: min(own) / LAYERS * 1e3 for name, own in times.items()}
        apart, joined = found[position].values()
        Console().print(
            f"{position}: apart {apart:.2f} ms a layer, joined {joined:.2f} ({joined / apart:.2f})"
        )
    write_results(RESULTS / "host.json", {"ms_per_layer": found})


if __name__ == "__main__":
    main()

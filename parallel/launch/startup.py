"""What keeps the start of a deep model quick.

Megatron-core is loaded without PyTorch's compiler, and built without Python's garbage collector.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

# The last two are loaded by every DeepSpeed engine and by every optimizer of PyTorch.
# DeepSpeed's Muon, which we do not use, has compiled functions.
LIBRARIES = (
    "megatron.core.models.gpt",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._dynamo",
)


@contextlib.contextmanager
def compiled_when_called() -> Iterator[None]:
    """Inside it `torch.compile` of a function waits for the function's first call.

    Megatron-core decorates its fused functions as it is imported.
    That alone loads the compiler, more than half of that import's time.
    Runs with our layers call none of these functions.
    """
    now = torch.compile

    def later(function: Callable[..., object] | None = None, **options: Any) -> Callable[..., object]:
        if function is None:
            return functools.partial(later, **options)
        compiled = functools.cache(lambda: now(function, **options))

        @functools.wraps(function)
        def call(*args: object, **kwargs: object) -> object:
            return compiled()(*args, **kwargs)

        return call

    torch.compile = later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = now


@contextlib.contextmanager
def collector_at_rest() -> Iterator[None]:
    """Inside it Python does not look for cycles of garbage.

    Afterwards it looks no more among what was made by then, until `gc.unfreeze`.
    A full search walks every object there is.
    Loading modules and building layers makes a million objects that stay,
    so that one search after another would find nothing.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
    gc.freeze()


def load_libraries() -> None:
    """Imports what every run computes with. More calls do nothing."""
    with collector_at_rest(), compiled_when_called():
        for module in LIBRARIES:
            importlib.import_module(module)

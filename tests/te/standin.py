"""Transformer Engine's Python part on a machine without a GPU, in a process of its own.

The package is Python only (0.7 MB), but must stay outside site-packages.
There it raises RuntimeError at import without its libraries, which Megatron-core does not catch.
`python_part` finds or downloads it into a folder of its own.
`load` imports it from there, with `tests.te.extension` in the place of the compiled part.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import sys
import types
import unittest.mock
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.beside import beside
from tests.te import extension

VARIABLE = "FATHOM_TE_PYTHON"


@functools.cache
def python_part(release: str) -> tuple[Path | None, str]:
    """(folder that holds the package `transformer_engine`, "") or (None, why there is none)."""
    return beside("transformer-engine", release, VARIABLE)


class _Names(types.ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return unittest.mock.MagicMock(name=name)


def _module(name: str) -> Any:
    made: Any = _Names(name)
    made.__path__ = []
    sys.modules[name] = made
    return made


def _pretend_triton() -> None:
    """Names and decorators of Triton, while Transformer Engine's modules are imported."""
    # These ask whether Triton is there, once, and must get the true answer.
    import torch._dynamo
    import torch._inductor.compile_fx  # noqa: F401
    from torch.utils._triton import has_triton, has_triton_package

    has_triton_package(), has_triton()

    def decorator(*args: Any, **kwargs: Any) -> Any:
        return args[0] if args and callable(args[0]) else lambda function: function

    triton, language = _module("triton"), _module("triton.language")
    triton.language, triton.__version__, language.constexpr = language, "0.0.0", int
    triton.jit = decorator
    triton.autotune = triton.heuristics = lambda *args, **kwargs: lambda function: function
    for part in ("core", "standard", "extra"):
        setattr(language, part, _module(f"triton.language.{part}"))


def load(folder: Path) -> types.ModuleType:
    """`transformer_engine.pytorch` with the stand-in.

    Call before anything imports transformer_engine or megatron.core.
    """
    import torch  # noqa: F401

    if "megatron.core" in sys.modules or "transformer_engine" in sys.modules:
        raise RuntimeError("the stand-in must be loaded before megatron.core and transformer_engine")
    sys.path.insert(0, str(folder))
    without_triton = importlib.util.find_spec("triton") is None
    if without_triton:
        _pretend_triton()
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # the package then looks for no library
    os.environ.pop("NVTE_FRAMEWORK", None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import transformer_engine  # its PyTorch part fails softly here: there is no shared object

            sys.modules["transformer_engine.common"].load_framework_extension = lambda framework: None  # type: ignore[attr-defined]
            for name in [name for name in sys.modules if name.startswith("transformer_engine.pytorch")]:
                del sys.modules[name]
            extension.speak(importlib.metadata.version("transformer_engine"))
            sys.modules["transformer_engine_torch"] = extension
            _module(
                "transformer_engine.pytorch.onnx_extensions"
            )  # needs onnxscript at import, and exports are no subject here
            import transformer_engine.pytorch as te
    finally:
        if without_triton:
            for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
                del sys.modules[name]
    transformer_engine.pytorch = te
    return te


@contextlib.contextmanager
def pretend_cuda(device: str) -> Iterator[None]:
    """Modules that insist on CUDA are built on `device` instead: "cpu" or "meta".

    Never around torch.compile.
    """
    import torch

    changes = {
        "is_available": lambda: True,
        "current_device": lambda: torch.device(device),
        "Stream": lambda *args, **kwargs: None,
    }
    with contextlib.ExitStack() as stack:
        for name, value in changes.items():
            stack.enter_context(unittest.mock.patch.object(torch.cuda, name, value))
        yield

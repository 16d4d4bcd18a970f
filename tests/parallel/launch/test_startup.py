from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.launch.startup import collector_at_rest, compiled_when_called

ROOT = Path(__file__).resolve().parents[3]


def test_compilation_waits_for_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[str, dict[str, Any]]] = []

    def compile_(function: Any, **options: Any) -> Any:
        compiled.append((function.__name__, options))
        return lambda x: ("compiled", function(x))

    monkeypatch.setattr(torch, "compile", compile_)
    with compiled_when_called():

        @torch.compile
        def plain(x: int) -> int:
            return x + 1

        class Part:
            @torch.compile(dynamic=True)
            def method(self) -> int:
                return 7

    assert torch.compile is compile_
    assert not compiled
    assert [plain(1), plain(2), Part().method()] == [("compiled", 2), ("compiled", 3), ("compiled", 7)]
    assert compiled == [("plain", {}), ("method", {"dynamic": True})]


def test_the_compiler_comes_back_after_an_error() -> None:
    before = torch.compile
    with pytest.raises(RuntimeError), compiled_when_called():
        raise RuntimeError
    assert torch.compile is before


def test_the_collector_rests_and_comes_back() -> None:
    gc.unfreeze()
    try:
        with collector_at_rest():
            assert not gc.isenabled()
            kept: list[list[int]] = [[] for _ in range(10)]
        assert gc.isenabled()
        assert gc.get_freeze_count() > len(kept)
        with pytest.raises(RuntimeError), collector_at_rest():
            raise RuntimeError
        assert gc.isenabled()
    finally:
        gc.unfreeze()


def test_loading_the_libraries_loads_no_compiler() -> None:
    code = (
        "import sys; from parallel.launch.startup import load_libraries; load_libraries(); "
        "import pretrain.train.loop, pretrain.train.build\n"
        "assert 'megatron.core.models.gpt' in sys.modules and 'torch._inductor.compile_fx' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        check=True,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
    )

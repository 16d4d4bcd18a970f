"""The parts of the GPU benchmark that need no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.autograd import DeviceType

from benchmarks import gpu
from benchmarks.gpu import (
    FAILED,
    FILES,
    OUT_OF_MEMORY,
    SEQ,
    Case,
    busy_seconds,
    cases_for,
    gpu_intervals,
    out_of_memory,
    run_case,
    table,
)
from model.parameters.size import parameter_count
from parallel.config import ParallelConfig
from parallel.hardware.precision import RECIPES, Machine, check_sizes, numerics_for
from parallel.topology import check_layout

ROOT = Path(__file__).resolve().parents[2]
B200 = Machine("NVIDIA B200", (10, 0), (13, 0), "2.11.0", "", "3.6.0")


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        ([], 0.0),
        ([(0, 10)], 10e-6),
        ([(0, 10), (20, 30)], 20e-6),
        ([(20, 30), (0, 25)], 30e-6),
        ([(0, 100), (10, 20), (50, 120)], 120e-6),
    ],
)
def test_busy_time_is_the_union(intervals: list[tuple[float, float]], expected: float) -> None:
    assert busy_seconds(intervals) == pytest.approx(expected)


def test_only_what_the_gpu_ran_is_busy() -> None:
    def event(device: DeviceType, **more: bool) -> SimpleNamespace:
        return SimpleNamespace(device_type=device, time_range=SimpleNamespace(start=1.0, end=3.0), **more)

    events = [event(DeviceType.CUDA), event(DeviceType.CPU), event(DeviceType.CUDA, is_user_annotation=True)]
    profile = SimpleNamespace(events=lambda: events)
    assert gpu_intervals(profile) == [(1.0, 3.0)]  # type: ignore[arg-type]


@pytest.mark.parametrize("model", list(FILES))
def test_every_case_can_be_configured_at_1p5_billion(model: str) -> None:
    """Also in every FP8 recipe: all sizes fit their kernels."""
    for case in cases_for(
        [model], ["local", "te"], list(RECIPES), micro=8, accumulation=4, joined=True, liger=True
    ):
        config = case.config()
        numerics = numerics_for(config.train.precision, config.train.kernels, config.train.fp8, B200)
        layout = check_layout(ParallelConfig(), config.model, 1)
        check_sizes(numerics, config.model, layout, seq_length=SEQ, micro_batch_size=case.micro)
        assert numerics.label == case.precision
        assert config.train.global_batch_size == 32
    assert 1.45e9 < parameter_count(config.model)["total"] < 1.6e9


def test_cases() -> None:
    labels = [
        case.label
        for case in cases_for(
            ["gpt2_xl", "deep_96", "deep_1000"],
            ["local", "te"],
            ["blockwise", "delayed"],
            8,
            4,
            joined=True,
            liger=True,
        )
    ]
    assert labels == [
        "gpt2_xl te bf16 graph",
        "deep_96 te bf16 graph",
        "deep_1000 te bf16 graph",
        "gpt2_xl te_joined bf16 graph",
        "gpt2_xl local_joined bf16 graph",
        "gpt2_xl te bf16 graph sums in products",
        "gpt2_xl local_joined bf16 graph sums in products",
        "gpt2_xl local_joined bf16 graph sums in products activations in products",
        "deep_1000 te_joined bf16 graph",
        "deep_1000 local_joined bf16 graph",
        "deep_1000 te bf16 graph sums in products",
        "deep_1000 local_joined bf16 graph sums in products",
        "deep_1000 local_joined bf16 graph sums in products activations in products",
        "gpt2_xl te blockwise graph",
        "gpt2_xl te delayed graph",
        "deep_96 te blockwise graph",
        "deep_1000 te blockwise graph",
        "gpt2_xl te bf16 eager",
        "gpt2_xl te bf16 eager losses by liger",
        "gpt2_xl te blockwise eager",
        "deep_96 te bf16 eager",
        "deep_1000 te bf16 eager",
        "gpt2_xl local bf16 eager",
        "gpt2_xl local bf16 graph",
        "deep_1000 local bf16 compiled graph",
    ]


def test_the_table_shows_numbers_and_failures() -> None:
    good = {
        "label": "a",
        "micro": 8,
        "parameters": 1.5e9,
        "step_s": 0.5,
        "tokens_per_s": 65536.0,
        "tflops": 600.0,
        "mfu": None,
        "launch_share": 0.25,
    }
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(
        table([good | {"memory_allocated_bytes": 2**35}, {"label": "b", "micro": 4, "error": "it broke"}])
    )
    text = console.export_text()
    assert "32.0 GiB" in text
    assert "25 %" in text
    assert "unknown" in text
    assert "it broke" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "has no CUDA GPU" in done.stderr


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("tried to allocate"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("device-side assert"), False),
    ],
)
def test_want_of_memory_by_whatever_name(error: Exception, expected: bool) -> None:
    assert out_of_memory(error) is expected
    later = ValueError("the step cannot be captured")
    later.__cause__ = error
    assert out_of_memory(later) is expected


def case_process(monkeypatch: pytest.MonkeyPatch, *outcomes: tuple[int, str, str]) -> list[int]:
    """Stands in for the processes of cases: (exit code, stdout, stderr) of each.

    Returns where their micro-batches are noted.
    """
    micros: list[int] = []
    left = list(outcomes)

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        micros.append(json.loads(command[command.index("--only") + 1])["micro"])
        code, out, errors = left.pop(0)
        return SimpleNamespace(returncode=code, stdout=out, stderr=errors)

    monkeypatch.setattr(gpu.subprocess, "run", run)
    return micros


def test_a_case_without_memory_is_tried_with_smaller_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    micros = case_process(
        monkeypatch, (OUT_OF_MEMORY, "", ""), (OUT_OF_MEMORY, "", ""), (0, 'loading\n{"tflops": 1.0}\n', "")
    )
    assert run_case(Case("gpt2_xl", "te", "none", 8, 4), 10) == {"tflops": 1.0}
    assert micros == [8, 4, 2]


@pytest.mark.parametrize(("code", "expected"), [(FAILED, "RuntimeError: why"), (-9, "killed")])
def test_a_case_that_fails_says_why(code: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case_process(monkeypatch, (code, "RuntimeError: why\n", "something\nkilled\n"))
    assert run_case(Case("gpt2_xl", "te", "none", 8, 4), 10)["error"] == expected

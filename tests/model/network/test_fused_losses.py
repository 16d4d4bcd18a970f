"""Losses of libraries that take the output projection along, against those of our logits.

Liger-Kernel and Triton come into folders beside the environment, as for
`tests/model/layers/test_join_kernel.py`. On a GPU: `tests/gpu/test_gpu_losses.py`.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from model import loss_kernels
from model.loss_kernels import LOSS_KERNELS, liger_budget, rows_at_once
from model.network.fused_losses import FUSED_LOSSES, torch_losses
from tests.beside import beside
from tests.model.network.fused_models import CASES, errors
from tests.model.network.test_chunks import Largest

ROOT = Path(__file__).resolve().parents[3]
NEEDED = (("liger-kernel", "0.8.5", "FATHOM_LIGER"), ("triton", "3.9.0", "FATHOM_TRITON"))
has_torch = pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="this torch has no linear_cross_entropy"
)


def test_every_entry_that_is_fused_has_its_function() -> None:
    assert FUSED_LOSSES.keys() == {name for name, kernel in LOSS_KERNELS.items() if kernel.fused}


@has_torch
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_torch_computes_the_same(fields: dict[str, Any]) -> None:
    for chunk in (None, 5):
        found = errors(torch_losses, fields, torch.float64, chunk=chunk)
        assert found["losses"] < 1e-14
        assert found["evaluated"] < 1e-6  # in fp32
        assert found["gradients"] < 1e-12


@has_torch
@pytest.mark.parametrize("chunk", [None, 1, 5])
def test_few_logits_exist_at_once(chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an evaluation asks for the likeliest tokens, for which no kernel is made."""
    from tests.model.hf.tiny import make_config
    from tests.model.network.fused_models import BATCH, SEQ, example, passed

    monkeypatch.setattr(loss_kernels, "LEAST", 1)
    config = make_config(hidden_size=8, max_position_embeddings=SEQ, vocab_size=112)
    model, batches = example(config, torch.float32)
    model.loss_kernel, model.loss_chunk = torch_losses, chunk
    assert rows_at_once(BATCH * SEQ, 8, 112) == 4  # of three samples: two positions of each
    most = BATCH * (chunk or 2)
    with Largest(112) as seen:
        passed(model, batches)
        with torch.no_grad():
            model(batches[0], hits=True)
    assert 0 < seen.rows <= max(most, 8)  # the projection's gradient has eight rows


def test_rows_at_once_are_as_many_numbers_as_the_hidden_states() -> None:
    assert rows_at_once(8192, 4096, 128256) == 256
    assert rows_at_once(8192, 4096, 50257) == 1024  # 631 make the next power of two
    assert rows_at_once(8192, 1024, 131072) == 256  # 64 would be few
    assert rows_at_once(1000, 64, 60) == 1000
    assert rows_at_once(3, 8, 4096) == 3


def test_liger_takes_as_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own rule (`fused_linear_cross_entropy_forward`); never more."""

    def taken(rows: int, width: int, vocab: int) -> int:
        parts = -(-vocab // (liger_budget(rows, width, vocab) * width))
        return min(1 << (-(-rows // parts) - 1).bit_length(), rows)

    assert taken(8192, 4096, 50257) == 1024
    for width in (256, 1024, 4096):
        assert taken(8192, width, 131072) == 256
    monkeypatch.setattr(loss_kernels, "LEAST", 1)
    for rows, width, vocab in itertools.product((1, 36, 100, 1023), (8, 32, 100), (16, 101, 3000)):
        assert 1 <= taken(rows, width, vocab) <= rows_at_once(rows, width, vocab)
    assert taken(36, 32, 101) == 16  # so that the interpreter has several parts


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """What Liger's kernels computed by Triton's interpreter, in a process of its own."""
    folders = [beside(package, version, variable, seconds=600) for package, version, variable in NEEDED]
    for folder, why in folders:
        if folder is None:
            pytest.skip(why)
    output = tmp_path_factory.mktemp("liger") / "errors.json"
    path = os.pathsep.join(map(str, (ROOT, *(folder for folder, _ in folders))))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.model.network.fused_worker", str(output)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(output.read_text(encoding="utf-8")))


def test_liger_computes_the_same(interpreted: dict[str, dict[str, float]]) -> None:
    """In fp32 to rounding, smoothing and z-loss in gradients alone; in bf16 to its own."""
    assert len(interpreted) == len(CASES) + 4
    bf16 = interpreted.pop("bf16")
    for name, found in interpreted.items():
        assert found["losses"] < 2e-6, name
        assert found["evaluated"] < 2e-6, name
        # Two roundings of one gradient, which some models make much of.
        assert found["gradients"] < 3 * max(found["rounding"], 4e-7), name
    assert bf16["losses"] < 2e-6  # of the same logits
    assert bf16["gradients"] < 2.0**-6

"""What all tests share: one thread per process, no network, and skips.

A skip tells its reason where a machine lacks something.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Set before anything imports a numerical library, which reads them once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Where transformers copies the modelling files of exports: not the user's cache.
# Each test process has its own, so that none sees another's copies.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="fathom-tests-hf-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

TESTS = Path(__file__).resolve().parent
# The same inputs in every run, so that a failure belongs to a change.
# `--hypothesis-profile=default` draws new ones.
hypothesis.settings.register_profile("fixed", derandomize=True, database=None)
hypothesis.settings.load_profile("fixed")

SBIN = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


@functools.cache
def _no_cuda() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


@functools.cache
def _no_transformer_engine() -> str | None:
    return _no_cuda() or (
        None if importlib.util.find_spec("transformer_engine") else "Transformer Engine is not installed"
    )


@functools.cache
def _no_slurm() -> str | None:
    missing = [name for name in ("slurmctld", "slurmd", "munged") if shutil.which(name, path=SBIN) is None]
    return f"Slurm is not installed: {', '.join(missing)} missing" if missing else None


# The files that take longest go first: none of them still runs when all others are through.
LONGEST = (
    "slurm/test_slurm_cluster.py",
    "parallel/engine/test_layouts.py",
    "slurm/test_slurm_training.py",
    "parallel/engine/test_crossed_layouts.py",
    "parallel/checkpoint/test_reshard.py",
    "parallel/engine/test_gradients.py",
    "parallel/checkpoint/test_resume.py",
    "pretrain/train/test_run.py",
    "pretrain/train/test_recipe.py",
    "fuzz/test_commands.py",
    "te/test_te_spec.py",
    "parallel/engine/test_dropout.py",
)

LACKS = {"gpu": _no_cuda, "te": _no_transformer_engine, "slurm": _no_slurm}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what this machine cannot run; moves the longest files to the front.

    It looks at the machine only where a collected test needs it.
    """
    first = {TESTS / name: place for place, name in enumerate(LONGEST)}
    assert all(path.is_file() for path in first), "LONGEST in tests/conftest.py names a file that is gone"
    items.sort(key=lambda item: first.get(item.path, len(first)))
    for item in items:
        for mark, lack in LACKS.items():
            reason = lack() if item.get_closest_marker(mark) else None
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def imported_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 of Hugging Face, and in `checkpoint` what `fathom import` makes of it."""
    from pretrain.trained.folders.import_hf import import_checkpoint
    from tests.tools.small_models import save_gpt2

    folder = tmp_path_factory.mktemp("gpt2")
    save_gpt2(folder, n_positions=32)
    import_checkpoint(str(folder), folder / "checkpoint")
    return folder


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints what tests have counted (`record_property("counts", TEXT)`), also under xdist."""
    lines = {
        f"{report.nodeid}: {value}": None
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "counts"
    }
    for line in lines:
        terminalreporter.write_line(line)

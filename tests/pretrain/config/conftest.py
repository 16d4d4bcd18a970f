"""What the tests of configurations share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pretrain.config.minimal import MINIMAL


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(MINIMAL)
    return Path("tiny.yaml")

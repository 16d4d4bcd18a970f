"""The digits are files in folders; where their package is missing one line says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.dev.digit_images import write_digits


def test_digits_are_images_by_class(tmp_path: Path) -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="the digits are in scikit-learn")
    write_digits(tmp_path)
    assert len(list(tmp_path.glob("[0-9]/*.png"))) == 1797
    first = np.asarray(Image.open(tmp_path / "0/0000.png"), dtype=np.float64)
    np.testing.assert_allclose(first * 16 / 255, datasets.load_digits().images[0], atol=0.04)


def test_a_missing_package_is_one_line(tmp_path: Path) -> None:
    blocked = "import sys; sys.modules['sklearn.datasets'] = None; sys.argv = ['digits', 'out']; "
    code = blocked + "from tools.dev import run; from tools.dev.digit_images import write_digits as w; run(w)"
    env = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, env=env
    )
    assert done.returncode == 2
    assert done.stderr == "error: the digits are in the package scikit-learn: pip install '.[digits]'\n"
    assert not (tmp_path / "out").exists()

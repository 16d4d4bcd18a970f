"""`tools.dev.check_export` and `tools.dev.fresh_export` run no foreign code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("tool", ["check_export", "fresh_export"])
def test_foreign_code_is_refused_in_one_line(tmp_path: Path, tool: str) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    executed = tmp_path / "executed"
    (folder / "evil.py").write_text(f"open({str(executed)!r}, 'w')\nclass Evil: pass\n")
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps({"model_type": "fathom", "auto_map": auto_map}))
    arguments = [str(tmp_path / "run"), "--exported", str(folder)]
    if tool == "fresh_export":  # this very environment, which has transformers
        (tmp_path / "venv/bin").mkdir(parents=True)
        (tmp_path / "venv/bin/python").symlink_to(sys.executable)
        arguments += ["--venv", str(tmp_path / "venv")]
    done = subprocess.run(
        [sys.executable, "-m", f"tools.dev.{tool}", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "brings code that is not ours, which is not run" in done.stderr
    assert not executed.exists()

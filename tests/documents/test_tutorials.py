"""What the tutorials tell a reader to type does what they say, from the first page to the last."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents.test_site import DOCS, in_navigation, settings
from tests.forks import ROOT, shell_environment

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [page for page in in_navigation(settings()["nav"]) if page.startswith("tutorials/")]
LIMIT = 3000


def script(page: str, folder: Path) -> str:
    """What is typed on a page, in order.

    Files that it shows, of which the first line is the name, are written into the folder.
    Blocks of the kind `console` need a GPU, a cluster or a download.
    """
    lines = []
    for kind, text in BLOCK.findall((DOCS / page).read_text(encoding="utf-8")):
        if kind == "yaml":
            name = re.match(r"# (\w+\.yaml)\n", text)
            assert name, f"{page}: a file without a name"
            (folder / name[1]).write_text(text)
        elif kind == "sh":
            lines.append(text)
        else:
            assert kind == "console", f"{page}: a block of {kind}"
    return "".join(lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder, and `fathom` and `python` on the path."""
    made = tmp_path_factory.mktemp("reader")
    (made / "bin").mkdir()
    for name, command in (("fathom", "-W ignore -m tools.cli"), ("python", "-W ignore")):
        file = made / "bin" / name
        file.write_text(f'#!/bin/sh\nexec {sys.executable} {command} "$@"\n')
        file.chmod(0o755)
    return made


@pytest.mark.parametrize("page", PAGES)
def test_files_of_a_tutorial_are_configurations(page: str, tmp_path: Path) -> None:
    from pretrain.cluster.site_file import load_site
    from pretrain.config.load import load_config

    assert script(page, tmp_path)
    for file in tmp_path.glob("*.yaml"):
        load_site(file) if file.name == "site.yaml" else load_config(file)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_a_reader_can_type_it(page: str, folder: Path) -> None:
    """One page after another, in the order of the navigation, as later ones use earlier ones."""
    env = shell_environment()
    env |= {
        "PATH": f"{folder / 'bin'}{os.pathsep}{env['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script(page, folder)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

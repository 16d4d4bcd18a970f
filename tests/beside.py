"""Packages that tests need and the environment must not have, in folders of their own beside it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def beside(package: str, version: str, variable: str, seconds: int = 120) -> tuple[Path | None, str]:
    """(folder that holds a package, "") or (None, why there is none).

    It is PACKAGE-VERSION inside of the folder that an environment variable names, or else inside
    the virtual environment. pip fills that one the first time, within so many seconds.
    """
    requirement, module = f"{package}=={version}", package.replace("-", "_")
    name = f"{package}-{version}"
    if variable in os.environ:
        given = Path(os.environ[variable])
        there = (given / name / module).is_dir()
        return (given / name, "") if there else (None, f"{variable}={given} holds no {name}/{module}")
    folder = Path(sys.prefix) / name
    if (folder / module).is_dir():
        return folder, ""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{package}-", dir=folder.parent))
    except OSError as error:
        return (
            None,
            f"{folder.parent} cannot be written: {error.strerror}; "
            f"put {requirement} into a folder FOLDER/{name}, and name FOLDER in {variable}",
        )
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    limits = ["--retries", "1", "--timeout", "15"]
    what = ["--no-deps", "--only-binary=:all:", "--no-compile", "--target", str(partial), requirement]
    try:
        done = subprocess.run(
            [*pip, *limits, *what], capture_output=True, text=True, timeout=seconds, check=False
        )
        failed = done.returncode != 0
    except (OSError, subprocess.TimeoutExpired):
        failed = True
    if not failed:
        # Another process may have been quicker; both folders hold the same.
        with contextlib.suppress(OSError):
            partial.chmod(0o755)
            partial.rename(folder)
    shutil.rmtree(partial, ignore_errors=True)
    if (folder / module).is_dir():
        return folder, ""
    by_hand = (
        f"pip install --no-deps --target FOLDER/{name} {requirement} where there is a network, "
        f"then {variable}=FOLDER"
    )
    return None, f"{requirement} could not be downloaded: {by_hand}"

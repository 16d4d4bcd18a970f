"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.errors import UserError
from model.files import sync_folder


@contextmanager
def staged_folder(out: Path, marker: str, overwrite: bool) -> Iterator[Path]:
    """Gives a hidden folder beside `out`; on leaving without an error, syncs its files and renames it to `out`, else removes it.

    marker: the file that tells a folder written earlier from one that holds something else, which is never replaced.
    Raises UserError when `out` exists and may not be replaced, or its parent cannot be written.
    """
    out = Path(os.path.abspath(out))
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    if out.is_dir() and any(out.iterdir()):
        if not (out / marker).is_file():
            raise UserError(
                f"--out {out}: the folder holds something else than a data set; name another folder"
            )
        if not overwrite:
            raise UserError(f"--out {out}: a data set is there already; add --overwrite to replace it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    except OSError as error:
        raise UserError(f"--out {out}: cannot write to {out.parent}: {error.strerror}") from error
    try:
        yield staging
        _publish(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, out: Path) -> None:
    for path in staging.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    mask = os.umask(0)
    os.umask(mask)
    staging.chmod(0o777 & ~mask)
    sync_folder(staging)
    replaced = None
    if out.is_dir() and any(out.iterdir()):
        replaced = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
        out.rename(replaced)  # onto the empty folder just made
    try:
        staging.rename(out)
    except OSError as error:
        if replaced is not None:
            replaced.rename(out)
        raise UserError(
            f"--out {out}: cannot be put in place: {error.strerror}; something else wrote there meanwhile"
        ) from error
    sync_folder(out.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)

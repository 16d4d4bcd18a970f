"""A copy of the code as it is now, so that a queued job does not change when the checkout does."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from model.files import atomic_write_text
from pretrain.rundir.environment import ROOT, SNAPSHOT_FILE, CodeCopy, read_snapshot
from pretrain.rundir.git import git_output

COPIED = ("model", "parallel", "pretrain", "tools", "slurm", "configs", "pyproject.toml")
"""What a run may need of the repository; tests, docs and data are left out."""


def copy_code(target: Path, source: Path = ROOT) -> CodeCopy:
    """Copies the code of `source` to `target`, replacing an older copy; describes it in
    SNAPSHOT.json there.

    In a git checkout: tracked files with their uncommitted changes, and new files of the packages
    that git does not ignore, because changed code may import them.
    Elsewhere: the packages without caches; a copy of a copy is of the same commit.
    Raises OSError as the file system does, and UserError where git refuses the checkout.
    """
    commit = git_output(source, "rev-parse", "HEAD") if (source / ".git").exists() else None
    files = _files_of_git(source) if commit else _files(source)
    status = git_output(source, "status", "--porcelain", "--", *COPIED) if commit else None
    changed = sorted(line[3:] for line in (status or "").splitlines())
    copied = read_snapshot(source)
    if commit is None and copied is not None:
        commit, changed = copied.commit, copied.changed
    fresh, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    for folder in (fresh, old):
        shutil.rmtree(folder, ignore_errors=True)
    for name in files:
        (fresh / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, fresh / name)
    snapshot = CodeCopy(str(source), commit.strip() if commit else None, changed, len(files))
    atomic_write_text(fresh / SNAPSHOT_FILE, json.dumps(asdict(snapshot), indent=1) + "\n")
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return snapshot


def _files_of_git(source: Path) -> list[str]:
    listing = (
        git_output(source, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *COPIED)
        or ""
    )
    # A tracked file that was deleted and not committed is listed too.
    return sorted({name for name in listing.split("\0") if name and (source / name).is_file()})


def _files(source: Path) -> list[str]:
    found = [
        path
        for part in COPIED
        for path in ([source / part] if (source / part).is_file() else (source / part).rglob("*"))
    ]
    return sorted(
        str(path.relative_to(source)) for path in found if path.is_file() and "__pycache__" not in path.parts
    )

"""`fathom init`: a folder to begin in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

PROJECT = Path(__file__).with_name("project")
"""What is copied."""


def command(
    folder: Annotated[Path, typer.Argument(help="Folder to make, or one without files.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print folder and files as JSON.")] = False,
) -> None:
    """Write an example project.

    A configuration, a site file for Slurm, a small text, and in README.md what to type.
    """
    from model.folders import FolderKind, check_target, whole_folder
    from pretrain.cluster.script import SITE_EXAMPLE

    kind = FolderKind("a folder with files", None, "name a new or an empty one")
    check_target(folder, kind)
    # Put in place inside of the folder, which may be the one that the user's shell is in.
    new = folder / "new"
    with whole_folder(new, kind) as staging:
        shutil.copytree(PROJECT, staging, dirs_exist_ok=True)
        shutil.copyfile(SITE_EXAMPLE, staging / "site.yaml")
    for file in sorted(new.iterdir()):
        file.rename(folder / file.name)
    new.rmdir()
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), "files": files}))
        return
    typer.echo(f"{folder}: {', '.join(files)}")
    typer.echo(f"{folder / 'README.md'} says what to type next")

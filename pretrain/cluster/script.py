"""From a run and a site to the text of a batch script (`slurm/train.sbatch.j2`)."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model.errors import UserError
from model.words import printable
from pretrain.cluster.decision import MAX_RESTARTS
from pretrain.cluster.site_file import SiteConfig
from pretrain.cluster.supervise import NOTHING_TO_DO

SLURM = Path(__file__).resolve().parents[2] / "slurm"
JOB_CONFIG = "submitted.yaml"
"""In the run directory: the configuration that the job takes."""
TEMPLATE, SITE_EXAMPLE = SLURM / "train.sbatch.j2", SLURM / "site.example.yaml"

LEFT_OVER_SECONDS = 120
"""srun --wait: how long tasks may outlive the first one that ended, before they count as stuck."""


@dataclass(frozen=True, kw_only=True)
class Script:
    """What a batch script depends on besides the site."""

    name: str
    nodes: str
    """As sbatch takes it, such as 4 or 2-4."""
    time: str
    run: Path
    """Run directory; of an array, what its elements' directories have in common before `-INDEX`."""
    code: Path
    log: Path
    python: str
    array: str | None = None
    allowed_nodes: Sequence[int] = ()
    max_restarts: int = MAX_RESTARTS
    command: Sequence[str] = ("-m", "tools.cli", "pretrain", f"$RUN/{JOB_CONFIG}")
    """The tasks' arguments after Python, with `$RUN` for the run directory."""


def render(script: Script, site: SiteConfig) -> str:
    """The text of the batch script.

    Raises UserError for a path that Slurm would read as something else, and for a text that is no
    shell.
    """
    import jinja2

    for path in (script.run, script.code):
        # Slurm expands % and \ in file names and reads a comma-separated list of container mounts.
        if not path.is_absolute() or not str(path).isprintable() or set(str(path)) & set("%\\\"',:"):
            raise UserError(
                f"the run directory {str(path)!r} has a character that Slurm reads in a way of its own "
                "(% \\ \" ' , : or one that is not shown): set runs_dir to another path"
            )
    if not TEMPLATE.is_file():
        raise UserError(f"{TEMPLATE} is missing: install Fathom again, or restore the file")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    environment.filters["directive"] = _in_directive
    fields = {
        **vars(script),
        "allowed_nodes": ",".join(map(str, script.allowed_nodes)) if len(script.allowed_nodes) > 1 else "",
    }
    fields["command"] = _command(script, site)
    mounts = [f"{script.run.parent}:{script.run.parent}", *(site.container.mounts if site.container else [])]
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        **fields,
        site=site,
        wait=LEFT_OVER_SECONDS,
        nothing_to_do=NOTHING_TO_DO,
        container_mounts=",".join(mounts),
    )
    check_shell(text)
    return text


def check_shell(text: str) -> None:
    """Asks bash, where it is there, whether it can read a script.

    Raises UserError naming the line, for which the site file's `setup` is to blame: all else is
    quoted.
    """
    plain = os.environ | {
        "LC_ALL": "C"
    }  # no translations, and no complaint about a language that is not installed
    try:
        answer = subprocess.run(
            ["bash", "-n"], input=text, text=True, capture_output=True, timeout=60, env=plain, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return
    # A here-document without its end is a warning only, and swallows the rest.
    if answer.returncode or answer.stderr:
        words = (answer.stderr.splitlines() or ["no reason given"])[0].removeprefix("bash: ")
        raise UserError(
            f"site file: with its `setup` lines the batch script is no valid shell ({printable(words)})"
        )


def _in_directive(value: object) -> str:
    """A word of a #SBATCH line, in quotes where Slurm would take it for more or less than one."""
    return str(value) if re.fullmatch(r"[\w./:=,@%+-]*", str(value)) else f'"{value}"'


def _command(script: Script, site: SiteConfig) -> str:
    """Words for the shell; `$RUN` stays a variable, inside of double quotes."""
    python = shlex.quote(site.container.python) if site.container else '"$PYTHON"'
    return " ".join(
        [python, *(f'"{word}"' if "$RUN" in word else shlex.quote(word) for word in script.command)]
    )

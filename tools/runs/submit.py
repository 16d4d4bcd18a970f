"""`fathom submit`: hand a run to Slurm."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from model.errors import UserError
from pretrain.cluster.decision import MAX_RESTARTS
from tools.shipped import say_shipped

if TYPE_CHECKING:
    from pretrain.cluster.submit import Plan

FOLLOW_SECONDS = 1.0
QUEUE_SECONDS = 15.0
"""Between two looks at the queue while following: slurmctld serves everybody."""


ConfigFile = Annotated[str, typer.Argument(help="Configuration file, or the name of a shipped one.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to it, key=value.")]
Nodes = Annotated[
    str,
    typer.Option(
        "--nodes", "-N", help="Number of nodes, or a range such as 2-4: each start uses what it gets."
    ),
]
TimeLimit = Annotated[
    str | None,
    typer.Option(
        "--time",
        "-t",
        help="Time limit of one start: minutes, HH:MM:SS or D-HH:MM:SS. Default: that of the site file.",
    ),
]
SiteFile = Annotated[Path | None, typer.Option(help="Site file. Default: the one FATHOM_SITE names.")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Show the script and all that is wrong; write and submit nothing."),
]
Dependency = Annotated[str | None, typer.Option(help="As sbatch takes it, such as afterok:1234.")]
Chain = Annotated[
    int,
    typer.Option(help="Submit this many jobs, each going on where the one before was at its time limit."),
]
Array = Annotated[
    list[str] | None,
    typer.Option(
        help="A file with one line of overrides for each run, or such a line; may be given several times."
    ),
]
MaxRestarts = Annotated[
    int,
    typer.Option(min=0, help="Restarts in a row without a new checkpoint before the run is given up."),
]
Follow = Annotated[
    bool,
    typer.Option(
        "--follow",
        "-f",
        help="Show the log until the job has left the queue; ctrl-C leaves the job alone.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


def command(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Nodes = "1",
    limit: TimeLimit = None,
    site: SiteFile = None,
    dry_run: DryRun = False,
    dependency: Dependency = None,
    chain: Chain = 1,
    array: Array = None,
    max_restarts: MaxRestarts = MAX_RESTARTS,
    follow: Follow = False,
    as_json: AsJson = False,
) -> None:
    """Submit a run to Slurm.

    Code, configuration and the batch script are copied into the run directory, and the job runs
    from there.
    It saves and requeues itself before its time limit and after failures, until all steps are done.
    """
    from pretrain.cluster.site_file import load_site
    from pretrain.cluster.submit import Request, log_path, review, submit
    from pretrain.cluster.submit_checks import one_error
    from pretrain.config.load import load_config

    if as_json and follow:
        raise UserError("--json does not combine with --follow")
    say_shipped(config)
    request = Request(
        nodes,
        time=limit,
        dependency=dependency,
        chain=chain,
        array=array_lines(array or []),
        max_restarts=max_restarts,
    )
    planned, problems = review(
        lambda more: load_config(config, [*(overrides or []), *more]), lambda: load_site(site), request
    )
    if planned is None or problems:
        if not dry_run:
            raise one_error(problems)
        show_dry(planned, problems, as_json)
        raise typer.Exit(2)
    if dry_run:
        show_dry(planned, problems, as_json)
        return
    if not as_json:
        typer.echo(planned.script, nl=False)
    jobs = submit(planned)
    if as_json:
        logs = [str(log_path(planned, job, element)) for job in jobs for element in range(len(planned.runs))]
        typer.echo(json.dumps({"jobs": jobs, **facts(planned), "logs": logs}))
        return
    say_submitted(planned, jobs)
    if follow:
        follow_log(log_path(planned, jobs[0]), f"{jobs[0]}_0" if request.array else jobs[0])


def facts(planned: Plan) -> dict[str, object]:
    """What a plan is, for --json."""
    runs = [str(run_dir) for run_dir, _ in planned.runs]
    return {"runs": runs, "script_file": str(planned.script_file), "script": planned.script}


def show_dry(planned: Plan | None, problems: Sequence[str], as_json: bool) -> None:
    """Shows what would be submitted, as far as there is a script, and each mistake in a line of its
    own.
    """
    if as_json:
        typer.echo(
            json.dumps(
                {"jobs": [], "logs": [], **(facts(planned) if planned else {}), "problems": list(problems)}
            )
        )
        return
    if planned is not None:
        typer.echo(planned.script, nl=False)
        typer.echo(f"\nNothing was submitted. The job would run in {planned.folder}")
    for problem in problems:
        typer.echo(f"fathom: error: {problem}", err=True)


def array_lines(given: Sequence[str]) -> list[str]:
    """Lines of overrides: of every file that was given, and what is no file but has a `=` as a line
    of its own.

    Raises UserError for anything else.
    """
    lines: list[str] = []
    for item in given:
        path = Path(item)
        if "=" in item and not path.is_file():
            lines.append(item)
            continue
        if not path.is_file():
            raise UserError(f"--array {item}: no such file, and no override such as optimizer.lr=1e-3")
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        lines.extend(line for line in found if line and not line.startswith("#"))
    if given and not lines:
        raise UserError(f"--array {' '.join(given)}: no line of overrides in it")
    return lines


def say_submitted(planned: Plan, jobs: Sequence[str]) -> None:
    """Says what was submitted, where its log is and how to stop it."""
    from pretrain.cluster.submit import log_path

    last = len(planned.runs) - 1
    typer.echo("")
    for job in jobs:
        typer.echo(
            f"job {job}{f' with {last + 1} elements' if last else ''}, "
            f"log {log_path(planned, job)}{f' ... {log_path(planned, job, last)}' if last else ''}"
        )
    ids = " ".join(jobs)
    typer.echo(f"look:                       fathom status {planned.folder}")
    typer.echo(f"save, then stop for good:   scancel --batch --signal=USR2 {ids}")
    typer.echo(f"stop at once, for good:     scancel {ids}")


def follow_log(log: Path, handle: str) -> None:
    """Prints a log as it grows, until the job has left the queue. ctrl-C ends the printing only."""
    from parallel.launch import slurm_client

    position, looked, gone = 0, 0.0, False
    try:
        while True:
            if log.is_file():
                with log.open(encoding="utf-8", errors="replace") as file:
                    file.seek(position)
                    typer.echo(file.read(), nl=False)
                    position = file.tell()
            if gone:
                return
            if time.monotonic() - looked > QUEUE_SECONDS:
                looked, queued = time.monotonic(), slurm_client.queue()
                gone = queued is not None and handle not in queued
            time.sleep(FOLLOW_SECONDS)
    except KeyboardInterrupt:
        typer.echo(f"\njob {handle} goes on; its log is {log}")

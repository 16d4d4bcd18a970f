"""Submission of a run to Slurm: checks, a snapshot of code and configuration, the batch script, sbatch."""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from model.errors import UserError
from model.files import atomic_write_text
from parallel.launch import slurm_client
from pretrain.cluster.code_copy import copy_code
from pretrain.cluster.script import Script, render
from pretrain.cluster.site_file import SiteConfig, parse_time
from pretrain.cluster.supervise import MAX_RESTARTS
from pretrain.config.load import dump_config
from pretrain.config.schema import RunConfig
from pretrain.rundir import state as states
from pretrain.rundir.lock import check_free

CLOCK_SECONDS = 60
"""Slurm looks at its clock every 30 s: a signal may come that much early, a limit that much late."""


@dataclass(frozen=True)
class Request:
    """What `fathom submit` was asked for. chain: jobs in a row; array: one line of overrides for each run; command: of the tasks, for tests."""

    nodes: str
    time: str | None = None
    dependency: str | None = None
    chain: int = 1
    array: Sequence[str] = ()
    max_restarts: int = MAX_RESTARTS
    command: Sequence[str] | None = None


@dataclass(frozen=True)
class Plan:
    """All that will be written and submitted. runs: run directory and configuration of each element, one without --array."""

    folder: Path
    runs: Sequence[tuple[Path, RunConfig]]
    script: str
    log: str
    request: Request
    site: SiteConfig = field(repr=False)

    @property
    def script_file(self) -> Path:
        """Where the batch script is written."""
        return self.folder / "train.sbatch"


def parse_nodes(text: str) -> tuple[int, int]:
    """Smallest and largest number of nodes of `N` or `MIN-MAX`. Raises UserError for anything else."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise UserError(f"--nodes {text} must be a number of nodes, such as 4, or a range, such as 2-4")
    return low, high


def plan(
    load: Callable[[Sequence[str]], RunConfig], site: SiteConfig, request: Request, base: Path | None = None
) -> Plan:
    """Checks a submission and renders its script; writes nothing.

    load: gives the configuration with further overrides. base: what relative paths are relative to (the working directory). Raises UserError for a
    time limit that is missing or leaves no time before its signal, and for nodes the layout does not fit.
    """
    base = (base or Path.cwd()).absolute()
    config = absolute_paths(load([]), base)
    folder = Path(config.runs_dir) / config.name
    if request.chain < 1 or (request.chain > 1 and request.array):
        raise UserError(
            f"--chain {request.chain} {'does not combine with --array' if request.array else 'must be at least 1'}"
        )
    runs = _elements(load, request.array, folder, base) if request.array else [(folder, config)]
    allowed = {tuple(allowed_nodes(run, site, request.nodes)) for _, run in runs}
    if len(allowed) > 1:
        raise UserError(
            f"--nodes {request.nodes}: the elements of the array fit different numbers of nodes; submit them apart"
        )
    script = Script(
        name=config.name,
        nodes=request.nodes.strip(),
        time=_time_limit(request, site),
        run=folder / config.name if request.array else folder,
        code=folder / "code",
        log=folder / f"{config.name}-%a" / "slurm-%A_%a.out" if request.array else folder / "slurm-%j.out",
        python=site.python or sys.executable,
        array=f"0-{len(runs) - 1}" if request.array else None,
        allowed_nodes=list(allowed.pop()),
        max_restarts=request.max_restarts,
    )
    if request.command is not None:
        script = replace(script, command=request.command)
    return Plan(folder, runs, render(script, site), str(script.log), request, site)


def check_data(planned: Plan) -> None:
    """Raises UserError where a run's data are not there: apart from `plan`, so that a script can be read before they are prepared."""
    for _, run in planned.runs:
        for corpus in run.data.corpora:
            if not (Path(corpus.path) / "dataset.json").is_file():
                raise UserError(
                    f"data.corpora: {corpus.path} holds no dataset.json: prepare it with `fathom data prepare`, or correct the path"
                )


def absolute_paths(config: RunConfig, base: Path) -> RunConfig:
    """The configuration with every path made absolute, because a job does not run where it was submitted; parallel.processes, for local starts, is dropped."""

    def absolute(path: str | None) -> str | None:
        return None if path is None else str(base / Path(path).expanduser())

    data = config.data.model_copy(
        update={
            "cache": absolute(config.data.cache),
            "corpora": [
                corpus.model_copy(update={"path": absolute(corpus.path)}) for corpus in config.data.corpora
            ],
        }
    )
    return config.model_copy(
        update={
            "runs_dir": absolute(config.runs_dir),
            "data": data,
            "checkpoint": config.checkpoint.model_copy(update={"load": absolute(config.checkpoint.load)}),
            "parallel": config.parallel.model_copy(update={"processes": None}),
        }
    )


def allowed_nodes(config: RunConfig, site: SiteConfig, nodes: str) -> list[int]:
    """The numbers of nodes of a range on which layout and batch sizes come out even. Raises UserError where that is none, or not the smallest."""
    low, high = parse_nodes(nodes)
    problems = {number: _misfit(config, number * site.tasks) for number in range(low, high + 1)}
    if problems[low] is not None:
        fitting = next(
            (number for number in range(low, 8 * high + 1) if _misfit(config, number * site.tasks) is None),
            None,
        )
        raise UserError(
            f"--nodes {nodes} ({low * site.tasks} processes): {problems[low]}"
            + (f"; {fitting} nodes would fit" if fitting else "")
        )
    return [number for number, problem in problems.items() if problem is None]


def submit(planned: Plan) -> list[str]:
    """Writes snapshot, configurations and script, and hands the script to sbatch. Returns the job ids, more than one for a chain.

    Raises UserError when data are missing, a job is at one of the runs already, or Slurm refuses; then state.json is as before.
    """
    check_data(planned)
    queued = slurm_client.queue()
    for run_dir, _ in planned.runs:
        _refuse_if_active(run_dir, queued or {})
    planned.folder.mkdir(parents=True, exist_ok=True)
    copy_code(planned.folder / "code")
    atomic_write_text(planned.script_file, planned.script)
    before = {run_dir: _text(run_dir / states.STATE_FILE) for run_dir, _ in planned.runs}
    for run_dir, config in planned.runs:
        (run_dir / states.CONTROL).mkdir(parents=True, exist_ok=True)
        atomic_write_text(run_dir / "config.yaml", dump_config(config))
        (run_dir / states.SUBMITTED_FILE).unlink(missing_ok=True)
        states.claim(
            run_dir,
            states.Owner(None, 0),
            state=states.QUEUED,
            reason="",
            restarts=0,
            stalled=0,
            exit_code=None,
            ends_at=None,
            nodes="",
        )
    jobs: list[str] = []
    try:
        dependency = planned.request.dependency
        for _ in range(planned.request.chain):
            options = [f"--dependency={dependency}"] if dependency else []
            jobs.append(slurm_client.sbatch([*options, str(planned.script_file)]))
            # Whatever way a job of the chain ended, the next one finds it in state.json and leaves at once where nothing is left to do.
            dependency = f"afterany:{jobs[-1]}"
    except UserError:
        for run_dir, content in before.items() if not jobs else ():
            atomic_write_text(
                run_dir / states.STATE_FILE,
                content or json.dumps({"state": states.FAILED, "reason": "Slurm refused the job"}) + "\n",
            )
        raise
    finally:
        if jobs:
            _write_submitted(planned, jobs)
    return jobs


def log_path(planned: Plan, job: str, element: int = 0) -> Path:
    """The log file of a job; of an array, of one element."""
    return Path(planned.log.replace("%A", job).replace("%a", str(element)).replace("%j", job))


def _write_submitted(planned: Plan, jobs: Sequence[str]) -> None:
    for element, (run_dir, _) in enumerate(planned.runs):
        handles = [f"{job}_{element}" for job in jobs] if planned.request.array else list(jobs)
        record = {
            "jobs": handles,
            "time": round(time.time(), 3),
            "log": str(log_path(planned, jobs[0], element)),
            "nodes": planned.request.nodes,
        }
        atomic_write_text(run_dir / states.SUBMITTED_FILE, json.dumps(record, indent=1) + "\n")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _refuse_if_active(run_dir: Path, queued: dict[str, slurm_client.Queued]) -> None:
    state = states.read_state(run_dir)
    jobs = [*states.read_submitted(run_dir).get("jobs", []), state.get("job_id")]
    active = next((str(job) for job in jobs if job is not None and str(job) in queued), None)
    if active is not None:
        raise UserError(
            f"job {active} ({queued[active].state.lower()}) is at {run_dir} already: scancel {active}, or choose another name"
        )
    # A local run. The lock of a Slurm job that has left the queue may be that of a lost node, which stays for a long time.
    if state.get("job_id") is None and state.get("state") != states.QUEUED:
        check_free(run_dir)


def _elements(
    load: Callable[[Sequence[str]], RunConfig], lines: Sequence[str], folder: Path, base: Path
) -> list[tuple[Path, RunConfig]]:
    elements = []
    for index, line in enumerate(lines):
        overrides = shlex.split(line)
        if any(word.partition("=")[0] in ("name", "runs_dir") for word in overrides):
            raise UserError(
                f"--array, line {index + 1}: name and runs_dir of an element are given by its place in the array; remove them from {line!r}"
            )
        config = load([*overrides, f"runs_dir={folder}", f"name={folder.name}-{index}"])
        elements.append((folder / config.name, absolute_paths(config, base)))
    return elements


def _time_limit(request: Request, site: SiteConfig) -> str:
    limit = request.time or site.time
    if limit is None:
        raise UserError("no time limit: give --time HH:MM:SS, or set `time` in the site file")
    if parse_time(limit) < site.signal_margin + CLOCK_SECONDS:
        raise UserError(
            f"--time {limit} is {parse_time(limit)} s: the run is told to save {site.signal_margin} s before the end (signal_margin), "
            f"so give more than {site.signal_margin + CLOCK_SECONDS} s, or lower signal_margin in the site file"
        )
    return limit.strip()


def _misfit(config: RunConfig, world: int) -> str | None:
    """Why a run does not fit a number of processes; None where it does."""
    from pretrain.train.feasibility import fit_processes

    try:
        fit_processes(config, world)
    except UserError as error:
        return str(error)
    return None

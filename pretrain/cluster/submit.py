"""Submission of a run to Slurm: checks, a snapshot of the code, the batch script, sbatch."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

from model.errors import UserError
from model.files import atomic_write_text
from model.words import printable
from parallel.launch import slurm_client
from pretrain.cluster.code_copy import copy_code
from pretrain.cluster.decision import MAX_RESTARTS
from pretrain.cluster.script import JOB_CONFIG, Script, render
from pretrain.cluster.site_file import SiteConfig
from pretrain.cluster.slurm_words import check_dependency, parse_nodes, parse_time
from pretrain.cluster.submit_checks import Problems, allowed_nodes, check_run, one_error, overriding
from pretrain.config.load import dump_config
from pretrain.config.schema import RunConfig
from pretrain.rundir import state as states
from pretrain.rundir.lock import check_free

CLOCK_SECONDS = 60
"""Slurm looks at its clock every 30 s: a signal may come that early, a limit that late."""
LONGEST_CHAIN = 1000


@dataclass(frozen=True)
class Request:
    """What `fathom submit` was asked for."""

    nodes: str
    _: KW_ONLY
    time: str | None = None
    dependency: str | None = None
    chain: int = 1
    """Jobs in a row."""
    array: Sequence[str] = ()
    """One line of overrides for each run."""
    max_restarts: int = MAX_RESTARTS
    command: Sequence[str] | None = None
    """Of the tasks, for tests."""


@dataclass(frozen=True)
class Plan:
    """All that will be written and submitted."""

    folder: Path
    runs: Sequence[tuple[Path, RunConfig]]
    """Run directory and configuration of each element, one without --array."""
    script: str
    log: str
    request: Request

    @property
    def script_file(self) -> Path:
        """Where the batch script is written."""
        return self.folder / "train.sbatch"


Load = Callable[[Sequence[str]], RunConfig]
"""Gives the configuration with further overrides."""


def plan(load: Load, site: SiteConfig, request: Request, base: Path | None = None) -> Plan:
    """Checks a submission and renders its script; writes nothing.

    base: what relative paths are relative to (the working directory).
    Raises UserError for the first of the mistakes that `review` finds, and counts the others.
    """
    planned, problems = review(load, lambda: site, request, base)
    if planned is None or problems:
        raise one_error(problems)
    return planned


def review(
    load: Load, site: Callable[[], SiteConfig], request: Request, base: Path | None = None
) -> tuple[Plan | None, list[str]]:
    """What would be submitted, None where mistakes leave it open, and all mistakes; writes nothing.

    Among them: a time limit that is missing or leaves no time before its signal, nodes that the
    layout does not fit, data and checkpoints that are not there.
    """
    base = (base or Path.cwd()).absolute()
    problems = Problems()
    facts = problems.attempt(site)
    found = problems.attempt(load, [])
    nodes = problems.attempt(parse_nodes, request.nodes)
    limit = problems.attempt(_time_limit, request, facts)
    _check_request(request, problems)
    config = None if found is None else problems.attempt(absolute_paths, found, base)
    if config is None:
        return None, problems.lines
    folder = Path(config.runs_dir) / config.name
    runs = _elements(load, request.array, folder, base, problems) if request.array else [(folder, config)]
    for run_dir, run in runs:
        check_run(run_dir, run, problems)
    if facts is None or nodes is None:
        return None, problems.lines
    fitting = [problems.attempt(allowed_nodes, run, facts, request.nodes) for _, run in runs]
    if None not in fitting and len({tuple(numbers or ()) for numbers in fitting}) > 1:
        problems.add(
            f"--nodes {request.nodes}: the elements of the array "
            "fit different numbers of nodes; submit them apart"
        )
    if limit is None or not runs or fitting[0] is None:
        return None, problems.lines
    script = _script(folder, request, facts, limit, fitting[0])
    text = problems.attempt(render, script, facts)
    if text is None:
        return None, problems.lines
    problems.add(*overriding(text, os.environ))
    return Plan(folder, runs, text, str(script.log), request), problems.lines


def _script(folder: Path, request: Request, site: SiteConfig, limit: str, allowed: Sequence[int]) -> Script:
    """What the batch script is made from. folder: of the run, or of all runs of an array."""
    script = Script(
        name=folder.name,
        nodes=request.nodes.strip(),
        time=limit,
        run=folder / folder.name if request.array else folder,
        code=folder / "code",
        log=folder / (f"{folder.name}-%a/slurm-%A_%a.out" if request.array else "slurm-%j.out"),
        python=site.python or sys.executable,
        array=f"0-{len(request.array) - 1}" if request.array else None,
        allowed_nodes=allowed,
        max_restarts=request.max_restarts,
    )
    return script if request.command is None else replace(script, command=request.command)


def _check_request(request: Request, problems: Problems) -> None:
    if request.chain > 1 and request.array:
        problems.add(f"--chain {request.chain} does not combine with --array")
    if not 1 <= request.chain <= LONGEST_CHAIN:
        problems.add(f"--chain {request.chain} must be at least 1 and at most {LONGEST_CHAIN}")
    if request.dependency is not None:
        problems.attempt(check_dependency, request.dependency)


def absolute_paths(config: RunConfig, base: Path) -> RunConfig:
    """The configuration with every path made absolute, because a job does not run where it was
    submitted.

    parallel.processes, which is for local starts, is dropped.
    """

    def absolute(path: str | None) -> str | None:
        try:
            return None if path is None else str(base / Path(path).expanduser())
        except RuntimeError as error:  # ~nobody
            raise UserError(f"the path {path} cannot be completed: {error}") from None

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


def submit(planned: Plan) -> list[str]:
    """Writes snapshot, configurations and script, and hands the script to sbatch.

    Returns the job ids, more than one for a chain.
    What a run that has trained is stays as it is (config.yaml), until the job has taken a step.
    Raises UserError when a job is at one of the runs already, or Slurm refuses.
    Then state.json is as before.
    """
    queued = slurm_client.queue()
    for run_dir, _ in planned.runs:
        _refuse_if_active(run_dir, queued or {})
    planned.folder.mkdir(parents=True, exist_ok=True)
    copy_code(planned.folder / "code")
    atomic_write_text(planned.script_file, planned.script)
    before = {run_dir: _text(run_dir / states.STATE_FILE) for run_dir, _ in planned.runs}
    for run_dir, config in planned.runs:
        (run_dir / states.CONTROL).mkdir(parents=True, exist_ok=True)
        text = dump_config(config)
        atomic_write_text(run_dir / JOB_CONFIG, text)
        if not (run_dir / "metrics.jsonl").exists():
            atomic_write_text(run_dir / "config.yaml", text)
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
            # Whatever way a job of the chain ended, the next one finds it in state.json and leaves
            # at once where nothing is left to do.
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
    jobs = [*(states.read_submitted(run_dir).get("jobs") or []), state.get("job_id")]
    active = next((str(job) for job in jobs if job is not None and str(job) in queued), None)
    if active is not None:
        raise UserError(
            f"job {active} ({queued[active].state.lower()}) is at {run_dir} already: "
            f"scancel {active}, or choose another name"
        )
    # A local run. The lock of a Slurm job that has left the queue may be that of a lost node, which
    # stays for a long time.
    if state.get("job_id") is None and state.get("state") != states.QUEUED:
        check_free(run_dir)


def _elements(
    load: Load, lines: Sequence[str], folder: Path, base: Path, problems: Problems
) -> list[tuple[Path, RunConfig]]:
    """Run directory and configuration of the elements of an array that have no mistake."""
    elements = []
    for index, line in enumerate(lines):
        try:
            overrides = shlex.split(line)
        except ValueError as error:
            problems.add(
                f"--array, line {index + 1}: {printable(line)} has a quote that is not closed ({error})"
            )
            continue
        if any(word.partition("=")[0] in ("name", "runs_dir") for word in overrides):
            problems.add(
                f"--array, line {index + 1}: name and runs_dir of an element "
                f"are given by its place in the array; remove them from {line!r}"
            )
            continue
        found = Problems()
        config = found.attempt(load, [*overrides, f"runs_dir={folder}", f"name={folder.name}-{index}"])
        problems.add(*(f"--array, line {index + 1}: {problem}" for problem in found.lines))
        if config is not None:
            elements.append((folder / config.name, absolute_paths(config, base)))
    return elements


def _time_limit(request: Request, site: SiteConfig | None) -> str | None:
    limit = request.time or (site.time if site else None)
    if limit is None:
        if site is None:
            return None
        raise UserError("no time limit: give --time HH:MM:SS, or set `time` in the site file")
    said = f"--time {printable(limit)}" if request.time else f"time={limit} of the site file"
    seconds = parse_time(limit, said)
    if site is not None and seconds < site.signal_margin + CLOCK_SECONDS:
        raise UserError(
            f"{said} is {seconds} s: "
            f"the run is told to save {site.signal_margin} s before the end (signal_margin), so give "
            f"more than {site.signal_margin + CLOCK_SECONDS} s, or lower signal_margin in the site file"
        )
    return limit.strip()

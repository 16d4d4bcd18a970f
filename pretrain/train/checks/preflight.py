"""Before the first step: is every node fit for this run?

Exchanged through the processes' store, so that a sick GPU or network cannot hang the check.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from model.errors import UserError
from model.files import atomic_write_text
from parallel.launch.exit_codes import ExitCode
from parallel.launch.process_group import has_gpu
from parallel.launch.ranks import RankInfo
from pretrain.config.schema import RunConfig
from pretrain.rundir.environment import git, versions
from pretrain.rundir.state import CONTROL, PREFLIGHT_FILE, Owner, record_failure
from pretrain.train.checks.before_start import lack_of_room

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

COMPARED = ("torch", "deepspeed", "megatron-core", "transformer-engine")
MATRIX = 512
SHARED_SECONDS = 10.0
"""How long a network file system may take to show a new file."""
GPU, PATH, VERSION = "gpu", "path", "version"


class BadNodeError(RuntimeError):
    """At least one node is not fit for the run, others are; the text names it.

    here: whether it is the node of this process.
    """

    exit_code = ExitCode.BAD_NODE

    def __init__(self, text: str, here: bool) -> None:
        super().__init__(text)
        self.here = here


@dataclass(frozen=True)
class Facts:
    """One rank's findings."""

    rank: int
    host: str
    problems: list[list[str]]
    """(kind, text) each."""
    software: dict[str, str | None]
    """Versions, and on the first rank of a node the commit too."""
    gpu: str | None = None
    """Unique id of its GPU."""
    gpu_name: str | None = None
    free_bytes: int | None = None
    """Told by the first rank of each node."""


@dataclass
class Verdict:
    """What the findings of all ranks say."""

    hosts: list[str]
    """Node of each rank."""
    bad: dict[str, list[str]] = field(default_factory=dict)
    """What is wrong with which node."""
    mistake: str = ""
    """What is wrong on all of them."""
    notes: list[str] = field(default_factory=list)
    """What a run survives."""


def check_nodes(store: Store, info: RankInfo, config: RunConfig, problem: str = "") -> Verdict:
    """Every rank's part of the check; the same verdict everywhere.

    problem: what kept this rank from reading configuration and data, if anything.
    Raises UserError for what is wrong on all nodes, BadNodeError for what is wrong on some,
    RuntimeError naming the ranks that did not come.
    """
    run_dir = Path(config.runs_dir) / config.name
    facts = _facts(store, info, config, run_dir, problem)
    store.set(f"preflight/{info.rank}", json.dumps(asdict(facts)))
    if info.rank == 0:
        everyone = [
            _wait_for(store, rank, config.parallel.timeout_minutes) for rank in range(info.world_size)
        ]
        verdict = judge(everyone)
        with contextlib.suppress(OSError):  # told as a problem of this node
            atomic_write_text(
                run_dir / PREFLIGHT_FILE, json.dumps(_record(everyone, verdict), indent=1) + "\n"
            )
        store.set("preflight/verdict", json.dumps(asdict(verdict)))
    verdict = Verdict(**json.loads(store.get("preflight/verdict")))
    here = facts.host in verdict.bad
    # Said for a node by another one, as that one may be unable to write.
    healthy = next((rank for rank, host in enumerate(verdict.hosts) if host not in verdict.bad), 0)
    if info.rank == healthy:
        for host, texts in verdict.bad.items():
            record_failure(run_dir, verdict.hosts.index(host), ExitCode.BAD_NODE, "; ".join(texts), host=host)
    _leave_together(store, info)
    if info.rank == 0:
        for token in (run_dir / CONTROL).glob(f"{Owner.from_environment().label}.preflight.*"):
            token.unlink(missing_ok=True)
    if verdict.mistake:
        raise UserError(verdict.mistake)
    if verdict.bad:
        raise BadNodeError(
            "; ".join(f"{host}: {'; '.join(texts)}" for host, texts in sorted(verdict.bad.items())), here
        )
    return verdict


def share_problem(store: Store, info: RankInfo, problem: str) -> None:
    """In place of the check where it is turned off: every rank raises UserError when one of them
    cannot start.
    """
    store.set(f"preflight/{info.rank}", problem)
    if info.rank == 0:
        told = [store.get(f"preflight/{rank}").decode() for rank in range(info.world_size)]
        store.set("preflight/verdict", next((text for text in told if text), ""))
    verdict = store.get("preflight/verdict").decode()
    _leave_together(store, info)
    if verdict:
        raise UserError(verdict)


def _wait_for(store: Store, rank: int, minutes: float) -> Facts:
    """What a rank found. Its time counts from when all ranks before it were there."""
    try:
        return Facts(**json.loads(store.get(f"preflight/{rank}")))
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {rank} did not come within {minutes:g} minutes "
            "(parallel.timeout_minutes): see the log of its node"
        ) from error


def judge(everyone: Sequence[Facts]) -> Verdict:
    """What the facts of all ranks, in order of rank, say about the nodes."""
    verdict = Verdict([facts.host for facts in everyone])
    problems: dict[str, dict[str, str]] = defaultdict(dict)
    for facts in everyone:
        for kind, text in facts.problems:
            problems[facts.host].setdefault(kind, text)
    for host, owners in _shared_gpus(everyone).items():
        problems[host].setdefault(
            GPU,
            (
                f"ranks {' and '.join(map(str, owners))} have the same GPU: "
                "give each task its own (gpus_per_node of the site file)"
            ),
        )
    for host, text in _odd_software(everyone).items():
        problems[host].setdefault(VERSION, text)
    hosts = list(dict.fromkeys(verdict.hosts))
    paths = [problems[host][PATH] for host in hosts if PATH in problems[host]]
    if len(paths) == len(hosts):
        verdict.mistake = paths[0]
    else:
        verdict.bad = {host: list(texts.values()) for host, texts in problems.items() if texts}
    names = Counter(facts.gpu_name for facts in everyone)
    if len(names) > 1:
        verdict.notes.append(
            f"different GPUs: {', '.join(f'{number} x {name}' for name, number in names.items())}"
        )
    return verdict


def _shared_gpus(everyone: Sequence[Facts]) -> dict[str, list[int]]:
    owners: dict[tuple[str, str], list[int]] = defaultdict(list)
    for facts in everyone:
        if facts.gpu is not None:
            owners[facts.host, facts.gpu].append(facts.rank)
    return {host: ranks for (host, _), ranks in owners.items() if len(ranks) > 1}


def _odd_software(everyone: Sequence[Facts]) -> dict[str, str]:
    """Nodes whose versions differ from those of most nodes (of rank 0, where two are as common)."""
    odd: dict[str, str] = {}
    for name in dict.fromkeys(name for facts in everyone for name in facts.software):
        found = {facts.host: facts.software[name] for facts in reversed(everyone) if name in facts.software}
        numbers = Counter(found[host] for host in reversed(found))
        usual = max(numbers, key=lambda version: numbers[version])
        for host, version in found.items():
            if version != usual:
                odd.setdefault(
                    host, f"{name} is {version or 'missing'} here and {usual or 'missing'} on other nodes"
                )
    return odd


def _facts(store: Store, info: RankInfo, config: RunConfig, run_dir: Path, problem: str) -> Facts:
    problems = [[PATH, problem]] if problem else []
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    software: dict[str, str | None] = {"python": platform.python_version()}
    gpu, gpu_name, failed = _gpu(info)
    if failed:
        problems.append([GPU, failed])
    free = None
    if info.rank == 0:
        store.set("preflight/token", _token(run_dir))
    if info.local_rank == 0:
        code = git()
        software |= {name: version for name, version in versions().items() if name in COMPARED}
        software["the commit of Fathom"] = code["commit"] if code else None
        trouble, free = _run_directory(
            run_dir, store.get("preflight/token").decode(), config if not problem else None
        )
        if trouble:
            problems.append([PATH, trouble])
    return Facts(info.rank, host, problems, software, gpu, gpu_name, free)


def _token(run_dir: Path) -> str:
    """Name of a new file in the run directory, which other nodes must see; empty where it cannot be
    written.
    """
    name = f"{Owner.from_environment().label}.preflight.{os.getpid()}.{time.time_ns()}"
    try:
        (run_dir / CONTROL).mkdir(parents=True, exist_ok=True)
        (run_dir / CONTROL / name).write_text(name)
    except OSError:
        return ""
    return name


def _run_directory(run_dir: Path, token: str, config: RunConfig | None) -> tuple[str, int | None]:
    """What is wrong with the run directory on this node, and its free bytes."""
    folder = run_dir / CONTROL
    probe = folder / f".{socket.gethostname()}.{os.getpid()}.probe"
    try:
        lack, free = lack_of_room(config, run_dir) if config is not None else ("", None)
        if lack:
            return lack, free
        folder.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            file.write(b"fathom" * 1000)
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as error:
        return f"{run_dir} is not writable here: {error.strerror}", None
    end = time.monotonic() + SHARED_SECONDS
    while token and not (folder / token).exists():
        if time.monotonic() > end:
            same = "runs_dir must be on a file system that all nodes share"
            return f"{run_dir} is not the same folder as on the node of rank 0: {same}", free
        time.sleep(0.1)
    return "", free


def _gpu(info: RankInfo) -> tuple[str | None, str | None, str]:
    """Unique id and name of this rank's GPU, and what is wrong with it: a product whose result is
    known, in the formats that training uses.
    """
    if not has_gpu():
        wanted = os.environ.get("SLURM_GPUS_ON_NODE") or os.environ.get("SLURM_STEP_GPUS")
        return (
            None,
            None,
            f"the job has GPUs here ({wanted}), but CUDA does not work: see nvidia-smi on this node"
            if wanted not in (None, "", "0")
            else "",
        )
    import torch

    try:
        index = info.local_rank % torch.cuda.device_count()
        device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(index)
        wrong = _wrong_products(device)
        if wrong:
            return (
                str(properties.uuid),
                properties.name,
                f"GPU {index} ({properties.name}) computes wrong products in {wrong}: take the node out",
            )
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        return None, None, f"GPU {info.local_rank}: {' '.join(str(error).split())[:200]}"
    if free < 0.8 * total and "SLURM_JOB_ID" in os.environ:  # on a workstation that may be on purpose
        busy = f"GPU {index} has {free / 2**30:.0f} of {total / 2**30:.0f} GiB free: another process is on it"
        return str(properties.uuid), properties.name, busy
    return str(properties.uuid), properties.name, ""


def _wrong_products(device: torch.device) -> str:
    """The first format in which the device multiplies two matrices wrongly, or nothing."""
    import torch

    # Small whole numbers: exact in every format, as are their sums up to 2^8 in bf16 and 2^24 in
    # fp32.
    a = (torch.arange(MATRIX * MATRIX, device=device).reshape(MATRIX, MATRIX) % 2).float()
    expected = a.cpu().sum(1, keepdim=True).expand(MATRIX, MATRIX)
    for dtype in (torch.float32, torch.bfloat16):
        product = (a.to(dtype) @ torch.ones_like(a, dtype=dtype)).float()
        if not torch.equal(product.cpu(), expected):
            return str(dtype).removeprefix("torch.")
    return ""


def _leave_together(store: Store, info: RankInfo) -> None:
    """The store lives in rank 0, which must not end before all have read the verdict."""
    store.add("preflight/read", 1)
    end = time.monotonic() + 60
    while info.rank == 0 and store.add("preflight/read", 0) < info.world_size and time.monotonic() < end:
        time.sleep(0.02)


class NodeRecord(TypedDict):
    """What preflight.json says of a node."""

    ranks: list[int]
    gpus: list[str]
    software: dict[str, str | None]
    free_bytes: int | None
    problems: list[str]


def _record(everyone: Sequence[Facts], verdict: Verdict) -> dict[str, object]:
    nodes: dict[str, NodeRecord] = {}
    for facts in everyone:
        node = nodes.setdefault(
            facts.host,
            {
                "ranks": [],
                "gpus": [],
                "software": {},
                "free_bytes": None,
                "problems": verdict.bad.get(facts.host, []),
            },
        )
        node["ranks"].append(facts.rank)
        node["gpus"] += [facts.gpu_name] if facts.gpu_name else []
        node["software"] |= facts.software
        node["free_bytes"] = facts.free_bytes if facts.free_bytes is not None else node["free_bytes"]
    return {"time": time.time(), "mistake": verdict.mistake, "notes": verdict.notes, "nodes": nodes}

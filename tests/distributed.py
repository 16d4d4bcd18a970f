"""Groups of local gloo processes for tests.

A launcher is forked from a process that has loaded the libraries, and forks the ranks of each
group. So a group costs its own work and little more:

    first, second = launch(Group(2, worker, (1,)), Group(4, other))  # what each rank returned

Inside a rank `rebuild(...)` gives a new layout over the same processes,
so that many cases share one group.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import logging
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.config import ModelConfig
    from parallel.config import ParallelConfig
    from parallel.topology import Topology

from tests import forks
from tests.forks import ROOT

RANK_TIMEOUT_MINUTES = 2.0  # a rank that waits longer for the others gives up and says where
GRACE_SECONDS = 5.0
WRONG = 3  # exit code of a rank that found something wrong, not just that another one is gone


@dataclasses.dataclass(frozen=True)
class Group:
    """`function(*args)` on `world` processes.

    Arguments and results are pickled, so they hold no classes that a test file defines.
    """

    world: int
    function: Callable[..., Any]
    """A module-level function of this project."""
    args: tuple[Any, ...] = ()
    killed: bool = False
    """A rank may be ended by SIGKILL, and others by losing it; their results are None then.

    What is asserted still fails.
    """


def launch(*groups: Group, timeout: float = 1500.0) -> list[list[Any]]:
    """Runs groups one after another; returns for each what its ranks returned.

    timeout: seconds for everything;
    only a safety net, as ranks that wait for each other give up by themselves long before.
    Raises AssertionError with the traceback of the first rank that failed,
    or when the time is over.
    """
    with tempfile.TemporaryDirectory(prefix="fathom-ranks-") as folder:
        request = Path(folder) / "request"
        plain = [
            (group.world, _module(group.function), group.function.__qualname__, group.args, group.killed)
            for group in groups
        ]
        request.write_bytes(pickle.dumps(plain))
        said = Path(folder) / "said"
        # Temporary files of ranks go when this is over, also those of killed ones.
        env = {"TMPDIR": folder}
        process = forks.start(_serve, Path(folder), cwd=ROOT, out=said, err=said, env=env)
        code = forks.finish(process, timeout)
        output = said.read_text(errors="replace")
        assert code is not None, f"ranks did not finish in {timeout:.0f} s\n{output[-4000:]}"
        assert code == 0, f"the launcher ended with code {code}\n{output[-8000:]}"
        return [
            [
                pickle.loads(path.read_bytes())
                if (path := _result(Path(folder), index, rank)).exists()
                else None
                for rank in range(group.world)
            ]
            for index, group in enumerate(groups)
        ]


def _module(function: Callable[..., Any]) -> str:
    """Importable name of a function's module: pytest imports test files under their bare names."""
    path = Path(function.__code__.co_filename).resolve()
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def _result(folder: Path, group: int, rank: int) -> Path:
    return folder / f"result_{group}_{rank}"


def _serve(folder: Path) -> None:
    """The launcher: forks each group."""
    # On a CPU the model-parallel stream is the default stream.
    # Megatron-core remarks on that in every layer.
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    # What is imported and received stays: the collector need not walk it again in every rank.
    gc.freeze()
    requests = pickle.loads((folder / "request").read_bytes())
    for index, (world, module, name, args, killed) in enumerate(requests):
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
        if not run_group(folder, index, world, function, args, killed):
            sys.exit(1)


def run_group(
    folder: Path,
    index: int,
    world: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    killed: bool = False,
) -> bool:
    """Forks the ranks of one group, waits for them, and says whether all was well.

    What rank R returned is pickled in the file result_INDEX_R of the folder.
    """
    from parallel.launch.local import reserve_port

    holder = reserve_port()
    port = holder.getsockname()[1]
    ranks: dict[int, int] = {}
    for rank in range(world):
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            os._exit(_run_rank(folder, index, rank, world, port, function, args))
        ranks[pid] = rank
    failed_at: float | None = None
    good = True
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            rank = ranks.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            if code:
                failed_at = failed_at or time.monotonic()
                if not killed or code == WRONG:
                    good = False
                    print(f"rank {rank} of {world} ended with code {code}", flush=True)
            continue
        if failed_at is not None and time.monotonic() - failed_at > GRACE_SECONDS:
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    holder.close()
    return good


def _run_rank(
    folder: Path,
    index: int,
    rank: int,
    world: int,
    port: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> int:
    from parallel.launch.process_group import init_process_group, open_store
    from parallel.launch.ranks import RankInfo

    try:
        info = RankInfo(rank, world, rank, "127.0.0.1", port, local_world_size=world)
        store = open_store(info, RANK_TIMEOUT_MINUTES, secret=str(folder))
        init_process_group(info, RANK_TIMEOUT_MINUTES, store)
        answer = pickle.dumps(function(*args))
        path = _result(folder, index, rank)
        path.with_suffix(".part").write_bytes(answer)
        path.with_suffix(".part").replace(path)
        return 0
    except BaseException as error:
        traceback.print_exc()
        return WRONG if isinstance(error, (AssertionError, ValueError)) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def rebuild(parallel: ParallelConfig, model: ModelConfig) -> Topology:
    """Inside a rank: a new layout over the processes, after the previous one's groups are gone."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from parallel.topology import Topology, check_layout

    dist.barrier()  # a rank that is ahead would hang up on others' last messages
    # Megatron-core forgets its groups without closing them.
    # Their threads and connections would stay, and slow every later case.
    for group in parallel_state._global_process_group_list or ():
        if isinstance(group, dist.ProcessGroup):
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
    gc.collect()
    return Topology(check_layout(parallel, model, dist.get_world_size()))


def gather(value: Any) -> list[Any]:
    """Inside a rank: the values of all ranks, on all ranks."""
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def first_difference(ours: Sequence[Any], theirs: Sequence[Any]) -> int | None:
    """Index of the first unequal pair, None where all are equal."""
    return next((index for index, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)

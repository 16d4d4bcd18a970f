"""In place of `fathom pretrain` in tests of the cluster side: steps that take no time.

Signals, exit codes and files are the same.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parallel.launch.exit_codes import ExitCode
from parallel.launch.process_group import open_store
from parallel.launch.ranks import rank_from_environment
from parallel.launch.secret import run_secret
from parallel.launch.slurm import SlurmTask, expand_hosts, slurm_environment
from pretrain.rundir.metrics import MetricsWriter
from pretrain.rundir.state import (
    FINISHED,
    RUNNING,
    STOPPED,
    check_owner,
    claim,
    latest_step,
    record_failure,
    write_state,
)
from pretrain.train.stop_signals import StopRequest, task_exit_code


def joined(run_dir: Path) -> Any:
    """A function that adds a number over all ranks.

    Imports torch, which is most of the time these tests take.
    """
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    info = rank_from_environment(os.environ)
    assert info is not None
    store = open_store(info, 10, run_secret(run_dir / "control"))
    dist.init_process_group("gloo", store=store, rank=info.rank, world_size=info.world_size)

    def largest(value: int) -> int:
        both = torch.tensor([value, -1])
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        return int(both[0])

    return largest


def options_given() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--step-time", type=float, default=0.1)
    parser.add_argument("--save-every", type=int, default=1000)
    parser.add_argument(
        "--hold-at",
        type=int,
        help="in the first start, go no further than this step until asked to stop, or ended",
    )
    parser.add_argument("--collective", action="store_true")
    parser.add_argument("--fail-with", type=int, help="leave with this exit code at once")
    parser.add_argument(
        "--bad-node", help="leave as the check before the first step does when it runs on this node"
    )
    return parser.parse_args()


def ordered_failure(options: argparse.Namespace, info: SlurmTask) -> int | None:
    """The exit code of a failure on purpose, while the other ranks hang; None without one."""
    if options.fail_with is not None:
        if info.rank == info.world_size - 1:
            record_failure(options.run_dir, info.rank, options.fail_with, "a failure on purpose")
            return int(options.fail_with)
        time.sleep(600)
    if options.bad_node in expand_hosts(os.environ["SLURM_STEP_NODELIST"]):
        if info.local_rank == 0 and os.environ["SLURMD_NODENAME"] == options.bad_node:
            record_failure(options.run_dir, info.rank, ExitCode.BAD_NODE, "GPU 1 computes wrong products")
            return int(ExitCode.BAD_NODE)
        time.sleep(600)
    return None


def save(run_dir: Path, step: int) -> None:
    check_owner(run_dir)
    (run_dir / "checkpoints" / f"step_{step:08d}").mkdir(parents=True, exist_ok=True)
    (run_dir / "checkpoints" / f"step_{step:08d}" / "manifest.json").write_text("{}")
    (run_dir / "checkpoints" / "latest").write_text(f"step_{step:08d}\n")


def take_steps(
    options: argparse.Namespace, step: int, held: bool, writer: MetricsWriter | None, asked: Callable[[], int]
) -> tuple[int, int]:
    """Steps from `step` to the last one, or until asked to stop.

    Returns the step and the exit code.
    held: go no further than --hold-at.
    writer: None on every rank but 0.
    asked: the exit code that is asked for, 0 for none; collective.
    """
    code = 0
    while step < options.steps and not code:
        time.sleep(options.step_time)
        if held and step == options.hold_at:
            code = asked()
            continue
        step += 1
        if writer is not None:
            writer.write(
                "train",
                step,
                loss=10.0 / step,
                tokens=step * 1000,
                tokens_per_s=1000 / options.step_time,
                step_time_s=options.step_time,
            )
            if step % options.save_every == 0:
                save(options.run_dir, step)
        code = asked()
    return step, code


def main() -> int:
    options = options_given()
    run_dir: Path = options.run_dir
    info = slurm_environment(os.environ)
    assert info is not None
    failed = ordered_failure(options, info)
    if failed is not None:
        return failed
    stop = StopRequest(run_dir)
    stop.install()
    largest = joined(run_dir) if options.collective else lambda value: value
    step = latest_step(run_dir) or 0
    node = os.environ["SLURMD_NODENAME"]
    print(
        f"rank {info.rank}/{info.world_size} local {info.local_rank}/{info.local_world_size} "
        f"node {info.node_rank}/{info.num_nodes} ({node}) from step {step}"
    )
    writer = None
    if info.rank == 0:
        claim(run_dir, state=RUNNING, step=step)
        writer = MetricsWriter(run_dir / "metrics.jsonl")
        writer.write("start", step, world_size=info.world_size)
    # In an array, the second element is the one that is interrupted.
    first = step == info.restart_count == 0 and os.environ.get("SLURM_ARRAY_TASK_ID", "1") == "1"
    step, code = take_steps(options, step, first, writer, lambda: largest(stop.code()))
    if writer is not None:
        save(run_dir, step)
        reason = "" if not code else stop.reason()
        write_state(run_dir, state=STOPPED if code else FINISHED, reason=reason, step=step, exit_code=code)
        writer.write("end", step, reason=reason)
    largest(0)
    print(f"rank {info.rank} leaves after step {step} with {code} {stop.reason()}")
    return task_exit_code(ExitCode(code))


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.exit(main())

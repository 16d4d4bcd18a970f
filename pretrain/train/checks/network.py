"""Before the first step: does the network between the ranks work, and how fast is it?"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from model.files import atomic_write_text
from parallel.launch.process_group import has_gpu
from parallel.launch.ranks import RankInfo
from pretrain.rundir.state import PREFLIGHT_FILE
from pretrain.train.checks.preflight import Verdict

CLOCK_SECONDS = 5.0
"""By which a node's clock may be wrong without a note."""
ALL_REDUCE_BYTES = {True: 64 * 2**20, False: 2**20}
"""Of the network's trial, with and without GPUs."""


def check_network(info: RankInfo, run_dir: Path, verdict: Verdict) -> None:
    """A small all-reduce over all ranks: its result, its speed, and how far the nodes' clocks are
    apart.

    Collective. Rank 0 reports.

    Raises RuntimeError where the sum is wrong.
    """
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")
    world = info.world_size
    data = torch.ones(ALL_REDUCE_BYTES[device.type == "cuda"] // 4, device=device)
    dist.all_reduce(data)  # the first one connects
    clocks = torch.zeros(world, dtype=torch.float64, device=device)
    clocks[info.rank] = time.time()  # all ranks have just left the same collective
    if float(data.min()) != world or float(data.max()) != world:
        raise RuntimeError(
            f"an all-reduce of ones over {world} ranks gave {float(data.min())} "
            f"to {float(data.max())} on rank {info.rank}: network or GPU fault"
        )
    dist.all_reduce(clocks)
    data.fill_(1.0)
    dist.barrier()
    begin = time.perf_counter()
    dist.all_reduce(data)
    float(data[0])
    seconds = time.perf_counter() - begin
    if info.rank:
        return
    bandwidth = 2 * (world - 1) / world * data.numel() * 4 / seconds
    offsets = (clocks - clocks.median()).tolist()
    skewed = {
        verdict.hosts[rank]: offset for rank, offset in enumerate(offsets) if abs(offset) > CLOCK_SECONDS
    }
    verdict.notes += [
        f"the clock of {host} is {abs(offset):.0f} s {'ahead' if offset > 0 else 'behind'}"
        for host, offset in skewed.items()
    ]
    network = {
        "all_reduce_bytes": data.numel() * 4,
        "all_reduce_seconds": seconds,
        "bus_bytes_per_s": bandwidth,
        "clock_spread_s": max(offsets) - min(offsets),
    }
    _add_to_record(run_dir, {"network": network, "notes": verdict.notes})
    for line in _lines(run_dir, verdict, network):
        print(f"preflight: {line}", file=sys.stderr, flush=True)


def _add_to_record(run_dir: Path, fields: Mapping[str, object]) -> None:
    path = run_dir / PREFLIGHT_FILE
    with contextlib.suppress(OSError, ValueError):
        atomic_write_text(
            path, json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}, indent=1) + "\n"
        )


def _lines(run_dir: Path, verdict: Verdict, network: Mapping[str, float]) -> list[str]:
    hosts = list(dict.fromkeys(verdict.hosts))
    with contextlib.suppress(OSError, ValueError, KeyError):
        nodes = json.loads((run_dir / PREFLIGHT_FILE).read_text(encoding="utf-8"))["nodes"]
        gpus = Counter(name for node in nodes.values() for name in node["gpus"])
        what = ", ".join(f"{number} x {name}" for name, number in gpus.items()) or "no GPU"
        free = min(
            (node["free_bytes"] for node in nodes.values() if node["free_bytes"] is not None), default=0
        )
        software = ", ".join(
            f"{name} {version}"
            for name, version in nodes[hosts[0]]["software"].items()
            if version and name != "the commit of Fathom"
        )
        return [
            f"{len(verdict.hosts)} ranks on {len(hosts)} nodes, {what}; {software}: the same everywhere",
            f"{run_dir}: writable and shared, {free / 2**30:.0f} GiB free",
            (
                f"all-reduce of {network['all_reduce_bytes'] / 2**20:.0f} MiB: "
                f"{network['all_reduce_seconds'] * 1e3:.1f} ms, {network['bus_bytes_per_s'] / 1e9:.2f} GB/s; "
                f"clocks agree to {network['clock_spread_s']:.2f} s"
            ),
            *verdict.notes,
        ]
    return list(verdict.notes)

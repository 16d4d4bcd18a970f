"""Runs of one test: submitted to the cluster, followed, and asked what they left."""

from __future__ import annotations

import atexit
import functools
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pretrain.cluster.site_file import SiteConfig
from pretrain.cluster.submit import Request, log_path, plan, submit
from pretrain.config.load import load_config
from pretrain.rundir.metrics import read_metrics
from pretrain.rundir.state import read_state
from pretrain.rundir.state_file import State
from tests.pretrain.small import small_data
from tests.slurm.slurm_cluster import LAB, PATIENCE, Cluster

CONFIG = """
name: demo
runs_dir: {folder}/runs
model: {{num_layers: 4, hidden_size: 16, num_attention_heads: 2}}
data: {{corpora: [{{path: {data}}}], seq_length: 8}}
optimizer: {{lr: 0.001}}
train: {{steps: 20, global_batch_size: 8, micro_batch_size: 1}}
"""


TRAINING = """
name: demo
runs_dir: {folder}/runs
model: {{num_layers: 4, hidden_size: 16, num_attention_heads: 2}}
data: {{corpora: [{{path: {data}}}], seq_length: 16, cache: {folder}/cache}}
parallel: {{tensor: 2, pipeline: 2}}
optimizer: {{lr: 0.001}}
schedule: {{kind: constant}}
train: {{steps: 30, global_batch_size: 16, micro_batch_size: 1, eval_samples: 0}}
log: {{signal_interval: 0, progress: none, tensorboard: false}}
"""


@functools.cache
def unused_data() -> Path:
    """A data set for runs that only look at it before they are submitted."""
    folder = Path(tempfile.mkdtemp(prefix="fathom-slurm-data-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return small_data(folder)


class Runs:
    """Submits runs of one test and follows them.

    data: a prepared data set to train on for real; None: a stand-in takes the place of training.
    """

    def __init__(self, cluster: Cluster, folder: Path, data: Path | None = None) -> None:
        self.cluster, self.folder, self.data = cluster, folder, data
        self.config_file = folder / "demo.yaml"
        if data is None:
            self.config_file.write_text(CONFIG.format(folder=folder, data=unused_data()))
        else:
            self.config_file.write_text(TRAINING.format(folder=folder, data=data))
        self.run_dir = folder / "runs" / "demo"
        self.log = Path()

    def submit(
        self,
        *arguments: str,
        nodes: str = "2",
        site: dict[str, Any] | None = None,
        overrides: Sequence[str] = (),
        **request: Any,
    ) -> list[str]:
        common = {
            "gpus_per_node": 0,
            "tasks_per_node": 2,
            "time": "10",
            "signal_margin": 60,
            "environment": {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        }
        facts = SiteConfig.model_validate({**common, **(site or {})})
        command = (str(LAB / "standin.py"), "$RUN", *arguments) if self.data is None else None
        planned = plan(
            lambda more: load_config(self.config_file, [*overrides, *more]),
            facts,
            Request(nodes=nodes, command=command, **request),
        )
        jobs = submit(planned)
        self.log = log_path(planned, jobs[0])
        return jobs

    def says(self, pattern: str) -> None:
        self.cluster.wait_text(self.log, pattern)

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.log.read_text(), re.MULTILINE))

    def state(self, run_dir: Path | None = None) -> State:
        return read_state(run_dir or self.run_dir)

    def steps(self) -> list[int]:
        """Steps in the order they were trained."""
        lines = [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]
        return [line["step"] for line in lines if line["event"] == "train"]

    def history(self) -> list[int]:
        """Steps of the final history, in order.

        Of a step that was done twice the last line counts.
        """
        return [event.step for event in read_metrics(self.run_dir / "metrics.jsonl").train]

    def losses(self) -> list[float]:
        """Their losses."""
        return [event.loss for event in read_metrics(self.run_dir / "metrics.jsonl").train]

    def rank_process(self, rank: int) -> int:
        """Process id of one rank of the start that runs now, once there is one."""
        return int(wait_for(lambda: next((pid for pid, found in self._ranks() if found == rank), None)))

    def _ranks(self) -> list[tuple[int, int]]:
        """(process id, rank) of the tasks that belong to this run."""
        found = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal():
                continue
            try:
                words, variables = (
                    (folder / name).read_bytes().decode(errors="replace").split("\0")
                    for name in ("cmdline", "environ")
                )
            except OSError:
                continue
            ranks = [text.partition("=")[2] for text in variables if text.startswith("SLURM_PROCID=")]
            if ranks and "python" in Path(words[0]).name and any(str(self.run_dir) in word for word in words):
                found.append((int(folder.name), int(ranks[0])))
        return found


def wait_for(found: Callable[[], Any], timeout: float = PATIENCE) -> Any:
    """Polls until a function returns something."""
    end = time.monotonic() + timeout
    while not (answer := found()):
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout:.0f} s in vain")
        time.sleep(0.1)
    return answer

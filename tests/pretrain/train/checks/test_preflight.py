"""Which node is bad, what is everybody's mistake, and what a healthy process finds about itself."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from model.config import ModelConfig
from model.errors import UserError
from parallel.launch.exit_codes import ExitCode
from parallel.launch.ranks import ALONE, RankInfo
from pretrain.config.schema import Corpus, DataConfig, OptimizerConfig, RunConfig, TrainConfig
from pretrain.rundir.state import Owner, read_failures
from pretrain.train.checks import preflight
from pretrain.train.checks.preflight import GPU, PATH, BadNodeError, Facts, check_nodes, judge

SOFTWARE = {"python": "3.11.7", "torch": "2.13.0"}


def facts(
    rank: int, problems: list[list[str]] | None = None, gpu: str | None = None, **software: str | None
) -> Facts:
    """Two ranks a node; the first of a node tells versions."""
    return Facts(
        rank,
        f"node{rank // 2 + 1}",
        problems or [],
        {**SOFTWARE, **software} if rank % 2 == 0 else {"python": "3.11.7"},
        gpu,
    )


def test_all_is_well() -> None:
    verdict = judge([facts(rank, gpu=f"uuid{rank}") for rank in range(6)])
    assert (verdict.bad, verdict.mistake, verdict.hosts) == (
        {},
        "",
        ["node1", "node1", "node2", "node2", "node3", "node3"],
    )


def test_one_node_lacks_something() -> None:
    everyone = [facts(rank, [[PATH, "data: not here"]] if rank in (2, 3) else []) for rank in range(6)]
    verdict = judge(everyone)
    assert (verdict.bad, verdict.mistake) == ({"node2": ["data: not here"]}, "")


def test_what_all_nodes_lack_is_a_mistake() -> None:
    verdict = judge([facts(rank, [[PATH, "data: not here"]]) for rank in range(4)])
    assert (verdict.bad, verdict.mistake) == ({}, "data: not here")


def test_gpus() -> None:
    shared = judge([facts(0, gpu="a"), facts(1, gpu="b"), facts(2, gpu="c"), facts(3, gpu="c")])
    assert list(shared.bad) == ["node2"]
    assert shared.bad["node2"][0].startswith("ranks 2 and 3 have the same GPU")
    # The same GPU number on another node is another GPU.
    # Sick GPUs everywhere are no mistake in the configuration.
    sick = judge([facts(rank, [[GPU, "computes wrong products"]]) for rank in range(2)])
    assert (sick.bad, sick.mistake) == ({"node1": ["computes wrong products"]}, "")


@pytest.mark.parametrize(
    ("versions", "bad"),
    [
        (("2.13.0", "2.13.0", "2.12.0"), "node3"),
        (("2.12.0", "2.13.0", "2.13.0"), "node1"),
        (("2.13.0", None, "2.13.0"), "node2"),
    ],
)
def test_versions(versions: tuple[str | None, ...], bad: str) -> None:
    verdict = judge([facts(rank, torch=versions[rank // 2]) for rank in range(6)])
    odd = next(version for version in versions if versions.count(version) == 1)
    assert verdict.bad == {bad: [f"torch is {odd or 'missing'} here and 2.13.0 on other nodes"]}


def test_two_versions_as_common_as_each_other() -> None:
    """Rank 0 counts as right."""
    assert list(judge([facts(rank, torch=f"2.{rank // 2}") for rank in range(4)]).bad) == ["node2"]


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(
        name="demo",
        runs_dir=str(tmp_path),
        model=ModelConfig(
            num_layers=2, hidden_size=16, num_attention_heads=2, vocab_size=128, max_position_embeddings=8
        ),
        data=DataConfig(corpora=[Corpus(path="data")], seq_length=8),
        optimizer=OptimizerConfig(lr=1e-3),
        train=TrainConfig(steps=1, global_batch_size=1, micro_batch_size=1),
    )


def test_this_machine(config: RunConfig) -> None:
    verdict = check_nodes(dist.HashStore(), ALONE, config)
    (node,) = json.loads((Path(config.runs_dir) / "demo" / "preflight.json").read_text())["nodes"].values()
    assert (verdict.notes, node["ranks"], node["problems"]) == ([], [0], [])
    assert set(node["software"]) == {
        "python",
        "torch",
        "deepspeed",
        "megatron-core",
        "transformer-engine",
        "the commit of Fathom",
    }
    assert node["free_bytes"] > 0
    assert not list((Path(config.runs_dir) / "demo" / "control").iterdir())


def test_no_room_for_a_checkpoint(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(
        UserError,
        match="demo has 0.0 GiB free, one checkpoint takes about 0.0 GiB: make room, or set runs_dir",
    ):
        check_nodes(dist.HashStore(), ALONE, config)


def test_run_directory_that_cannot_be_made(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("a file")
    with pytest.raises(UserError, match=r"demo is not writable here: Not a directory"):
        check_nodes(dist.HashStore(), ALONE, config)


def test_folder_that_is_not_shared(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "SHARED_SECONDS", 0.0)
    trouble, _ = preflight._run_directory(tmp_path / "demo", "a file of rank 0", config)
    assert "is not the same folder as on the node of rank 0" in trouble


@pytest.mark.parametrize("faulty", ["", "float32", "bfloat16"])
def test_products_are_checked_in_every_format(monkeypatch: pytest.MonkeyPatch, faulty: str) -> None:
    right = torch.Tensor.__matmul__

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        result = right(a, b)
        if str(a.dtype) == f"torch.{faulty}":
            result[100, 200] -= 1
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    assert preflight._wrong_products(torch.device("cpu")) == faulty


def out_of_order() -> None:
    raise RuntimeError(
        "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be asynchronously reported"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"wrong": "bfloat16"}, "GPU 3 (H200) computes wrong products in bfloat16: take the node out"),
        ({"free": 20}, "GPU 3 has 20 of 140 GiB free: another process is on it"),
        (
            {"count": out_of_order},
            "GPU 3: CUDA error: uncorrectable ECC error encountered "
            "CUDA kernel errors might be asynchronously reported",
        ),
    ],
)
def test_what_is_said_of_a_gpu(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str) -> None:
    """torch.cuda's answers stand in for a GPU: four on a node, this rank's is the last."""
    monkeypatch.setattr(preflight, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", changes.get("count", lambda: 4))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"uuid{index}", name="H200")
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (changes.get("free", 139) << 30, 140 << 30))
    monkeypatch.setattr(preflight, "_wrong_products", lambda device: changes.get("wrong", ""))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    uuid, name, problem = preflight._gpu(RankInfo(11, 16, 3, "localhost", 1))
    assert problem == said
    assert (uuid, name) == ((None, None) if "count" in changes else ("uuid3", "H200"))
    monkeypatch.delenv("SLURM_JOB_ID")
    if "free" in changes:  # on a workstation another process may be meant to be there
        assert preflight._gpu(RankInfo(11, 16, 3, "localhost", 1)) == ("uuid3", "H200", "")


def test_a_job_with_gpus_where_cuda_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "has_gpu", lambda: False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    assert (
        preflight._gpu(ALONE)[2]
        == "the job has GPUs here (8), but CUDA does not work: see nvidia-smi on this node"
    )


def test_the_bad_node_leaves_word(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks in one process: the first one's node has a sick GPU."""
    store: Any = dist.HashStore()
    monkeypatch.setattr(preflight, "_gpu", lambda info: (None, None, "GPU 0 computes wrong products"))
    with pytest.raises(BadNodeError, match="GPU 0 computes wrong products") as raised:
        check_nodes(store, ALONE, config)
    assert raised.value.here
    (failure,) = read_failures(Path(config.runs_dir) / "demo", Owner.from_environment())
    assert (failure.exit_code, failure.reason) == (ExitCode.BAD_NODE, "GPU 0 computes wrong products")

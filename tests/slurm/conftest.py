from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.slurm.slurm_cluster import Cluster, UnavailableError


def _start(mode: str, nodes: int) -> Cluster:
    try:
        return Cluster(mode, nodes)
    except UnavailableError as reason:
        # Set in CI, where a missing Slurm must not become a silent skip.
        # Namespaces are up to the container that CI runs in.
        if os.environ.get("REQUIRE_SLURM") and mode == "flat":
            pytest.fail(f"REQUIRE_SLURM is set, but: {reason}")
        pytest.skip(f"no Slurm cluster can be started here: {reason}")


@pytest.fixture(scope="session")
def flat_cluster() -> Iterator[Cluster]:
    cluster = _start("flat", 3)
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def netns_cluster() -> Iterator[Cluster]:
    cluster = _start("netns", 3)
    yield cluster
    cluster.close()


def _reachable(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The client commands that the code under test calls reach this cluster, and no other."""
    for key in [key for key in os.environ if key.startswith(("SLURM", "SBATCH", "SRUN", "SQUEUE"))]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PATH", f"{cluster.commands}{os.pathsep}{os.environ['PATH']}")
    return cluster


@pytest.fixture
def cluster(flat_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Three nodes on one address; their names do not resolve."""
    yield _reachable(flat_cluster, monkeypatch)
    flat_cluster.reset()


@pytest.fixture
def separate_cluster(netns_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Three nodes, each with its own network, host name and address."""
    yield _reachable(netns_cluster, monkeypatch)
    netns_cluster.reset()

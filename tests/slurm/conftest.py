from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from slurm_cluster import Cluster, UnavailableError


def _start(mode: str, nodes: int) -> Cluster:
    try:
        return Cluster(mode, nodes)
    except UnavailableError as reason:
        if os.environ.get("REQUIRE_SLURM"):  # set in CI, where a missing Slurm must not become a silent skip
            pytest.fail(f"REQUIRE_SLURM is set, but: {reason}")
        pytest.skip(f"no Slurm cluster can be started here: {reason}")


@pytest.fixture(scope="session")
def flat_cluster() -> Iterator[Cluster]:
    cluster = _start("flat", 3)
    yield cluster
    cluster.close()


@pytest.fixture
def cluster(flat_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Three nodes; the client commands that the code under test calls reach this cluster."""
    for key in [key for key in os.environ if key.startswith(("SLURM", "SBATCH", "SRUN", "SQUEUE"))]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("SLURM_CONF", str(flat_cluster.conf))
    yield flat_cluster
    flat_cluster.reset()

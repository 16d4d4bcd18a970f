"""Ranks from the environment that some launcher left."""

from __future__ import annotations

import pytest

from model.errors import UserError
from parallel.launch.ranks import RankInfo, rank_from_environment
from tests.parallel.launch.test_slurm import STEP

COMPLETE = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "1234"}


def test_rank_of_torchrun() -> None:
    assert rank_from_environment({**COMPLETE, "LOCAL_WORLD_SIZE": "2"}) == RankInfo(
        3, 4, 1, "node7", 1234, local_world_size=2
    )


def test_rank_of_srun() -> None:
    info = rank_from_environment({**STEP, "FATHOM_MASTER_ADDR": "node1"})
    assert info is not None
    assert (info.rank, info.world_size, info.local_rank, info.local_world_size, info.derived) == (
        3,
        4,
        1,
        2,
        True,
    )


@pytest.mark.parametrize("env", [{"PATH": "/bin"}, {**STEP, "SLURM_NTASKS": "1"}])
def test_no_launcher_means_none(env: dict[str, str]) -> None:
    assert rank_from_environment(env) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "MASTER_ADDR, MASTER_PORT is not"),
        ({"MASTER_PORT": ""}, "WORLD_SIZE is set but MASTER_PORT is not"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT='x' must be a whole number from 1 to 65535"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT='70000' must be"),
        ({"MASTER_PORT": "\u0661\u0662"}, "MASTER_PORT='\u0661\u0662' must be"),
        ({"RANK": "4"}, "RANK='4' must be a whole number from 0 to 3"),
        ({"RANK": "-1"}, "RANK='-1' must be"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' must be"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE='9999.*' must be"),
        ({"LOCAL_RANK": "1.0"}, "LOCAL_RANK='1.0' must be"),
        ({"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE='5' must be"),
    ],
)
def test_an_environment_that_is_half_set_or_no_number_is_refused(
    changes: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        rank_from_environment({**COMPLETE, **changes})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("key", ["SLURM_STEP_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_NODEID"])
def test_slurm_variables_that_are_no_numbers(key: str) -> None:
    with pytest.raises(UserError, match=f"{key}='x' must be a whole number"):
        rank_from_environment({**STEP, "FATHOM_MASTER_ADDR": "node1", key: "x"})

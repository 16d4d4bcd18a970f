"""What a user says to Slurm: refused here before Slurm is asked."""

from __future__ import annotations

import re

import pytest

from model.errors import UserError
from model.words import printable
from pretrain.cluster.slurm_words import (
    OURS_OF_SBATCH,
    OURS_OF_SRUN,
    check_dependency,
    one_option,
    parse_nodes,
    parse_time,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("30:15", 1815),
        ("1:30:15", 5415),
        ("24:00:00", 86400),
        ("2-0", 172800),
        ("1-02:30", 95400),
        ("1-02:30:05", 95405),
    ],
)
def test_times(text: str, seconds: int) -> None:
    assert parse_time(text, f"--time {text}") == seconds


@pytest.mark.parametrize(
    "text",
    [
        "tomorrow",
        "",
        "0",
        "0:00",
        "-5",
        "1:2:3:4",
        "０１:00:00",
        "99:99:99",
        "1:60",
        "1-24",
        "1-0:60",
        "400-0",
        "9" * 400,
        "1e3",
        "30\n-1",
    ],
)
def test_times_that_are_none(text: str) -> None:
    said = f"--time {printable(text)}"
    with pytest.raises(
        UserError, match=rf"^{re.escape(said)} is .*[:;] give minutes, HH:MM:SS or D-HH:MM:SS"
    ) as refusal:
        parse_time(text, said)
    assert len(str(refusal.value)) < 400
    assert str(refusal.value).isprintable()


def test_numbers_of_nodes() -> None:
    assert [parse_nodes(text) for text in ("4", "2-4", "65536")] == [(4, 4), (2, 4), (65536, 65536)]
    for text in ("0", "4-2", "two", "", "１", "1-", "9" * 20):
        with pytest.raises(UserError, match="must be a number of nodes"):
            parse_nodes(text)
    with pytest.raises(UserError, match="more than Slurm manages"):
        parse_nodes("1-1000000")


@pytest.mark.parametrize(
    "text",
    [
        "afterok:12",
        "afterany:12:13",
        "after:12+5",
        "afterok:12_3,afterany:4_*",
        "afterok:1?afternotok:2",
        "singleton",
    ],
)
def test_dependencies(text: str) -> None:
    check_dependency(text)


@pytest.mark.parametrize(
    "text",
    [
        "$(id)",
        "12",
        "",
        "afterok",
        "afterok:",
        "afterok:１",
        "afterok:1,",
        "afterok:1,singleton?after:2",
        "afterok:1 --hold",
        "after ok:1",
    ],
)
def test_dependencies_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match=r"--dependency .* is none: give TYPE:JOB"):
        check_dependency(text)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("--constraint=a100", "--constraint=a100"),
        ("--overcommit", "--overcommit"),
        ("--comment='two words'", "--comment=two words"),
        ("--mem-per-cpu=4G", "--mem-per-cpu=4G"),
        ("--exclude=node[1-3]", "--exclude=node[1-3]"),
    ],
)
def test_options(text: str, word: str) -> None:
    assert one_option(text, OURS_OF_SBATCH) == word


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--time=3", "set by the batch script itself: use"),
        ("--jo=x", r"set by the batch script itself \(--job-name\)"),
        ("--tasks-per-node=3", "set by the batch script itself"),
        ("--test-only", "set by the batch script itself"),
        ("--wa", r"\(--wait\)"),
        ("--comment=a --job-name=evil", "more than one word"),
        ("--constraint a100", "more than one word"),
        ("--x # c", "more than one word"),
        ("--x='unclosed", "quote that is not closed"),
        ("-J x", "must be a long option"),
        ("label", "must be a long option"),
        ("--", "must be a long option"),
        ("", "must be a long option"),
        ("--$(id)", "must be a long option"),
    ],
)
def test_options_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one_option(text, OURS_OF_SBATCH)


def test_srun_has_names_of_its_own() -> None:
    assert one_option("--mpi=pmix", OURS_OF_SRUN) == "--mpi=pmix"
    for option in ("--export=NONE", "--pty", "--kill-on-bad-exit=0"):
        with pytest.raises(ValueError, match="set by the batch script itself"):
            one_option(option, OURS_OF_SRUN)

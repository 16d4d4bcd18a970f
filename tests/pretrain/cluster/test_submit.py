"""Submission up to the point where sbatch takes over; the rest runs in tests/slurm."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from model.errors import UserError
from pretrain.cluster.code_copy import ROOT, copy_code
from pretrain.cluster.site_file import SiteConfig, load_site, parse_time
from pretrain.cluster.submit import Request, allowed_nodes, log_path, parse_nodes, plan, submit
from pretrain.config.load import load_config
from pretrain.config.schema import RunConfig
from pretrain.rundir.lock import owned
from pretrain.rundir.state import Owner, claim, read_state
from tools.cli import main

GOLDEN = Path(__file__).parent / "golden"
EXAMPLE = ROOT / "slurm" / "site.example.yaml"
CONFIG = """
name: demo
model: {num_layers: 4, hidden_size: 16, num_attention_heads: 2, vocab_size: 128}
data: {corpora: [{path: data}], seq_length: 8}
optimizer: {lr: 0.001}
train: {steps: 20, global_batch_size: 32, micro_batch_size: 1}
parallel: {processes: 2}
"""
SITE = SiteConfig(gpus_per_node=4, time="1:00:00", python="/venv/bin/python")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a configuration and something that looks like a data set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FATHOM_SITE", raising=False)
    (tmp_path / "demo.yaml").write_text(CONFIG)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset.json").write_text("{}")
    return tmp_path


def loading(*overrides: str) -> Callable[[Sequence[str]], RunConfig]:
    return lambda more: load_config("demo.yaml", [*overrides, *more])


@pytest.mark.parametrize("name", ["plain", "full", "array", "container"])
def test_scripts_are_as_they_were(folder: Path, name: str) -> None:
    """The whole text of four scripts. After a change on purpose: read the difference as the admin of a cluster would, then copy the new text."""
    sites = {
        "plain": SITE,
        "full": load_site(EXAMPLE).model_copy(update={"python": "/venv/bin/python"}),
        "array": SITE.model_copy(update={"gpu_request": "gres", "gpu_type": "a100"}),
        "container": SiteConfig.model_validate(
            {**SITE.model_dump(), "container": {"image": "my images/fathom.sqsh", "mounts": ["/data:/data"]}}
        ),
    }
    requests = {
        "plain": Request("2"),
        "full": Request("2-4", time="2-00:00:00", max_restarts=5),
        "array": Request("1", array=["optimizer.lr=0.1", "optimizer.lr=0.2"]),
        "container": Request("2"),
    }
    script = plan(loading(), sites[name], requests[name]).script.replace(str(folder), "/base")
    assert script == (GOLDEN / f"{name}.sbatch").read_text()
    check = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert check.returncode == 0, check.stderr


def test_plan_writes_nothing_and_makes_paths_absolute(folder: Path) -> None:
    planned = plan(loading(), SITE, Request("2"))
    assert not (folder / "runs").exists()
    ((run_dir, config),) = planned.runs
    assert run_dir == folder / "runs" / "demo"
    assert (config.runs_dir, config.data.corpora[0].path, config.parallel.processes) == (
        str(folder / "runs"),
        str(folder / "data"),
        None,
    )
    assert log_path(planned, "12") == run_dir / "slurm-12.out"


def test_array_elements(folder: Path) -> None:
    planned = plan(loading(), SITE, Request("1", array=["optimizer.lr=0.1", "optimizer.lr=0.2 train.seed=3"]))
    assert [str(run_dir.relative_to(folder)) for run_dir, _ in planned.runs] == [
        "runs/demo/demo-0",
        "runs/demo/demo-1",
    ]
    assert [(config.optimizer.lr, config.train.seed) for _, config in planned.runs] == [(0.1, 1234), (0.2, 3)]
    assert log_path(planned, "12", 1) == folder / "runs/demo/demo-1/slurm-12_1.out"


def without_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PATH with git and nothing else."""
    git = subprocess.run(
        ["bash", "-c", "command -v git"], capture_output=True, text=True, check=True
    ).stdout.strip()
    (folder / "bin").mkdir()
    (folder / "bin" / "git").symlink_to(git)
    monkeypatch.setenv("PATH", str(folder / "bin"))


def test_numbers_of_nodes(folder: Path) -> None:
    config = load_config("demo.yaml")
    assert allowed_nodes(config, SITE, "1-8") == [1, 2, 4, 8]  # 32 samples
    with pytest.raises(
        UserError,
        match=r"--nodes 3 \(12 processes\): train\.global_batch_size=32 is not divisible by .* = 1 x 12 = 12: .*=36.*; 4 nodes",
    ):
        allowed_nodes(config, SITE, "3")
    with pytest.raises(UserError, match=r"--nodes 1 \(4 processes\): parallel: tensor x pipeline x context"):
        allowed_nodes(
            load_config("demo.yaml", ["parallel.pipeline=3", "parallel.pipeline_split=[1,1,2]"]), SITE, "1"
        )
    assert [parse_nodes(text) for text in ("4", "2-4")] == [(4, 4), (2, 4)]
    for text in ("0", "4-2", "two", ""):
        with pytest.raises(UserError, match="must be a number of nodes"):
            parse_nodes(text)


@pytest.mark.parametrize(
    ("site", "request_", "message"),
    [
        ({"time": None}, Request("1"), "no time limit: give --time"),
        ({}, Request("1", time="5"), "--time 5 is 300 s: the run is told to save 300 s before the end"),
        ({}, Request("1", time="tomorrow"), "time='tomorrow' is no time limit"),
        ({}, Request("1", chain=2, array=["a=1"]), "--chain 2 does not combine with --array"),
        ({}, Request("1", chain=0), "--chain 0 must be at least 1"),
        (
            {},
            Request("1", array=["name=x"]),
            r"--array, line 1: name and runs_dir .* remove them from 'name=x'",
        ),
        (
            {},
            Request("1-2", array=["train.global_batch_size=32", "train.global_batch_size=4"]),
            "elements of the array fit different numbers of nodes",
        ),
    ],
)
def test_requests_that_cannot_work(
    folder: Path, site: dict[str, object], request_: Request, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan(loading(), SITE.model_copy(update=site), request_)


@pytest.mark.parametrize(
    ("job", "state", "refusal"),
    [
        (None, "running", "in use by process"),
        ("7", "running", "sbatch is not"),
        (None, "queued", "sbatch is not"),
    ],
)
def test_a_run_that_a_local_process_trains_is_left_to_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, job: str | None, state: str, refusal: str
) -> None:
    """The lock of a job that Slurm no longer has may be that of a lost node."""
    planned = plan(loading(), SITE, Request("1"))
    without_slurm(folder, monkeypatch)
    with owned(folder / "runs" / "demo", 0):
        claim(folder / "runs" / "demo", Owner(job, 0), state=state)
        with pytest.raises(UserError, match=refusal):
            submit(planned)
    assert (folder / "runs" / "demo" / "config.yaml").exists() is ("sbatch" in refusal)


def test_missing_data_is_noticed_before_the_queue(folder: Path) -> None:
    planned = plan(loading("data.corpora=[{path: nowhere}]"), SITE, Request("1"))
    with pytest.raises(UserError, match=r"data\.corpora: .*/nowhere holds no dataset\.json"):
        submit(planned)
    assert not planned.folder.exists()


def test_paths_that_slurm_would_change(folder: Path) -> None:
    with pytest.raises(UserError, match="has a character that Slurm reads in a way of its own"):
        plan(loading("runs_dir=100%"), SITE, Request("1"))
    assert '--output="' in plan(loading("runs_dir=my runs"), SITE, Request("1")).script


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
    assert parse_time(text) == seconds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpus_per_node: 8\npartitoin: x", r"partitoin='x': .*known: partition, account"),
        ("partition: gpu", "gpus_per_node: Field required"),
        ("gpus_per_node: 0", "tasks_per_node is needed with gpus_per_node=0"),
        ("{gpus_per_node: 8, tasks_per_node: 4}", "there is one task for each GPU; remove tasks_per_node"),
        ("gpus_per_node: 8\nsbatch: [--time=3]", r"sbatch: '--time=3' is set by the batch script itself"),
        ("gpus_per_node: 8\nsrun: [label]", r"srun: 'label' must be a long option"),
        ("gpus_per_node: 8\npartition: a b", "partition='a b'"),
        ("gpus_per_node: 8\ntime: 0", "is no time limit: Slurm would take it as unlimited"),
        ("gpus_per_node: 8\nenvironment: {A-B: x}", "'A-B' is no name of an environment variable"),
        ("gpus_per_node: 8\nenvironment: {A: true}", r"environment\.A=True"),
        ("- 1", "must be a mapping"),
        ("a: [", "is no YAML"),
    ],
)
def test_site_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_site(tmp_path / "site.yaml")


def test_site_file_is_read_as_it_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No number forms of YAML 1.1: 24:00:00 would be 86400 (minutes, to Slurm), 0x10 and 010 other numbers."""
    (tmp_path / "site.yaml").write_text(
        "{gpus_per_node: 8, time: 24:00:00, memory: 0, exclusive: true, environment: {A: 1, B: 010, C: on, D: 1.50}}"
    )
    monkeypatch.setenv("FATHOM_SITE", str(tmp_path / "site.yaml"))
    site = load_site(None)
    assert (site.time, site.memory, site.exclusive, site.environment) == (
        "24:00:00",
        "0",
        True,
        {"A": "1", "B": "010", "C": "on", "D": "1.50"},
    )


def test_no_site_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FATHOM_SITE", raising=False)
    with pytest.raises(
        UserError, match=r"no site file: give --site FILE or set FATHOM_SITE; slurm/site\.example\.yaml"
    ):
        load_site(None)
    with pytest.raises(UserError, match="nowhere: No such file"):
        load_site(tmp_path / "nowhere")


def test_snapshot_is_the_working_tree(tmp_path: Path) -> None:
    """Tracked files as they are now, new files of the packages, nothing that git ignores, nothing else; a second copy replaces the first."""
    source, target = tmp_path / "checkout", tmp_path / "run" / "code"
    (source / "model").mkdir(parents=True)
    for name, text in {
        "model/a.py": "1",
        "model/gone.py": "1",
        "notes.txt": "1",
        ".gitignore": "*.log\n",
    }.items():
        (source / name).write_text(text)
    git = ["git", "-C", str(source), "-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
    (source / "model" / "a.py").write_text("2")
    (source / "model" / "new.py").write_text("3")
    (source / "model" / "x.log").write_text("4")
    (source / "model" / "gone.py").unlink()
    for _ in range(2):
        snapshot = copy_code(target, source)
    (source / "model" / "a.py").write_text("5")
    assert {str(path.relative_to(target)): path.read_text() for path in target.rglob("*.py")} == {
        "model/a.py": "2",
        "model/new.py": "3",
    }
    assert sorted(path.name for path in target.parent.iterdir()) == ["code"]
    record = json.loads((target / "SNAPSHOT.json").read_text())
    assert (record["changed"], record["files"], len(record["commit"])) == (
        ["model/a.py", "model/gone.py", "model/new.py"],
        2,
        40,
    )
    assert snapshot.commit == record["commit"]


def test_snapshot_outside_of_git(tmp_path: Path) -> None:
    source = tmp_path / "installed"
    (source / "model" / "__pycache__").mkdir(parents=True)
    (source / "model" / "a.py").write_text("1")
    (source / "model" / "__pycache__" / "a.pyc").write_text("x")
    assert copy_code(tmp_path / "code", source).commit is None
    assert [str(path.relative_to(tmp_path / "code")) for path in (tmp_path / "code").rglob("*.*")] == [
        "SNAPSHOT.json",
        "model/a.py",
    ]


def test_no_slurm_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, and the run directory does not say that anything is queued."""
    planned = plan(loading(), SITE, Request("2"))
    without_slurm(folder, monkeypatch)
    with pytest.raises(UserError, match="sbatch is not installed on this machine: submit from a login node"):
        submit(planned)
    assert read_state(folder / "runs" / "demo").get("state") in (None, "failed")


def test_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "lines.txt").write_text("# two runs\noptimizer.lr=0.1\n\noptimizer.lr=0.2\n")
    with pytest.raises(SystemExit) as left:
        main(
            [
                "submit",
                "demo.yaml",
                "train.steps=7",
                "--nodes",
                "1",
                "--site",
                str(EXAMPLE),
                "--array",
                "lines.txt",
                "--array",
                "optimizer.lr=0.3",
                "--dry-run",
                "--json",
            ]
        )
    assert left.value.code == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["jobs"], len(answer["runs"])) == ([], 3)
    assert "#SBATCH --array=0-2\n" in answer["script"]
    assert not (folder / "runs").exists()
    for arguments, message in (
        (["data.corpora=[{path: nowhere}]"], "fathom: error: data.corpora:"),
        (["--nodes", "x"], "fathom: error: --nodes x must be a number of nodes"),
        (["--array", "missing.txt"], "fathom: error: --array missing.txt: no such file"),
        (["--json", "--follow"], "fathom: error: --json does not combine with --follow"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["submit", "demo.yaml", "--site", str(EXAMPLE), "--dry-run", *arguments])
        assert left.value.code == 2
        assert message in capsys.readouterr().err

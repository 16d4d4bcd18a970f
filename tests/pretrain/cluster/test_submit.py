"""Submission up to the point where sbatch takes over; the rest runs in tests/slurm."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from model.errors import UserError
from pretrain.cluster.code_copy import ROOT, copy_code
from pretrain.cluster.site_file import SiteConfig, load_site
from pretrain.cluster.submit import Request, log_path, plan, review, submit
from pretrain.cluster.submit_checks import allowed_nodes
from pretrain.config.load import load_config
from pretrain.config.schema import RunConfig
from pretrain.rundir.lock import owned
from pretrain.rundir.state import Owner, claim, read_state
from pretrain.train.callbacks.description import describe
from pretrain.train.callbacks.metrics_log import MetricsFile
from pretrain.train.run import prepared_config
from tests.pretrain.small import small_data, small_trainer
from tools.cli import main

GOLDEN = Path(__file__).parent / "golden"
EXAMPLE = ROOT / "slurm" / "site.example.yaml"
CONFIG = """
name: demo
model: {num_layers: 4, hidden_size: 16, num_attention_heads: 2}
data: {corpora: [{path: data}], seq_length: 8}
optimizer: {lr: 0.001}
train: {steps: 20, global_batch_size: 32, micro_batch_size: 1}
parallel: {processes: 2}
"""
SITE = SiteConfig(gpus_per_node=4, time="1:00:00", python="/venv/bin/python")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def folder(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a configuration and a data set."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("FATHOM_", "SBATCH_", "SLURM_")):
            monkeypatch.delenv(name)
    (tmp_path / "demo.yaml").write_text(CONFIG)
    (tmp_path / "data").symlink_to(data)
    return tmp_path


def loading(*overrides: str) -> Callable[[Sequence[str]], RunConfig]:
    return lambda more: load_config("demo.yaml", [*overrides, *more])


@pytest.mark.parametrize("name", ["plain", "full", "array", "container"])
def test_scripts_are_as_they_were(folder: Path, name: str) -> None:
    """The whole text of four scripts.

    After a change on purpose, read the difference as the admin of a cluster would.
    Then copy the new text.
    """
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
        match=r"--nodes 3 \(12 processes\): train\.global_batch_size=32 is not divisible by "
        r".* = 1 x 12 = 12: .*=36.*; 4 nodes",
    ):
        allowed_nodes(config, SITE, "3")
    with pytest.raises(UserError, match=r"--nodes 1 \(4 processes\): parallel: tensor x pipeline x context"):
        allowed_nodes(
            load_config("demo.yaml", ["parallel.pipeline=3", "parallel.pipeline_split=[1,1,2]"]), SITE, "1"
        )
    with pytest.raises(UserError, match="more than Slurm manages"):
        allowed_nodes(config, SITE, "1-1000000")
    assert allowed_nodes(config, SITE, "1-65536") == [1, 2, 4, 8]
    with pytest.raises(UserError, match=r"--nodes 60000 \(240000 processes\)"):
        allowed_nodes(config, SITE, "60000")


@pytest.mark.parametrize(
    ("site", "request_", "message"),
    [
        ({"time": None}, Request("1"), "no time limit: give --time"),
        ({"time": "5"}, Request("1"), "time=5 of the site file is 300 s: the run is told"),
        ({}, Request("1", time="5"), "--time 5 is 300 s: the run is told to save 300 s before the end"),
        ({}, Request("1", time="tomorrow"), "--time tomorrow is no time limit"),
        ({}, Request("1", chain=2, array=["a=1"]), "--chain 2 does not combine with --array"),
        ({}, Request("1", chain=0), "--chain 0 must be at least 1"),
        ({}, Request("1", chain=10**30), "must be at least 1 and at most 1000"),
        (
            {},
            Request("1", array=["optimizer.lr='1"]),
            r"--array, line 1: optimizer\.lr='1 has a quote that is not closed",
        ),
        (
            {},
            Request("1", array=["optimizer.lr=1", "optimizer.l=1"]),
            r"--array, line 2: optimizer\.l is not a known key",
        ),
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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.corpora=[{path: nowhere}]"], r"data\.corpora: .*/nowhere holds no dataset\.json"),
        (["data.corpora=[{path: broken}]"], r"broken.dataset\.json is damaged"),
        (["model.vocab_size=128"], r"model\.vocab_size=128 differs from the tokenizer's 300"),
        (["checkpoint.load=/nonexistent"], r"checkpoint\.load: /nonexistent holds no checkpoint"),
        (["checkpoint.load=cut"], r"checkpoint\.load: .*/manifest\.json is damaged"),
    ],
)
def test_what_is_missing_is_noticed_before_the_queue(
    folder: Path, overrides: list[str], message: str
) -> None:
    for name, text in {
        "broken/dataset.json": "{",
        "cut/checkpoints/step_00000004/manifest.json": "{",
    }.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
    with pytest.raises(UserError, match=message):
        plan(loading(*overrides), SITE, Request("1"))
    assert not (folder / "runs").exists()


@pytest.fixture
def trained(folder: Path) -> Path:
    """The run `demo`, stopped after 2 steps of 20."""
    config = prepared_config("demo.yaml", ["train.stop_at_step=2", "parallel.processes=1"])
    trainer = small_trainer(config)
    describe(config, trainer.run_dir)
    trainer.callbacks.append(MetricsFile(1))
    trainer.run()
    return folder / "runs" / "demo"


def test_a_run_with_checkpoints_needs_no_other_to_begin_from(trained: Path) -> None:
    assert plan(loading("checkpoint.load=/nonexistent"), SITE, Request("1"))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "model.num_layers=6",
            r"step_00000002 was trained with model\.num_layers=4, the configuration has 6",
        ),
        ("train.seed=7", r"step_00000002 was trained with train\.seed=1234, the configuration has 7"),
        ("train.steps=1", r"train\.steps=1: the run has done 2 steps"),
    ],
)
def test_a_run_that_could_not_go_on_is_refused_before_the_queue(
    trained: Path, override: str, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        plan(loading(override), SITE, Request("1"))


def test_a_run_is_described_as_it_trained_until_its_job_takes_a_step(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (trained / "config.yaml").read_text()
    without_slurm(trained.parent.parent, monkeypatch)
    planned = plan(loading("optimizer.lr=0.002"), SITE, Request("1"))
    with pytest.raises(UserError, match="sbatch is not installed"):
        submit(planned)
    assert (trained / "config.yaml").read_text() == before
    assert 'pretrain "$RUN/submitted.yaml"' in (trained / "train.sbatch").read_text()
    assert load_config(trained / "submitted.yaml").optimizer.lr == 0.002


def test_variables_that_win_over_the_script(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch lets its variables win over the lines of the script, and would say nothing."""
    monkeypatch.setenv("SBATCH_PARTITION", "debug")  # the site file names none
    monkeypatch.setenv("SBATCH_TIMELIMIT", "5")
    monkeypatch.setenv("SBATCH_WAIT", "1")
    _, problems = review(loading(), lambda: SITE, Request("1"))
    assert problems == [
        (
            "SBATCH_TIMELIMIT in your environment would win over `#SBATCH --time` of the script: "
            "unset SBATCH_TIMELIMIT"
        ),
        "SBATCH_WAIT in your environment would keep sbatch until the job has ended: unset SBATCH_WAIT",
    ]


@pytest.mark.parametrize("setup", ["if true", "cat <<END"])
def test_setup_that_is_no_shell(folder: Path, setup: str) -> None:
    with pytest.raises(
        UserError, match=r"with its `setup` lines the batch script is no valid shell \(line \d+: "
    ):
        plan(loading(), SITE.model_copy(update={"setup": [setup]}), Request("1"))


def test_options_of_the_site_stay_what_they_are(folder: Path) -> None:
    """A value with blanks is one word for Slurm and for the shell; nothing in it is run."""
    site = SiteConfig.model_validate(
        {**SITE.model_dump(), "sbatch": ["--comment='a --time=1'"], "srun": ["--cpu-bind='$(id);x # y'"]}
    )
    script = plan(loading(), site, Request("1")).script
    assert '\n#SBATCH "--comment=a --time=1"\n' in script
    assert "\n  '--cpu-bind=$(id);x # y' \\\n" in script


def test_a_dry_run_names_every_mistake(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(
            [
                *(
                    "submit",
                    "demo.yaml",
                    "--dry-run",
                    "--nodes",
                    "three",
                    "--time",
                    "soon",
                    "--dependency",
                    "12",
                    "--chain",
                    "0",
                ),
                *("data.corpora=[{path: nowhere}]", "checkpoint.load=/nonexistent"),
            ]
        )
    assert left.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    said = [
        "no site",
        "--nodes three",
        "--time soon is",
        "--chain 0",
        "--dependency 12",
        "data.corpora: /",
        "checkpoint.load: /",
    ]
    assert [line.startswith(f"fathom: error: {words}") for line, words in zip(lines, said, strict=True)] == [
        True
    ] * 7
    with pytest.raises(SystemExit):
        main(
            [
                "submit",
                "demo.yaml",
                "--dry-run",
                "--nodes",
                "1",
                "--site",
                str(EXAMPLE),
                "train.setps=4",
                "optimizer.lr=fast",
                "--json",
            ]
        )
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert [problem.split(" ")[0] for problem in problems] == ["train.setps", "optimizer.lr='fast'"]
    with pytest.raises(SystemExit):
        main(["submit", "demo.yaml", "--nodes", "3", "--site", str(EXAMPLE), "checkpoint.load=/nonexistent"])
    assert capsys.readouterr().err.endswith("(and 1 more problem: --dry-run names them all)\n")


@pytest.mark.parametrize("name", ["100%", "a\t--uid=0", "a\rb", "a\x1b[2J", "a\u00a0b"])
def test_paths_that_slurm_would_change(folder: Path, name: str) -> None:
    def load(more: Sequence[str]) -> RunConfig:
        return load_config("demo.yaml", more).model_copy(update={"runs_dir": name})

    with pytest.raises(UserError, match="has a character that Slurm reads in a way of its own") as refusal:
        plan(load, SITE, Request("1"))
    assert str(refusal.value).isprintable()


def test_paths_that_are_quoted(folder: Path) -> None:
    assert '--output="' in plan(loading("runs_dir=my runs"), SITE, Request("1")).script
    with pytest.raises(UserError, match=r"the path ~nobody-here/x cannot be completed"):
        plan(loading("runs_dir=~nobody-here/x"), SITE, Request("1"))


def test_snapshot_is_the_working_tree(tmp_path: Path) -> None:
    """Tracked files as they are now, and new files of the packages.

    Nothing that git ignores, and nothing else. A second copy replaces the first.
    """
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

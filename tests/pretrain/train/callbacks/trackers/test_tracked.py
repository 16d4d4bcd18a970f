from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pretrain.train.callbacks.trackers.tracked as tracked_module
from parallel.launch.exit_codes import ExitCode
from pretrain.config.sections.log import LogConfig
from pretrain.train.callbacks.metrics_log import LOGGERS
from pretrain.train.callbacks.trackers.process import CLIENTS
from pretrain.train.callbacks.trackers.tracked import Tracked, flat
from tests.pretrain.small import small_config, step_record

SECRET = "k" * 17 + "0123456789abcdef" + "z" * 7


def run(folder: Path, step: int = 0, **log: Any) -> SimpleNamespace:
    """What a callback sees of a run."""
    config = small_config(folder / "data", folder / "runs", 10)
    config.log = LogConfig(wandb=True, offline=True, **log)
    told: list[tuple[object, ...]] = []
    run_dir = folder / "runs" / config.name
    return SimpleNamespace(
        config=config, run_dir=run_dir, step=step, told=told, tell=lambda *what: told.append(what)
    )


def steps(tracker: Tracked, trainer: Any, *numbers: int) -> None:
    for trainer.step in numbers:
        tracker.on_signal(trainer, {"residual_rms_last": 1.5}, [])
        tracker.on_step(trainer, step_record() | {"loss": float(trainer.step)})  # type: ignore[arg-type]


def tracker_of(name: str = "wandb") -> Tracked:
    tracker = LOGGERS[name]()
    assert isinstance(tracker, Tracked)
    return tracker


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of the name of Weights & Biases, to be filled; processes find it first."""
    package = tmp_path / "library" / "wandb"
    package.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(package.parent))
    yield package / "__init__.py"
    sys.modules.pop("wandb", None)


def test_every_tracker_is_in_all_tables() -> None:
    trackers = {name: logger for name, logger in LOGGERS.items() if issubclass(logger, Tracked)}
    assert {logger.name for logger in trackers.values()} == set(trackers) == set(CLIENTS)


GOOD = """
import json, os
class Settings:
    def __init__(self, **given): pass
class Run:
    def __init__(self, given): self.id, self.file = given["id"] or "abc123", open(os.environ["SEEN"], "a")
    def define_metric(self, *given, **named): pass
    def log(self, values): print("chatter"); self.file.write(json.dumps(values) + "\\n")
    def finish(self, exit_code): self.file.write(json.dumps({"end": exit_code}) + "\\n"); self.file.close()
def init(**given):
    open(os.environ["SEEN"], "a").write(json.dumps({k: given[k] for k in ("id", "name", "mode")}) + "\\n")
    return Run(given)
"""


def test_numbers_arrive_in_order_and_a_restart_continues(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.write_text(GOOD)
    monkeypatch.setattr(tracked_module, "CLOSE_S", 1000)  # however busy the machine is
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    for start, code in ((0, ExitCode.STOPPED), (2, ExitCode.FINISHED)):
        trainer, tracker = run(tmp_path, start), tracker_of()
        tracker.on_start(trainer)
        steps(tracker, trainer, start + 1, start + 2)
        tracker.on_eval(trainer, {"split": "validation", "loss": 0.5})  # type: ignore[typeddict-item]
        tracker.on_end(trainer, code, "")
        assert trainer.told == []
    seen = [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()]
    assert [line["id"] for line in seen if "id" in line] == [None, "abc123"]
    assert [line["loss/train"] for line in seen if "loss/train" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in seen if "loss/validation" in line] == [2, 4]
    assert [line["end"] for line in seen if "end" in line] == [1, 0]
    assert seen[1]["signal/residual_rms_last"] == 1.5
    assert "chatter" in (trainer.run_dir / "trackers/wandb.log").read_text()


BROKEN = {
    "import": ("raise RuntimeError('first\\nsecond')", "first second"),
    "start": ("Settings = dict\ndef init(**given): raise OSError('server is down')", "server is down"),
    "death": ("import os\nos._exit(9)", "its process ended"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_one_that_fails_costs_one_warning(tmp_path: Path, library: Path, case: str) -> None:
    code, words = BROKEN[case]
    library.write_text(code)
    trainer, tracker = run(tmp_path), tracker_of()
    tracker.on_start(trainer)
    tracker._process.wait()
    tracker._listener.join()
    steps(tracker, trainer, *range(1, 30))
    tracker.on_end(trainer, ExitCode.FINISHED, "")
    ((moment, text),) = trainer.told
    assert moment == "on_warning"
    assert text.startswith(f"log.wandb: {words}")
    assert "\n" not in text


def test_one_that_is_not_installed_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(CLIENTS["comet"], "module", "no_such_module")
    from io import StringIO

    from pretrain.train.callbacks.trackers.process import serve

    told = StringIO()
    serve("comet", StringIO(""), told)
    assert told.getvalue() == "problem it is not installed: pip install comet_ml\n"


def test_one_that_hangs_neither_stops_nor_slows_a_run(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It would be waited for without end. What finds no place is left out."""
    library.write_text("import time\ntime.sleep(10**6)")
    monkeypatch.setattr(tracked_module, "WAITING", 20)
    monkeypatch.setattr(tracked_module, "CLOSE_S", 0.1)
    trainer, tracker = run(tmp_path), tracker_of()
    tracker.on_start(trainer)
    steps(tracker, trainer, *range(1, 1500))
    assert ["it is 20 steps behind" in text for _, text in trainer.told] == [True]
    tracker.on_end(trainer, ExitCode.FINISHED, "")
    assert tracker._process.poll() is not None


def test_a_configuration_is_one_level_of_plain_values() -> None:
    assert flat({"a": {"b": 1, "c": {"d": [1, "x"]}}, "e": None}) == {
        "a.b": 1,
        "a.c.d": '[1, "x"]',
        "e": None,
    }


@pytest.mark.parametrize("field", ["project", "offline"])
def test_settings_of_trackers_without_one_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"log.{field} has no effect"):
        LogConfig(**{field: "mine" if field == "project" else True})


@pytest.mark.slow
@pytest.mark.parametrize("name", CLIENTS)
def test_the_real_library_continues_its_entry(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(CLIENTS[name].module, reason=f"{CLIENTS[name].package} is not installed")
    for variable in ("WANDB_API_KEY", "COMET_API_KEY", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.setenv(variable, SECRET)
    monkeypatch.setattr(tracked_module, "CLOSE_S", 1000)
    known = []
    for start in (0, 2):
        trainer, tracker = run(tmp_path, start), tracker_of(name)
        tracker.on_start(trainer)
        steps(tracker, trainer, start + 1, start + 2)
        tracker.on_end(trainer, ExitCode.FINISHED, "")
        assert tracker._problem is None
        known.append(json.loads((trainer.run_dir / f"trackers/{name}.json").read_text())["id"])
    assert known[0] == known[1]
    folder = trainer.run_dir / "trackers"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not any(SECRET.encode() in path.read_bytes() for path in files)
    assert KEPT[name](folder / name, known[0])


def mlflow_kept(folder: Path, entry: str) -> bool:
    from mlflow.tracking import MlflowClient

    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    client = MlflowClient(tracking_uri=folder.as_uri())
    found = client.get_metric_history(entry, "loss/train")
    run = client.get_run(entry)
    assert (run.info.status, run.data.params["train.steps"]) == ("FINISHED", "10")
    return [(metric.step, metric.value) for metric in found] == [(step, step) for step in (1, 2, 3, 4)]


def aim_kept(folder: Path, entry: str) -> bool:
    import aim
    from aim.storage.context import Context

    # Not read-only: that sees only what `aim up` has put into its index.
    run = aim.Run(run_hash=entry, repo=str(folder), system_tracking_interval=None)
    kept = run.get_metric("loss/train", Context({})).dataframe()
    config = run["config", "train.steps"]
    run.close()
    return config == 10 and list(kept["step"]) == list(kept["value"]) == [1, 2, 3, 4]


KEPT = {
    "wandb": lambda folder, entry: len(list(folder.glob(f"wandb/offline-run-*-{entry}/*.wandb"))) == 2,
    "mlflow": mlflow_kept,
    "comet": lambda folder, entry: len(list(folder.glob(f"{entry}*.zip"))) == 2,
    "aim": aim_kept,
}

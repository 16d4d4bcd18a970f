"""Sound results of Fathom, made once, copied and damaged by each case.

Data, a run, an export, a site file.
They lie in one folder and name each other by relative paths.
So a copy depends on nothing outside of it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from parallel.checkpoint.folders import MANIFEST
from parallel.checkpoint.format import file_facts, manifest_text
from tests.pretrain.small import small_data
from tests.running import Outcome, run

CONFIG = """\
name: tiny
model: {scheme: pre_ln, num_layers: 2, hidden_size: 16, num_attention_heads: 2}
data: {corpora: [{path: data}], seq_length: 16}
optimizer: {lr: 1.0e-3}
train: {steps: 4, global_batch_size: 2, micro_batch_size: 1, eval_samples: 2}
checkpoint: {interval: 2}
log: {signal_interval: 2, progress: none, tensorboard: false}
"""
SITE = """\
partition: gpu
gpus_per_node: 2
time: 01:00:00
modules: [cuda/12.8]
environment: {NCCL_DEBUG: WARN}
"""
RUN, STEP = "runs/tiny", "runs/tiny/checkpoints/step_00000004"


@dataclass(frozen=True)
class Command:
    """A command that reads artefacts."""

    arguments: tuple[str, ...]
    reads: tuple[str, ...]
    """What it reads, as globs."""
    writes: tuple[str, ...] = ()
    """What it may change, as the beginnings of paths."""
    share: int = 4
    """How often it is tried, against others."""
    words: bool = field(default=False)
    """Whether it prints text of a model, which may hold anything."""


CHECKPOINT = (f"{RUN}/checkpoints", f"{RUN}/checkpoints/latest", STEP, f"{STEP}/*")
DATA = ("data", "data/*")
STATE = (RUN, f"{RUN}/*.json", f"{RUN}/*.jsonl", f"{RUN}/config.yaml", f"{RUN}/control", f"{RUN}/.lock")
RUNNING = ("runs", "index_cache")
COMMANDS = (
    Command(("config", "c.yaml"), (*DATA, "c.yaml"), share=3),
    Command(("plan", "c.yaml"), (*DATA, "c.yaml"), share=1),
    Command(("data", "inspect", "data"), DATA, share=6),
    Command(("data", "inspect", "data", "--split", "validation", "--json"), DATA, share=2),
    Command(
        ("pretrain", "c.yaml", "name=new", "train.steps=1"),
        (*DATA, "index_cache/*", "c.yaml"),
        RUNNING,
        share=6,
    ),
    Command(("pretrain", "c.yaml", "train.steps=5"), (*CHECKPOINT, *STATE, *DATA), RUNNING, share=8),
    Command(
        ("pretrain", "c.yaml", "name=new", "train.steps=1", f"checkpoint.load={RUN}"), CHECKPOINT, RUNNING
    ),
    Command(("eval", RUN, "--samples", "2"), (*CHECKPOINT, *DATA), ("index_cache",)),
    Command(("eval", RUN, "--text", "texts/0.txt"), CHECKPOINT, share=2),
    Command(("generate", RUN, "--max-new-tokens", "4"), CHECKPOINT, words=True),
    Command(
        ("export", RUN, "new_hf"), (*CHECKPOINT, f"{RUN}/environment.json", f"{RUN}/metrics.jsonl"), share=2
    ),
    Command(("import", "hf", "new_import"), ("hf", "hf/*", "hf/*.json", "hf/*.json"), share=10),
    Command(("probe", "c.yaml", "--checkpoint", RUN, "--quiet"), (*CHECKPOINT, *DATA), share=2),
    Command(("status", "runs"), (*CHECKPOINT, *STATE), share=8),
    Command(("status", "runs", "--json"), (*CHECKPOINT, *STATE), share=3),
    Command(("report", RUN), (*STATE, *CHECKPOINT), (f"{RUN}/report.html",), share=6),
    Command(("checkpoint", "ls", RUN), CHECKPOINT),
    Command(("checkpoint", "inspect", RUN, "--names"), CHECKPOINT),
    Command(("checkpoint", "verify", RUN), CHECKPOINT),
    Command(("checkpoint", "prune", RUN, "--keep-last", "1", "--dry-run"), CHECKPOINT, share=2),
    Command(
        ("submit", "c.yaml", "--site", "site.yaml", "--dry-run", "train.steps=6"),
        ("site.yaml", "site.yaml", "data/*", "c.yaml"),
    ),
)
"""Commands and what each may be confused by."""


def make(folder: Path) -> Path:
    """Makes everything in a folder, through the commands that users have."""
    small_data(folder)
    (folder / "c.yaml").write_text(CONFIG)
    (folder / "site.yaml").write_text(SITE)
    for arguments in (
        ("pretrain", "c.yaml"),
        ("export", RUN, "hf"),
        ("report", RUN),
        *(command.arguments for command in COMMANDS if "new" not in str(command.arguments)),
    ):
        done = run(*arguments, cwd=folder)
        assert done.code == 0, (arguments, done.wrong or done.err)
    # The last of the commands above went on with the run.
    shutil.rmtree(folder / "runs")
    assert run("pretrain", "c.yaml", cwd=folder).code == 0
    return folder


def files(folder: Path, command: Command) -> list[Path]:
    """What a command reads in a folder."""
    found = {
        path: None
        for pattern in command.reads
        for path in sorted(folder.glob(pattern))
        if path.name != "report.html"
    }
    return [path for path in found if path.is_file() or path in [folder / plain for plain in command.reads]]


def seal_again(path: Path) -> bool:
    """Makes a checkpoint's manifest agree with a damaged file of it, as an attacker would.

    Returns whether it could.
    """
    try:
        manifest = json.loads((path.parent / MANIFEST).read_text())
        manifest["files"][path.name] = file_facts(path).model_dump()
        manifest.pop("checksum", None)
        (path.parent / MANIFEST).write_text(manifest_text(manifest))
    except Exception:
        return False
    return True


def leftovers(
    before: dict[str, tuple[int, int, int]],
    after: dict[str, tuple[int, int, int]],
    command: Command,
    done: Outcome,
) -> str:
    """What a command has changed although it should not have, or nothing."""
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    allowed = command.writes if done.code == 0 or command.arguments[0] == "pretrain" else ()
    made = [name for name in command.arguments if name.startswith("new_")] if done.code == 0 else []
    foreign = [name for name in changed if not name.startswith((*allowed, *made))]
    return f"it has changed {', '.join(foreign[:5])}" if foreign else ""


def walk(text: str) -> Iterator[str]:
    """Characters of an output that a terminal would obey."""
    return (character for character in text if not character.isprintable() and character not in "\n\t")

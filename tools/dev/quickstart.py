"""`make quickstart`: from nothing to a trained, resumed, exported deep model, each step a command
you could type yourself.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

import typer
from rich.console import Console
from rich.rule import Rule

from model.errors import UserError
from tools.dev import run as command
from tools.dev.quickstarts import FATHOM, QUICKSTARTS, SCHEME, QuickStart

STOPPED = 76
OTHER = "b2t"
"""The scheme to try after the default one."""
console = Console(highlight=False)


def main(
    family: str = typer.Option("gpt", help=f"Family of the model: {', '.join(QUICKSTARTS)}."),
    scheme: str = typer.Option(SCHEME, help="Depth scheme to train with; `fathom config` names them all."),
    fresh: bool = typer.Option(False, help="Remove this quick start's data and run first."),
) -> None:
    """Prepare data, pretrain a deep model on it, stop, resume, export, check, report."""
    chosen, recipe = choice(family, scheme)
    run = chosen.name if scheme == SCHEME else f"{chosen.name}_{scheme}"
    folder = Path("runs") / run
    if fresh:
        for path in (chosen.data, folder):
            shutil.rmtree(path, ignore_errors=True)
    begin = time.monotonic(), processor_seconds()
    title = Titles(6 + len(chosen.trials))
    title("Data")
    chosen.data.parent.mkdir(parents=True, exist_ok=True)
    for each in chosen.makings(chosen.name):
        step(
            each.made.is_file(),
            f"{each.made}",
            [*each.arguments],
            [*each.files],
            each.files_are,
            module=each.module,
        )
    train = ["pretrain", chosen.config, f"+include={recipe}", *chosen.overrides, f"name={run}"]
    done = newest_step(folder)
    half = half_way(train[1:])
    title("Pretraining, first half: the run is told to stop at the middle")
    step(
        done >= half,
        f"checkpoint of step {done}",
        [*train, f"train.stop_at_step={half}"],
        allowed=(0, STOPPED),
    )
    title("Pretraining, second half: the same command continues")
    step(newest_step(folder) >= 2 * half, "the finished run", train)
    title("Export to Hugging Face format")
    step(False, "", ["export", str(folder), str(folder / "hf"), "--overwrite"])
    title(f"Check in a new process: {chosen.auto_class} and AutoTokenizer")
    shell([sys.executable, "-m", "tools.dev.check_export", str(folder)])
    for trial in chosen.trials:
        title(trial.title)
        step(False, "", [part.format(folder=folder) for part in trial.arguments], module=trial.module)
    title("Report")
    step(False, "", ["report", str(folder)])
    other = next(name for name in (OTHER, SCHEME) if name != scheme)
    closing(chosen, folder, other, time.monotonic() - begin[0], processor_seconds() - begin[1])


def choice(family: str, scheme: str) -> tuple[QuickStart, str]:
    """The quick start of a family, and the recipe of a scheme.

    Raises UserError for unknown ones.
    """
    if family not in QUICKSTARTS:
        raise UserError(f"FAMILY={family} has no quick start; choose one of {', '.join(QUICKSTARTS)}")
    recipes = {path.stem: str(path) for path in sorted(Path("configs/recipe").glob("*.yaml"))}
    if scheme not in recipes:
        raise UserError(f"SCHEME={scheme} is unknown; choose one of {', '.join(recipes)}")
    return QUICKSTARTS[family], recipes[scheme]


class Titles:
    """Ruled headings, counted."""

    def __init__(self, most: int) -> None:
        self.most, self.number = most, 0

    def __call__(self, text: str) -> None:
        """Prints the next one."""
        self.number += 1
        console.print()
        console.print(Rule(f"[bold]{self.number}/{self.most}  {text}", align="left", style="dim"))


def step(
    done: bool,
    what: str,
    arguments: list[str],
    long: list[str] | None = None,
    note: str = "",
    allowed: tuple[int, ...] = (0,),
    module: str = FATHOM,
) -> None:
    """Shows and runs `fathom ARGUMENTS...`, unless its result is there.

    long: arguments shown as `note`. module: another program than `fathom`.
    Leaves with the command's code on failure.
    """
    shown = " ".join(["fathom" if module == FATHOM else f"python -m {module}", *arguments])
    if long:
        shown = shown.replace(" ".join(long), note)
    if done:
        console.print(f"[dim]$ {shown}[/dim]\nalready there: {what}", markup=True, soft_wrap=True)
        return
    console.print(f"[bold]$ {shown}[/bold]", soft_wrap=True)  # commands stay whole, to be copied
    shell([sys.executable, "-m", module, *arguments], allowed)


def shell(command: list[str], allowed: tuple[int, ...] = (0,)) -> None:
    """Runs a command on this terminal and says what it took.

    A code that is not allowed ends the quick start with it, and so does Ctrl-C, which the command
    gets too: it has the time it needs to save.
    """
    begin, stopped = (time.monotonic(), processor_seconds()), False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True

    before = signal.signal(signal.SIGINT, remember)
    try:
        code = subprocess.run(command, check=False, env=dict(os.environ, PYTHONWARNINGS="ignore")).returncode
    finally:
        signal.signal(signal.SIGINT, before)
    took = f"took {time.monotonic() - begin[0]:.0f} s, {processor_seconds() - begin[1]:.0f} s of processors"
    console.print(f"[dim]{took}[/dim]")
    if stopped or code not in allowed:
        console.print(
            f"[red]the command above {'was stopped and ' if stopped else ''}ended with code {code}; "
            "run the same `make quickstart` again to go on from here[/red]"
        )
        raise typer.Exit(code if code > 0 else 1)


def processor_seconds() -> float:
    """Time of processors that finished commands have taken, in s."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def newest_step(folder: Path) -> int:
    """Step of the run's newest checkpoint, 0 where there is none."""
    from parallel.checkpoint.folders import steps_in

    return max(steps_in(folder / "checkpoints"), default=0)


def half_way(arguments: list[str]) -> int:
    """Half of the run's steps."""
    from pretrain.config.load import load_config

    return load_config(arguments[0], arguments[1:]).train.steps // 2


def closing(chosen: QuickStart, folder: Path, other: str, seconds: float, processors: float) -> None:
    """Where everything is and what to do next.

    other: a scheme that this run did not have.
    seconds: by the clock. processors: of all processors together.
    """
    console.print(Rule(style="dim"))
    console.print(f"Done in {seconds / 60:.1f} minutes, with {processors / 60:.1f} minutes of processors.")
    family = next(name for name, start in QUICKSTARTS.items() if start is chosen)
    rows = [
        ("report", f"{folder}/report.html  (open it in a browser)"),
        ("model", f"{folder}/hf  ({chosen.auto_class}.from_pretrained)"),
        ("checkpoints", f"{folder}/checkpoints"),
        ("metrics", f"{folder}/metrics.jsonl; tensorboard --logdir {folder}/tensorboard"),
        ("continue", chosen.go_on.format(folder=folder)),
        ("", f"make quickstart FAMILY={family} SCHEME={other}    fathom config {chosen.config}"),
    ]
    for name, text in rows:
        console.print(f"  {name:12} {text}", markup=False, soft_wrap=True)
    console.print("[dim]`fathom` is .venv/bin/fathom[/dim]")


if __name__ == "__main__":
    command(main)

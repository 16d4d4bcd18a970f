"""`make quickstart`: from nothing to a trained, resumed, exported deep model, each step a command
you could type yourself.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import typer
from rich.console import Console
from rich.rule import Rule

DATA = Path("data/quickstart")
TOKENIZER = Path("data/quickstart_tokenizer.model")
CONFIG = "configs/quickstart.yaml"
DEFAULT_SCHEME = "deepscalelm_pre_ln"
STOPPED = 76
console = Console(highlight=False)


def main(
    scheme: str = typer.Option(
        DEFAULT_SCHEME, help="Depth scheme to train with; `fathom config` names them all."
    ),
    fresh: bool = typer.Option(False, help="Remove this quick start's data and run first."),
) -> None:
    """Prepare the Python standard library's source text, pretrain a 48-layer model on it, stop,
    resume, export, report.
    """
    run = "quickstart" if scheme == DEFAULT_SCHEME else f"quickstart_{scheme}"
    folder = Path("runs") / run
    recipe = f"configs/recipe/{scheme}.yaml"
    if not Path(recipe).is_file():
        known = sorted(path.stem for path in Path("configs/recipe").glob("*.yaml"))
        console.print(f"fathom: error: scheme {scheme} is unknown; choose one of {', '.join(known)}")
        raise typer.Exit(2)
    if fresh:
        for path in (DATA, folder):
            shutil.rmtree(path, ignore_errors=True)
    begin = time.monotonic()
    texts()
    train = ["pretrain", CONFIG, f"+include={recipe}", f"name={run}"]
    done = newest_step(folder)
    half = half_way(train[1:])
    title("2/6  Pretraining, first half: the run is told to stop at the middle")
    step(
        done >= half,
        f"checkpoint of step {done}",
        [*train, f"train.stop_at_step={half}"],
        allowed=(0, STOPPED),
    )
    title("3/6  Pretraining, second half: the same command continues")
    step(newest_step(folder) >= 2 * half, "the finished run", train)
    title("4/6  Export to Hugging Face format")
    step(False, "", ["export", str(folder), str(folder / "hf"), "--overwrite"])
    title("5/6  Check in a new process: AutoModelForCausalLM and AutoTokenizer")
    shell([sys.executable, "-m", "tools.dev.check_export", str(folder)])
    title("6/6  Report")
    step(False, "", ["report", str(folder)])
    closing(folder, train, time.monotonic() - begin)


def texts() -> None:
    """Trains a tokenizer on the Python standard library's source text, and prepares the text with
    it.
    """
    from pretrain.data.reading.inputs import standard_library_files

    files = [str(path) for path in standard_library_files()]
    note = f"<{len(files)} files of the Python standard library>"

    title("1/6  Text and tokenizer")
    TOKENIZER.parent.mkdir(parents=True, exist_ok=True)
    step(
        TOKENIZER.is_file(),
        f"{TOKENIZER}",
        ["tokenizer", "train", *files, "--vocab-size", "4096", "--out", str(TOKENIZER)],
        files,
        note,
    )
    step(
        (DATA / "dataset.json").is_file(),
        f"{DATA}",
        [
            *("data", "prepare", *files, "--out", str(DATA), "--tokenizer", str(TOKENIZER)),
            *("--split", "0.97,0.03,0", "--split-by", "file"),
        ],
        files,
        note,
    )


def title(text: str) -> None:
    """A ruled heading."""
    console.print()
    console.print(Rule(f"[bold]{text}", align="left", style="dim"))


def step(
    done: bool,
    what: str,
    arguments: list[str],
    long: list[str] | None = None,
    note: str = "",
    allowed: tuple[int, ...] = (0,),
) -> None:
    """Shows and runs `fathom ARGUMENTS...`, unless its result is there.

    long: arguments shown as `note`.
    Leaves with the command's code on failure.
    """
    shown = (
        " ".join([*("fathom", *arguments)])
        if long is None
        else " ".join(["fathom", *arguments]).replace(" ".join(long), note)
    )
    if done:
        console.print(f"[dim]$ {shown}[/dim]\nalready there: {what}", markup=True)
        return
    console.print(f"[bold]$ {shown}[/bold]")
    shell([sys.executable, "-m", "tools.cli", *arguments], allowed)


def shell(command: list[str], allowed: tuple[int, ...] = (0,)) -> None:
    """Runs a command on this terminal; a code that is not allowed ends the quick start with it."""
    code = subprocess.run(command, check=False, env=dict(os.environ, PYTHONWARNINGS="ignore")).returncode
    if code not in allowed:
        console.print(
            f"[red]the command above ended with code {code}; "
            "run `make quickstart` again to go on from here[/red]"
        )
        raise typer.Exit(code if code > 0 else 1)


def newest_step(folder: Path) -> int:
    """Step of the run's newest checkpoint, 0 where there is none."""
    from parallel.checkpoint.folders import steps_in

    return max(steps_in(folder / "checkpoints"), default=0)


def half_way(arguments: list[str]) -> int:
    """Half of the run's steps."""
    from pretrain.config.load import load_config

    return load_config(arguments[0], arguments[1:]).train.steps // 2


def closing(folder: Path, train: list[str], seconds: float) -> None:
    """Where everything is and what to do next."""
    console.print(Rule(style="dim"))
    console.print(f"Done in {seconds / 60:.1f} minutes.")
    rows = [
        ("report", f"{folder}/report.html  (open it in a browser)"),
        ("model", f"{folder}/hf  (AutoModelForCausalLM.from_pretrained)"),
        ("checkpoints", f"{folder}/checkpoints"),
        ("metrics", f"{folder}/metrics.jsonl; tensorboard --logdir {folder}/tensorboard"),
        ("continue", f"fathom generate {folder} --prompt 'def main(' --temperature 1 --top-p 0.95"),
        ("", f"make quickstart SCHEME=b2t    fathom config {CONFIG}    fathom --help"),
    ]
    for name, text in rows:
        console.print(f"  {name:12} {text}")
    console.print("[dim]`fathom` is .venv/bin/fathom[/dim]")


if __name__ == "__main__":
    typer.run(main)

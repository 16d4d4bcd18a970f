"""An export in an environment without Fathom: `python -m tools.dev.fresh_export RUN --venv FOLDER`.

The environment gets torch in this one's version, transformers in this one's or a given one, and
nothing else. There the export continues prompts greedily, here `fathom generate` does; both texts
must be equal.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import typer

from model.errors import UserError
from model.hf.trust import own_code
from model.records import Record, as_record
from tools.dev import run

PROMPTS = ("def main(", "import os\n\n\nclass ", "The ")
# Runs there: loads a folder, continues prompts, and says what else could be imported.
CODE = """
import importlib.util, json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, count, prompts, trust = json.loads(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
texts, counts = [], []
for prompt in prompts:
    inputs = tokenizer(prompt, return_tensors="pt")
    new = model.generate(**inputs, max_new_tokens=count, do_sample=False)[0, inputs.input_ids.shape[1]:]
    texts.append(tokenizer.decode(new, skip_special_tokens=True))
    counts.append(len(new))
extra = [name for name in ("model", "pretrain", "tools", "megatron", "deepspeed", "sentencepiece", \
"google.protobuf")
         if importlib.util.find_spec(name.partition(".")[0])]
print(json.dumps({"kind": type(model).__name__, "texts": texts, "counts": counts, "extra": extra,
                  "transformers": transformers.__version__}))
"""


def make_venv(folder: Path, transformers: str | None = None) -> Path:
    """An environment with torch and transformers; returns its interpreter.

    One that is there is used as it is.
    transformers: its version; None for the one of this environment.
    Raises UserError where pip fails, with its last line.
    """
    from importlib.metadata import version

    python = folder / "bin" / "python"
    if python.exists():
        return python
    versions = {"torch": version("torch").partition("+")[0]}
    versions["transformers"] = transformers or version("transformers")
    wanted = [f"{name}=={number}" for name, number in versions.items()]
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", *wanted],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            # Half an environment would be taken for a whole one next time.
            shutil.rmtree(folder, ignore_errors=True)
            raise UserError(
                f"{' '.join(command)} failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}"
            )
    return python


class Continued(Record):
    """What an export is and does in another environment."""

    kind: str
    """Its class."""
    transformers: str
    """The version there."""
    texts: list[str]
    """Continuations, prompt by prompt."""
    counts: list[int]
    """Their tokens."""
    extra: list[str]
    """Modules that should not be there."""


def continue_there(python: Path, exported: Path, prompts: tuple[str, ...], tokens: int) -> Continued:
    """Continues prompts with an export, greedily, in another environment.

    Raises UserError where it fails, or brings code that is not ours.
    """
    trust = own_code(exported)
    with tempfile.TemporaryDirectory() as home:
        # -I: neither this folder nor PYTHONPATH can be imported there.
        arguments = json.dumps([str(exported.resolve()), tokens, prompts, trust])
        command = [str(python), "-I", "-c", CODE, arguments]
        env = {
            "PATH": os.environ.get("PATH", ""),
            "HF_HOME": home,
            "HOME": home,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        }
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=home, env=env)
    if done.returncode:
        raise UserError(
            f"{exported} does not work with {python}: "
            f"{(done.stderr.strip().splitlines() or ['no output'])[-1]}"
        )
    said = json.loads(done.stdout.splitlines()[-1])
    return as_record(said, Continued, f"what {python} printed", "it is not the environment that was made")


def main(
    folder: Path = typer.Argument(metavar="RUN", help="Run folder, checkpoints folder or step folder."),
    venv: Path = typer.Option(help="Environment with torch and transformers only; made where there is none."),
    exported: Path = typer.Option(None, help="Exported model; default: `hf` in the run folder."),
    transformers: str = typer.Option(None, help="Version of transformers there; default: that of here."),
    tokens: int = typer.Option(64, min=1, help="Tokens to add to each prompt."),
) -> None:
    """Compare greedy text of an export without Fathom with that of `fathom generate`.

    Exit code 1 where they differ.
    """
    from pretrain.trained.generate import generate_text

    place = exported or folder / "hf"
    own_code(place)  # before an environment is made
    theirs = continue_there(make_venv(venv, transformers), place, PROMPTS, tokens)
    if transformers not in (None, theirs.transformers):
        raise UserError(
            f"{venv} has transformers {theirs.transformers}, not {transformers}: name another folder"
        )
    extra = f", but {', '.join(theirs.extra)}" if theirs.extra else ""
    typer.echo(f"{theirs.kind} in {venv}, transformers {theirs.transformers}, which has no Fathom{extra}")
    equal = True
    for prompt, text, count in zip(PROMPTS, theirs.texts, theirs.counts, strict=True):
        ours = "".join(generate_text(folder, prompt, tokens, temperature=0))
        equal = equal and ours == text
        verdict = "the same text" if ours == text else f"DIFFERENT: {ours!r}, there {text!r}"
        typer.echo(f"{prompt!r} + {count} tokens: {verdict}")
        typer.echo(f"    {text[:100]!r}")
    if not equal:
        raise typer.Exit(1)


if __name__ == "__main__":
    run(main)

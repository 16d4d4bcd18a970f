"""An export in an environment without Fathom: `python -m tools.dev.fresh_export RUN --venv FOLDER`.

The environment gets torch and transformers in this one's versions and nothing else. There the export continues prompts greedily, here `fathom generate`
does; both texts must be equal.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import typer

from model.errors import UserError

PROMPTS = ("def main(", "import os\n\n\nclass ", "The ")
# Runs there: loads a folder, continues prompts, and says what else could be imported.
CODE = """
import importlib.util, json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, count, prompts = json.loads(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
texts, counts = [], []
for prompt in prompts:
    inputs = tokenizer(prompt, return_tensors="pt")
    new = model.generate(**inputs, max_new_tokens=count, do_sample=False)[0, inputs.input_ids.shape[1]:]
    texts.append(tokenizer.decode(new, skip_special_tokens=True))
    counts.append(len(new))
extra = [name for name in ("model", "pretrain", "tools", "megatron", "deepspeed", "sentencepiece", "google.protobuf")
         if importlib.util.find_spec(name.partition(".")[0])]
print(json.dumps({"class": type(model).__name__, "texts": texts, "counts": counts, "extra": extra}))
"""


def make_venv(folder: Path) -> Path:
    """An environment with torch and transformers in the versions of this one; its interpreter. One that is there is used as it is.

    Raises UserError where pip fails, with its last line.
    """
    from importlib.metadata import version

    python = folder / "bin" / "python"
    if python.exists():
        return python
    wanted = [f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "transformers")]
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", *wanted],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            shutil.rmtree(
                folder, ignore_errors=True
            )  # half an environment would be taken for a whole one next time
            raise UserError(
                f"{' '.join(command)} failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}"
            )
    return python


def continue_there(python: Path, exported: Path, prompts: tuple[str, ...], tokens: int) -> dict[str, Any]:
    """Class, texts, token counts, and modules that should not be there, from an export in another environment. Raises UserError where it fails."""
    with tempfile.TemporaryDirectory() as home:
        # -I: neither this folder nor PYTHONPATH can be imported there.
        command = [str(python), "-I", "-c", CODE, json.dumps([str(exported.resolve()), tokens, prompts])]
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
            f"{exported} does not work with {python}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}"
        )
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def main(
    run: Path = typer.Argument(help="Run folder, checkpoints folder or step folder."),
    venv: Path = typer.Option(help="Environment with torch and transformers only; made where there is none."),
    exported: Path = typer.Option(None, help="Exported model; default: `hf` in the run folder."),
    tokens: int = typer.Option(64, min=1, help="Tokens to add to each prompt."),
) -> None:
    """Compare greedy text of an export without Fathom with that of `fathom generate`. Exit code 1 where they differ."""
    from pretrain.trained.generate import generate_text

    theirs = continue_there(make_venv(venv), exported or run / "hf", PROMPTS, tokens)
    typer.echo(
        f"{theirs['class']} in {venv}, which has no Fathom"
        + (f", but {', '.join(theirs['extra'])}" if theirs["extra"] else "")
    )
    equal = True
    for prompt, text, count in zip(PROMPTS, theirs["texts"], theirs["counts"], strict=True):
        ours = "".join(generate_text(run, prompt, tokens, temperature=0))
        equal = equal and ours == text
        typer.echo(
            f"{prompt!r} + {count} tokens: {'the same text' if ours == text else f'DIFFERENT: {ours!r}, there {text!r}'}"
        )
        typer.echo(f"    {text[:100]!r}")
    if not equal:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

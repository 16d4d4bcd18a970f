"""The command line `fathom`: a table of commands.

Each is imported only when it runs, so that help is quick and needs no PyTorch.
A new command needs one row in COMMANDS and its module.
The module has either a function `command` or a `typer.Typer` named `app`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command, get_command_name, get_group

from model import __version__
from model.errors import UserError, say, told

ROOT = Path(__file__).resolve().parent.parent
WRONG_CALL: Any = typer.BadParameter.__mro__[2]
"""Base of what click raises for options and arguments that a command does not take."""

PRINTERS = ("rich", "typer", "click", "tools", "__main__")
"""What writes to standard output, by the first word of a module."""


@dataclass(frozen=True)
class Row:
    """One command."""

    name: str
    target: str
    """The `module:attribute` that runs it."""
    help: str
    """One line."""
    panel: str
    """The panel of `fathom --help` it stands in."""

    @property
    def available(self) -> bool:
        """Whether the module is part of this checkout. Looks at files only."""
        path = ROOT.joinpath(*self.target.partition(":")[0].split("."))
        return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


COMMANDS = (
    Row(
        "init",
        "tools.runs.init:command",
        "Write an example project: a configuration, a site file, a small text.",
        "Data",
    ),
    Row(
        "data",
        "tools.text.data:app",
        "Prepare texts, pairs of texts, images or recordings for training, and look at prepared data.",
        "Data",
    ),
    Row("tokenizer", "tools.text.tokenizer:app", "Train a tokenizer.", "Data"),
    Row(
        "config",
        "tools.runs.config:command",
        "Check a configuration and explain every field of it.",
        "Training",
    ),
    Row(
        "plan",
        "tools.runs.plan:command",
        "Predict memory, speed, duration and cost of a run, and rank layouts.",
        "Training",
    ),
    Row(
        "design",
        "tools.runs.design:command",
        "Write a configuration for a size, a depth, GPUs and a budget of tokens.",
        "Training",
    ),
    Row("pretrain", "tools.runs.pretrain:command", "Train a model, or go on with a run.", "Training"),
    Row(
        "report",
        "tools.runs.report:command",
        "Write a run's report: curves, signal through depth, speed.",
        "Training",
    ),
    Row("checkpoint", "tools.runs.checkpoint:app", "List, inspect and check checkpoints.", "Training"),
    Row("generate", "tools.models.generate:command", "Continue a text with a trained model.", "Models"),
    Row("chat", "tools.models.chat:command", "Continue text line by line, to try a model out.", "Models"),
    Row("fill", "tools.models.fill:command", "Fill places in a text with a trained encoder.", "Models"),
    Row("translate", "tools.models.translate:command", "Translate lines with an encoder-decoder.", "Models"),
    Row("transcribe", "tools.models.transcribe:command", "Write what recordings say.", "Models"),
    Row(
        "eval",
        "tools.models.eval:command",
        "Measure a checkpoint: perplexity, hidden tokens, translations or classes of images.",
        "Models",
    ),
    Row("export", "tools.models.export:command", "Write a checkpoint as a Hugging Face model.", "Models"),
    Row("import", "tools.models.import_hf:command", "Read a Hugging Face model as a checkpoint.", "Models"),
    Row(
        "probe",
        "tools.research.probe:command",
        "Measure a model's signals at initialisation against theory.",
        "Depth",
    ),
    Row(
        "depth-use",
        "tools.research.depth_use:command",
        "Measure what each layer of a trained model is worth.",
        "Depth",
    ),
    Row(
        "depth-duel",
        "tools.research.depth_duel:command",
        "Train several depth schemes side by side and compare them.",
        "Depth",
    ),
    Row("submit", "tools.runs.submit:command", "Send a run to Slurm.", "Cluster"),
    Row("status", "tools.runs.status:command", "Show runs and their Slurm jobs.", "Cluster"),
    Row("board", "tools.runs.board:command", "Show all runs in a browser, live.", "Cluster"),
    Row(
        "doctor",
        "tools.runs.doctor:command",
        "Check this machine: devices, compilers, packages, network.",
        "Cluster",
    ),
)


class LazyGroup(TyperGroup):
    """A group whose commands are stand-ins, a name and a help line, until one is invoked."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.rows = {row.name: row for row in COMMANDS if row.available}
        for row in self.rows.values():
            self.add_command(
                TyperCommand(name=row.name, help=row.help, short_help=row.help, rich_help_panel=row.panel)
            )

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        """The real command behind the name in args[0]."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, load_command(self.rows[name]) if name in self.rows else command, rest

    def invoke(self, ctx: Any) -> Any:
        """Runs the command.

        A broken pipe other than standard output is a fault that click would pass over.
        """
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            if _reader_left():
                raise
            raise RuntimeError(f"a pipe or socket to another process broke: {error}") from error


def load_command(row: Row) -> TyperCommand | TyperGroup:
    """Imports a row's module and makes its command.

    Raises UserError for a module that has not what the row says.
    """
    module, _, attribute = row.target.partition(":")
    target = getattr(importlib.import_module(module), attribute, None)
    if isinstance(target, typer.Typer):
        names = [
            info.name or get_command_name(getattr(info.callback, "__name__", ""))
            for info in target.registered_commands
        ]
        # An app with one command of the row's own name is that command.
        # Any other app is a group, also while it has one command only.
        command = (
            get_command(target) if names == [row.name] and not target.registered_groups else get_group(target)
        )
    elif callable(target):
        wrapper = typer.Typer(add_completion=False)
        wrapper.command(row.name)(target)
        command = get_command(wrapper)
    else:
        raise UserError(f"command {row.name}: {module} has no {attribute}")
    assert isinstance(command, (TyperCommand, TyperGroup))
    command.name = row.name
    command.params = [
        parameter
        for parameter in command.params
        if parameter.name not in ("install_completion", "show_completion")
    ]
    return command


app = typer.Typer(
    cls=LazyGroup, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]}
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fathom {__version__}")
        raise typer.Exit


@app.callback(epilog="FATHOM_DEBUG=1 shows the full traceback of an error.")
def _fathom(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and leave."
    ),
) -> None:
    """Pretrain very deep transformers with Megatron-core and DeepSpeed."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point.

    Exits with 0; with 2 and one line on stderr for a mistake of the user;
    with 1 where the reader of standard output has left; with 130 for ctrl-C;
    or with what the command says.
    """
    try:
        code = get_command(app)(args=arguments, prog_name="fathom", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except typer.Abort:
        say("stopped")
        sys.exit(1)
    except WRONG_CALL as error:
        say(_wrong_call(error))
        sys.exit(error.exit_code)
    except BrokenPipeError:
        if not _reader_left():
            raise
        _close_output()
        sys.exit(1)
    except Exception as error:
        printing = isinstance(error, OSError) and error.filename is None and _while_printing(error)
        if not told(error, "standard output: " if printing else ""):
            raise
        if printing:
            _close_output()
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def _wrong_call(error: Any) -> str:
    """What is wrong with the options of a call.

    Nothing for a call without any, which has printed its help.
    """
    if type(error).__name__ == "NoArgsIsHelpError":
        return ""
    context = getattr(error, "ctx", None)
    hint = f" ({context.command_path} --help)" if context is not None else ""
    return (_wrong_value(error) or " ".join(error.format_message().split())) + hint


def _wrong_value(error: Any) -> str:
    """An option's value beside what it must be; nothing where it is not the value that is wrong."""
    cause, parameter = error.__cause__, getattr(error, "param", None)
    if parameter is None or type(cause).__name__ != "ValidationError":
        return ""
    from pretrain.config.expected import expected, typed_value

    first = cause.errors(include_url=False)[0]
    name = "/".join(one for one in parameter.opts if not one.startswith("-") or one.startswith("--"))
    if first["type"] == "value_error":
        return f"{name}: {str(first['ctx']['error']).rstrip('.')}"
    return f"{name} {typed_value(first['input'])} must be {expected(first)}"


def _reader_left() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(1, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _while_printing(error: BaseException) -> bool:
    """Whether an error arose in what prints, rather than in what writes files."""
    module = ""
    trace = error.__traceback__
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__"))
        trace = trace.tb_next
    return module.partition(".")[0] in PRINTERS


def _close_output() -> None:
    """Sends what is still to be written nowhere; Python would complain about it at its end."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    main()

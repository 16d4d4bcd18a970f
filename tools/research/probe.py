"""`fathom probe`: a model's signals at initialisation, or of a checkpoint, against theory."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from model.errors import UserError
from model.files import atomic_write_text, check_outputs
from tools.measured_on import STDOUT
from tools.shipped import say_shipped

PRECISIONS = ("float32", "float64", "bfloat16")
SOURCES = ("auto", "synthetic", "data")


def command(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG_OR_RUN",
            help="Configuration file, or the name of a shipped one, of which the model, the sequence length, "
            "the data and the seed are read; or a run folder or checkpoint, whose weights are measured.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Settings that replace the file's, e.g. model.hidden_size=128."
        ),
    ] = None,
    scheme: Annotated[
        str | None, typer.Option(help="Depth scheme, with options as in b2t:rescale=false.")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers instead of the configuration's.")] = None,
    seeds: Annotated[
        int, typer.Option(min=1, max=1000, help="Initialisations (with tokens of their own) to average over.")
    ] = 1,
    batch: Annotated[int, typer.Option(min=1, max=1 << 16, help="Sequences a seed.")] = 2,
    tokens: Annotated[
        str,
        typer.Option(
            help="synthetic: independent tokens after Zipf's law; data: of the configured data sets; "
            "auto: data where it is prepared."
        ),
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="float32; float64, which reports gradients that float32 would flush to zero; or bfloat16, "
            "as training has it."
        ),
    ] = "float32",
    compare: Annotated[
        str | None,
        typer.Option(help="Several schemes on one page, e.g. pre_ln,post_ln,b2t,deepscalelm_pre_ln."),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Measure these weights: a checkpoint folder or a run.")
    ] = None,
    json_: Annotated[
        Path | None,
        typer.Option(
            "--json", help="Write the measurement to this file; - prints it as JSON, and nothing else."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Write a picture (.png, .svg, .pdf) or a page (.html); "
            "with --compare probe.html unless given."
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the verdicts only.")] = False,
) -> None:
    """Build the configured model on one process and send tokens forward and backward through it.

    Compares every layer's signals with theory.
    Says in words whether the model is trainable at initialisation, and why not.
    Needs no data set and no GPU.
    Exit code 0 whatever the verdict.
    """
    # Megatron-core's remarks on packages that a probe does not need.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    from pretrain.probe.report import check_plot, json_text, text, write_plot

    for name, value, allowed in (("--tokens", tokens, SOURCES), ("--dtype", dtype, PRECISIONS)):
        if value not in allowed:
            raise UserError(f"{name} {value}: choose one of {', '.join(allowed)}")
    if checkpoint is not None and (scheme or layers or compare):
        raise UserError(
            "--checkpoint measures the weights it holds: leave out --scheme, --layers and --compare"
        )
    if compare and scheme:
        raise UserError("--compare names the schemes: leave out --scheme")
    if compare and plot is None:
        plot = Path("probe.html")
    if plot is not None:
        check_plot(plot)
    check_outputs({"--json": None if json_ == STDOUT else json_, "--plot": plot})
    from pretrain.probe.rules import verdict
    from pretrain.probe.setup import Choices, probes

    if not quiet:
        say_shipped(config)
    choices = Choices(scheme, layers, seeds, batch, tokens, dtype, compare, checkpoint)
    measured = []
    for one in probes(config, overrides or [], choices):
        if json_ != STDOUT:
            typer.echo(f"{one.label}: {verdict(one)}" if quiet else text(one) + "\n")
        measured.append(one)
    content = json_text(measured, compare is not None) if json_ is not None else ""
    # Numbers before the picture, which may fail.
    if json_ == STDOUT:
        typer.echo(content, nl=False)
    elif json_ is not None:
        atomic_write_text(json_, content)
    if plot is not None:
        write_plot(measured, plot)
    if json_ == STDOUT:
        return
    for name, path in (("json", json_), ("plot", plot)):
        if path is not None and not quiet:
            typer.echo(f"{name}: {path}")

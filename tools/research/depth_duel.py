"""`fathom depth-duel`: depth schemes trained side by side, each compared at its own best rate and
warm-up.
"""

from __future__ import annotations

import math
import shlex
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from model.errors import UserError
from model.files import check_output
from model.words import printable
from tools.shipped import say_shipped

LEAST, MOST = 1e-30, 1e30
"""Of rates and shares, as optimizer.lr has it."""
MOST_LAYERS, MOST_STEPS = 10_000, 10**9
"""As model.num_layers and train.steps have it."""

ConfigFile = Annotated[
    str,
    typer.Argument(
        help="Configuration of the model that all schemes train: a file, or a shipped one, e.g. duel."
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the file's.")
]
Schemes = Annotated[str, typer.Option(help="Comma-separated schemes, with options as in b2t:rescale=false.")]
Layers = Annotated[str | None, typer.Option(help="Comma-separated depths; the configuration's unless given.")]
Lrs = Annotated[
    str | None,
    typer.Option(help="Comma-separated peak learning rates; the configuration's unless given."),
]
Warmups = Annotated[
    str | None,
    typer.Option(help="Comma-separated warm-ups as shares of the steps; the configuration's unless given."),
]
Seeds = Annotated[int, typer.Option(min=1, max=1000, help="Trainings of each cell, from train.seed upwards.")]
EqualOver = Annotated[
    str,
    typer.Option(
        help="tokens: every depth has the configured width; "
        "parameters: widths are fitted to the configured size."
    ),
]
CarryOver = Annotated[
    bool,
    typer.Option(
        "--transfer",
        help="Train every scheme with model.transfer too, from the lowest depth on, and show how far the "
        "best rate moves over depth.",
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(min=2, max=MOST_STEPS, help="Steps of every cell instead of the configuration's."),
]
OutFolder = Annotated[
    Path, typer.Option(help="Folder of the cells, the page and the JSON; the same command there resumes.")
]
Jobs = Annotated[
    int | None,
    typer.Option(min=1, max=1024, help="Cells trained at once; one per GPU or processor unless given."),
]
ReportOnly = Annotated[
    bool, typer.Option("--report-only", help="Train nothing; write the page of the cells in --out.")
]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="Print duel.json, and nothing else; progress goes to standard error."),
]


def command(
    config: ConfigFile,
    overrides: Overrides = None,
    schemes: Schemes = "pre_ln,post_ln,b2t,deepscalelm_pre_ln",
    layers: Layers = None,
    lrs: Lrs = None,
    warmups: Warmups = None,
    seeds: Seeds = 1,
    equal: EqualOver = "tokens",
    transfer: CarryOver = False,
    steps: Steps = None,
    out: OutFolder = Path("duel"),
    jobs: Jobs = None,
    report_only: ReportOnly = False,
    as_json: AsJson = False,
) -> None:
    """Train every scheme at every depth, rate and warm-up, and write one page of curves, stability
    and cost.

    Finished cells are kept, so that a duel can be stopped with ctrl-C and resumed, or given more
    rates later.
    Exit code 1 while cells are missing.
    """
    # Megatron-core's remarks on packages that a duel does not need.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    from pretrain.config.load import load_with_origins
    from pretrain.config.scheme_choice import base_asked_for, parse_variants
    from pretrain.data.samples import open_samples
    from pretrain.duel.grid import Grid, cell_config, check_effect, check_unchanged
    from pretrain.duel.report import Duel, text, write
    from pretrain.duel.results import outcome
    from pretrain.duel.transfer import doubled
    from pretrain.duel.workers import default_jobs, train_cells
    from pretrain.train.run import prepared_config

    _check_asked(equal, report_only, out, jobs)
    settings = [*(overrides or []), *([f"train.steps={steps}"] if steps else [])]
    say_shipped(config)
    base = prepared_config(config, settings)
    depths = _depths(layers) or [base.model.num_layers]
    rates = _numbers("--lrs", lrs) or [base.optimizer.lr]
    shares = _numbers("--warmups", warmups, least=0) or [base.schedule.warmup_steps / base.train.steps]
    if max(shares) >= 1:
        raise UserError(
            f"--warmups {warmups}: shares of the steps lie below 1"
            if warmups
            else f"schedule.warmup_steps={base.schedule.warmup_steps} is no part of train.steps="
            f"{base.train.steps}: set fewer, or give shares with --warmups"
        )
    asked = base_asked_for(config, settings)
    variants = [variant.with_base(asked) for variant in parse_variants(schemes, "--schemes")]
    if transfer:
        variants = doubled(variants, base, depths, rates, equal)  # type: ignore[arg-type]
    grid = Grid(variants, depths, rates, shares, range(base.train.seed, base.train.seed + seeds), equal)  # type: ignore[arg-type]
    cells = grid.cells()
    configs = [cell_config(base, cell, grid.equal, out) for cell in cells]
    check_effect(base, configs[0], load_with_origins(config, settings)[1])
    check_unchanged(configs)
    if not report_only:
        train_cells(configs, jobs or default_jobs(), partial(typer.echo, err=as_json))
    known = open_samples(base, base.task.samples, "train", alone=True).entropy
    unigram = math.nan if known is None else known
    typed = ["fathom", *sys.argv[1:]] if sys.argv[1:2] == ["depth-duel"] else ["fathom", "depth-duel", config]
    duel = Duel(
        base,
        grid,
        [outcome(cell, one, unigram) for cell, one in zip(cells, configs, strict=True)],
        unigram,
        shlex.join(typed),
        transfer,
    )
    page, data = write(duel, out)
    told = data.read_text(encoding="utf-8") if as_json else f"{text(duel)}\npage: {page}\njson: {data}\n"
    typer.echo(told, nl=False)
    if any(one.status == "unfinished" for one in duel.outcomes):
        raise typer.Exit(1)


def _check_asked(equal: str, report_only: bool, out: Path, jobs: int | None) -> None:
    """Raises UserError for an unknown choice, a report of nothing, and an unwritable folder."""
    from pretrain.duel.report import DATA, PAGE

    if equal not in ("tokens", "parameters"):
        raise UserError(f"--equal {equal}: choose tokens or parameters")
    if report_only:
        _check_report(out, jobs)
    for name in (PAGE, DATA):
        check_output(out / name, "--out")


def _check_report(out: Path, jobs: int | None) -> None:
    """Raises UserError for a report without cells, or with workers."""
    from pretrain.duel.grid import CELLS

    if jobs is not None:
        raise UserError(f"--jobs {jobs} has no effect with --report-only: leave one of them out")
    if not (out / CELLS).is_dir():
        raise UserError(
            f"--out {out}: holds no cells of a duel to report on; "
            "name another folder, or leave out --report-only to train them"
        )


def _depths(text: str | None) -> list[int]:
    """Comma-separated whole numbers above 0.

    Raises UserError for anything else and for one that occurs twice.
    """
    numbers = _numbers("--layers", text, least=1, most=MOST_LAYERS)
    if not all(number.is_integer() for number in numbers):
        raise UserError(f"--layers {printable(text, 60)}: depths are whole numbers")
    return [int(number) for number in numbers]


def _numbers(option: str, text: str | None, least: float = LEAST, most: float = MOST) -> list[float]:
    """Comma-separated numbers within limits.

    Raises UserError for anything else and for a number that occurs twice.
    """
    try:
        numbers = [float(part) for part in (text or "").split(",") if part.strip()]
    except ValueError:
        raise UserError(f"{option} {printable(text, 60)}: give numbers separated by commas") from None
    if not all(least <= number <= most for number in numbers) or len(set(numbers)) < len(numbers):
        raise UserError(
            f"{option} {printable(text, 60)}: every number must be at least {least:g}, at most {most:g}, "
            "and named once"
        )
    return numbers

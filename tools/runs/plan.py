"""`fathom plan`: what a run will need and how long it will take, before it starts."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, TypedDict, final

import typer
from rich.console import Console
from rich.table import Table

from model.errors import UserError
from parallel.hardware.gpus import PLANNED
from tools.runs import plan_count
from tools.shipped import say_shipped

if TYPE_CHECKING:
    from pretrain.plan.layouts import Prediction

PIPED_WIDTH = 160
MOST_GPUS = 10_000_000
GPU, TOP = "h100", 8
"""What is planned for, and how many layouts are listed, where nothing is said."""


@final
class Row(TypedDict):
    """One layout."""

    layout: dict[str, int | str]
    micro_batches: int
    memory: dict[str, float]
    """Bytes of every part, and `total`."""
    fits: bool
    step: dict[str, float]
    """Seconds of every part, and `total`."""
    limit: str
    """What takes most of the step."""
    shares: dict[str, float]
    sent_per_step: dict[str, float]
    """Bytes."""
    bubble: float
    tokens_per_s: float
    mfu: float
    days: float
    cost: float | None


@final
class Impossible(TypedDict):
    """What stands in place of a layout that cannot be."""

    impossible: str


class Report(TypedDict):
    """The whole answer."""

    gpu: str
    gpus: int
    precision: str
    memory_of_gpu: float
    """Bytes."""
    efficiency_fitted: bool
    parameters: dict[str, int]
    flops_per_token: dict[str, float]
    tokens_per_step: int
    tokens: float
    configured: Row | Impossible
    layouts: list[Row]
    why_none: str | None


def command(
    config: Annotated[str, typer.Argument(help="Configuration file, or the name of a shipped one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.sub=value sets a value, as in `fathom pretrain`.")
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_GPUS, help="GPUs; default: the processes the configuration's layout needs."
        ),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help=f"Kind of GPU: {', '.join(PLANNED)}; default: {GPU}.")
    ] = None,
    tokens: Annotated[
        float | None,
        typer.Option(
            min=1, max=1e18, help="Token budget, e.g. 30e9; default: all steps of the configuration."
        ),
    ] = None,
    price_per_gpu_hour: Annotated[
        float | None, typer.Option(min=0, max=1e6, help="Price of one GPU for an hour, for the cost.")
    ] = None,
    top: Annotated[
        int | None, typer.Option(min=1, max=1000, help=f"Layouts to list; default: {TOP}.")
    ] = None,
    count: Annotated[
        bool, typer.Option("--count", help="Count the operators of one layer of each kind instead.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict memory, speed, duration and cost of a run, and rank the layouts that fit.

    Needs no GPU.
    How far off it may be: docs/performance.md.
    """
    say_shipped(config)
    console = Console()
    console = console if console.is_terminal else Console(width=PIPED_WIDTH)
    if count:
        given = {
            "--gpus": gpus,
            "--gpu": gpu,
            "--tokens": tokens,
            "--price-per-gpu-hour": price_per_gpu_hour,
            "--top": top,
        }
        for name in (name for name, value in given.items() if value is not None):
            raise UserError(f"{name} has no effect with --count: leave one of them out")
        counted = plan_count.count(config, overrides or [])
        if as_json:
            typer.echo(json.dumps(counted, indent=2))
        else:
            plan_count.show(counted, console)
        return
    report = plan(config, overrides or [], gpus, gpu or GPU, tokens, price_per_gpu_hour, top or TOP)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    _print(report, console)


def plan(
    path: str,
    overrides: list[str],
    gpus: int | None,
    gpu: str,
    tokens: float | None,
    price: float | None,
    top: int,
) -> Report:
    """The whole answer as plain data; bytes, seconds, days.

    Raises UserError for an unknown GPU, an impossible layout or an unknown vocabulary.
    """
    from model.parameters.size import parameter_count
    from parallel.hardware.gpus import planned_gpu
    from pretrain.config.load import load_config
    from pretrain.data.manifest import sized_model
    from pretrain.plan.layouts import configured, possible, rank, why_none, work_of

    device = planned_gpu(gpu)
    config = load_config(path, overrides)
    model = sized_model(config)
    work = work_of(config, model)
    parallel = config.parallel
    world = gpus or parallel.processes or parallel.tensor * parallel.pipeline * parallel.context
    budget = tokens or config.batch_sizes.before(config.train.steps) * work.seq_length
    flops = work.flops(parallel.recompute.granularity)
    try:
        own: Row | Impossible = _row(configured(config, work, device, world), budget, world, price)
    except UserError as error:
        own = {"impossible": str(error)}
    tried = possible(work, device, world, parallel)
    best = [_row(one, budget, world, price) for one in rank(tried, most=top)]
    return {
        "gpu": device.name,
        "gpus": world,
        "precision": work.precision,
        "memory_of_gpu": device.memory,
        "efficiency_fitted": device.fitted,
        "parameters": parameter_count(model),
        "flops_per_token": {"model": flops.model, "hardware": flops.hardware},
        "tokens_per_step": work.batch * work.seq_length,
        "tokens": budget,
        "configured": own,
        "layouts": best,
        "why_none": None if best else why_none(work, device, world, tried),
    }


def _row(one: Prediction, tokens: float, world: int, price: float | None) -> Row:
    from pretrain.plan.layouts import days

    length = days(one, tokens)
    return {
        "layout": one.summary(),
        "micro_batches": one.micro_batches,
        "memory": dataclasses.asdict(one.memory) | {"total": one.memory.total},
        "fits": one.fits,
        "step": dataclasses.asdict(one.time) | {"total": one.time.total},
        "limit": next(iter(one.time.shares())),
        "shares": one.time.shares(),
        "sent_per_step": dataclasses.asdict(one.traffic),
        "bubble": one.bubble,
        "tokens_per_s": one.tokens_per_s,
        "mfu": one.mfu,
        "days": length,
        "cost": None if price is None else length * 24 * world * price,
    }


def _print(report: Report, console: Console) -> None:
    from pretrain.plan.speed import LIMITS

    counts, flops = report["parameters"], report["flops_per_token"]
    console.print(
        f"{counts['total']:,} parameters; {flops['model'] / 1e9:.3f} GFLOP per token "
        f"({flops['hardware'] / 1e9:.3f} with what is computed again)"
    )
    note = (
        ""
        if report["efficiency_fitted"]
        else "; no published run tells what it reaches, so the shares of H100 are taken"
    )
    console.print(
        f"{report['gpus']} x {report['gpu']}, {report['precision']}, "
        f"{report['tokens_per_step']:,} tokens a step, {report['tokens']:,.0f} in all{note}"
    )
    own = report["configured"]
    console.print()
    if "impossible" in own:
        console.print(f"The configured layout is impossible here: {own['impossible']}", soft_wrap=True)
    else:
        _details(own, report["memory_of_gpu"], console)
    console.print()
    if not report["layouts"]:
        console.print(report["why_none"], soft_wrap=True)
        return
    console.print(_table(report))
    console.print(
        "tp tensor, pp pipeline, vp virtual stages, dp data parallel, zero ZeRO stage, "
        "micro samples of a micro-batch",
        style="dim",
    )
    console.print("stages of pipelines with vp=1 are cut as by parallel.pipeline_split=auto", style="dim")
    console.print("limit: the two that take most of the step, and their shares", style="dim")
    for word, meaning in LIMITS.items():
        console.print(f"  {word}: {meaning}", style="dim")


def _details(own: Row, memory: float, console: Console) -> None:
    parts, step, sent = own["memory"], own["step"], own["sent_per_step"]
    gib = ", ".join(
        f"{name} {parts[name] / 2**30:.2f}"
        for name in ("weights", "gradients", "optimizer", "activations", "buffers")
    )
    fits = "fits" if own["fits"] else "does NOT fit"
    console.print(
        f"As configured ({_degrees(own)}): {fits}, {parts['total'] / 2**30:.2f} of {memory / 2**30:.1f} GiB"
    )
    console.print(
        f"  memory per GPU, GiB  {gib} "
        f"(activations without recompute {parts['without_recompute'] / 2**30:.2f})"
    )
    console.print(
        f"  step {step['total']:.3f} s       compute {step['compute']:.3f} (of it waiting for launches "
        f"{step['host']:.3f}), bubble {step['bubble']:.3f} ({own['bubble']:.1%}), "
        f"communication {step['communication']:.3f}, optimizer {step['optimizer']:.3f}"
    )
    console.print(
        f"  sent per GPU and step, GiB  tensor {sent['tensor'] / 2**30:.2f}, "
        f"pipeline {sent['pipeline'] / 2**30:.2f}, data {sent['data'] / 2**30:.2f}"
        + (f", context {sent['context'] / 2**30:.2f}" if own["layout"]["cp"] != 1 else "")
    )
    cost = "" if own["cost"] is None else f", cost {own['cost']:,.0f}"
    console.print(
        f"  {own['tokens_per_s']:,.0f} tokens/s, MFU {own['mfu']:.1%}, limited by {_limit(own)}, "
        f"{own['days']:.2f} days{cost}"
    )


def _limit(row: Row) -> str:
    return ", ".join(f"{word} {share:.0%}" for word, share in list(row["shares"].items())[:2])


def _degrees(row: Row) -> str:
    shown = {name: value for name, value in row["layout"].items() if name != "sp"}
    if shown["cp"] == 1:
        del shown["cp"]
    return " ".join(f"{name}={value}" for name, value in shown.items())


def _table(report: Report) -> Table:
    table = Table(title="Layouts that fit, fastest first", title_justify="left")
    cost = report["layouts"][0]["cost"] is not None
    for name in (
        "tp",
        "pp",
        "vp",
        "dp",
        "zero",
        "recompute",
        "micro",
        "GiB",
        "step",
        "tokens/s",
        "MFU",
        "bubble",
        "limit",
        "days",
        *(("cost",) if cost else ()),
    ):
        table.add_column(name, justify="right")
    for row in report["layouts"]:
        layout = row["layout"]
        cells = [str(layout[name]) for name in ("tp", "pp", "vp", "dp", "zero", "recompute", "micro")]
        cells += [
            f"{row['memory']['total'] / 2**30:.1f}",
            f"{row['step']['total']:.3f} s",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['mfu']:.1%}",
        ]
        table.add_row(
            *cells,
            f"{row['bubble']:.1%}",
            _limit(row),
            f"{row['days']:.2f}",
            *((f"{row['cost']:,.0f}",) if cost else ()),
        )
    return table

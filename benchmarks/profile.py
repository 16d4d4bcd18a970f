"""`python -m benchmarks.profile`: where the time of one optimizer step goes.

It stands beside a bare PyTorch loop of the same shape.
PyTorch's profiler gives every operator the time that no operator inside it has.
What is left of a step is Python: modules, schedule, engine, loop.
The profiler itself costs time, mostly where operators are small;
its inflation of the step is printed.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ParamSpec, TypedDict, TypeVar

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.peers import Contestant
from benchmarks.results import write_results
from benchmarks.run import MAKERS, SHAPES

KINDS: dict[str, tuple[str, ...]] = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "attention": (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "GELU": ("aten::gelu", "aten::gelu_backward"),
    "norms": ("aten::native_layer_norm", "aten::native_layer_norm_backward"),
    "copies": ("aten::copy_", "aten::cat", "aten::clone", "aten::contiguous", "aten::_to_copy"),
    "residual sums, sums of gradients": ("aten::add", "aten::add_"),
    "gradients of biases": ("aten::sum",),
    "loss": (
        *(
            "aten::_log_softmax",
            "aten::_log_softmax_backward_data",
            "aten::nll_loss_forward",
            "aten::nll_loss_backward",
            "aten::nll_loss_nd",
        ),
        *("aten::gather", "aten::exp_", "aten::_index_put_impl_"),
    ),
    "zeros": ("aten::fill_", "aten::zero_", "aten::zeros", "aten::zeros_like"),
    "AdamW": ("aten::_fused_adamw_",),
    "norm and clipping of gradients": (
        "aten::linalg_vector_norm",
        "aten::_foreach_norm",
        "aten::mul_",
        "aten::_foreach_mul_",
        "aten::stack",
    ),
    "views and allocation": (
        *(
            "aten::view",
            "aten::t",
            "aten::transpose",
            "aten::as_strided",
            "aten::permute",
            "aten::reshape",
            "aten::expand",
            "aten::split",
            "aten::chunk",
        ),
        *(
            "aten::narrow",
            "aten::slice",
            "aten::select",
            "aten::unflatten",
            "aten::flatten",
            "aten::_unsafe_view",
            "aten::_reshape_alias",
            "aten::unbind",
        ),
        *(
            "aten::split_with_sizes",
            "aten::detach",
            "detach",
            "aten::alias",
            "aten::empty",
            "aten::empty_like",
            "aten::empty_strided",
            "aten::new_empty",
        ),
        *("aten::resize_", "aten::unsafe_split"),
    ),
    "dispatch of linear layers and attention": (
        "aten::linear",
        "aten::matmul",
        "aten::scaled_dot_product_attention",
        "aten::layer_norm",
    ),
}
PREFIXES: dict[str, tuple[str, ...]] = {
    "fused kernels of the compiler": ("## Call CompiledFxGraph",),
    "guards and calls of compiled code": (
        "TorchDynamo",
        "Torch-Compiled",
        "CompiledFunction",
        "AOTDispatcher",
        "Pregraph",
    ),
    "AdamW": ("Optimizer.step#",),
    "autograd engine": ("autograd::", "torch::autograd::"),
}
PYTHON = {
    "fathom:step": "Python: loop and engine",
    "fathom:schedule": "Python: schedule and modules",
    "fathom:apply": "Python: DeepSpeed's step",
}
OTHER = "other operators"


def kind_of(name: str) -> str:
    """Which row of the table an event of the profiler belongs to."""
    if name in PYTHON:
        return PYTHON[name]
    for kind, names in KINDS.items():
        if name in names:
            return kind
    for kind, prefixes in PREFIXES.items():
        if name.startswith(prefixes):
            return kind
    return "autograd engine" if "Backward" in name and not name.startswith("aten::") else OTHER


P = ParamSpec("P")
T = TypeVar("T")


class Profiled(TypedDict):
    """Where the time of one contestant's step went."""

    plain_s: float
    """Of a step without the profiler."""
    profiled_s: float
    seconds: dict[str, float]
    """By kind, of the profiled step."""
    calls: dict[str, int]
    others: dict[str, float]
    """Seconds of what has no kind, by name."""


def labelled(action: Callable[P, T], label: str) -> Callable[P, T]:
    """The action, under a name in the profile."""

    @functools.wraps(action)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with record_function(label):
            return action(*args, **kwargs)

    return run


def measure(contestant: Contestant, tokens: torch.Tensor, repeats: int) -> Profiled:
    """Seconds per step by kind, the same under the profiler as a whole, and without it.

    The first step warms up.
    """
    contestant.step(tokens)
    plain = []
    for _ in range(repeats):
        begin = time.perf_counter()
        contestant.step(tokens)
        plain.append(time.perf_counter() - begin)
    engine = getattr(contestant, "engine", None)
    if engine is not None and hasattr(engine, "_apply"):
        engine._run, engine._apply = (
            labelled(engine._run, "fathom:schedule"),
            labelled(engine._apply, "fathom:apply"),
        )
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        begin = time.perf_counter()
        labelled(contestant.step, "fathom:step")(tokens)
        profiled = time.perf_counter() - begin
    seconds: defaultdict[str, float] = defaultdict(float)
    calls: defaultdict[str, int] = defaultdict(int)
    others: dict[str, float] = {}
    for event in trace.key_averages():
        kind = kind_of(event.key)
        seconds[kind] += event.self_cpu_time_total / 1e6
        calls[kind] += event.count
        if kind == OTHER:
            others[event.key] = event.self_cpu_time_total / 1e6
    return {
        "plain_s": statistics.median(plain),
        "profiled_s": profiled,
        "seconds": dict(seconds),
        "calls": dict(calls),
        "others": others,
    }


def named_share(result: Profiled) -> float:
    """Part of the profiled step that rows with a name account for."""
    return float(
        sum(seconds for kind, seconds in result["seconds"].items() if kind != OTHER) / result["profiled_s"]
    )


def table(title: str, results: Mapping[str, Profiled]) -> Table:
    """Milliseconds and calls by kind, a pair of columns a contestant, and their totals."""
    out = Table(title=title, title_justify="left")
    out.add_column("")
    for name in results:
        out.add_column(f"{name}, ms", justify="right")
        out.add_column("calls", justify="right")
        out.add_column("share", justify="right")
    last = list(results.values())[-1]
    kinds = sorted(
        {kind for result in results.values() for kind in result["seconds"]},
        key=lambda kind: (kind == OTHER, -last["seconds"].get(kind, 0.0)),
    )
    for kind in kinds:
        cells = []
        for result in results.values():
            own = result["seconds"].get(kind, 0.0)
            cells += [
                f"{1e3 * own:,.0f}",
                f"{result['calls'].get(kind, 0):,}",
                f"{own / result['profiled_s']:.1%}",
            ]
        out.add_row(kind, *cells)
    out.add_section()
    profiled = [result["profiled_s"] for result in results.values()]
    plain = [result["plain_s"] for result in results.values()]
    for label, values in (("profiled step", profiled), ("step without the profiler", plain)):
        out.add_row(label, *(cell for value in values for cell in (f"{1e3 * value:,.0f}", "", "")))
    out.add_row(
        "accounted for by name",
        *(cell for result in results.values() for cell in ("", "", f"{named_share(result):.1%}")),
    )
    return out


def main(
    shape: str = typer.Option("1000x64", help=f"One of {', '.join(SHAPES)}."),
    contestants: str = typer.Option("bare,fathom", help=f"Some of {', '.join(MAKERS)}."),
    repeats: int = typer.Option(3, min=1, help="Steps without the profiler."),
    out: Path | None = typer.Option(None, help="File for the JSON."),
) -> None:
    """Measure and print."""
    from parallel.launch.one_process import single_process

    single_process()
    torch.set_num_threads(1)
    chosen = SHAPES[shape]
    results = {
        name: measure(MAKERS[name](chosen), chosen.sample(), repeats) for name in contestants.split(",")
    }
    Console(width=140).print(table(f"One step of {shape}", results))
    if out is not None:
        write_results(out, {"shape": shape, "results": results})


if __name__ == "__main__":
    typer.run(main)

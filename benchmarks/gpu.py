"""`make bench-gpu`: how fast one GPU trains models of 1.5 billion parameters.

They are shallow to very deep, in bf16 and FP8, eager and by CUDA graphs.
Each measurement is a process of its own, so that nothing of one stays in another's memory.
What does not fit is tried again with half the micro-batch.
Launch-time share: the part of a step in which the GPU runs nothing because the host has not
launched it yet, 1 - busy / step.
Busy time is the union of all kernels of one profiled step.
The step's duration is the median of steps without the profiler, which would slow the host down.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.results import RESULTS, write_results
from pretrain.config.load import load_config
from pretrain.config.schema import RunConfig

ROOT = Path(__file__).resolve().parent.parent
SEQ = 1024
WARM_UP = 5
OUT_OF_MEMORY, FAILED = 3, 4
"""Exit codes of a case's process."""
DEPTHS = (24, 48, 96, 192, 384, 1000)
COMPILED = ("deep_24", "deep_1000")
JOINED = ("gpt2_xl", "deep_24", "deep_384", "deep_1000")
"""Models that kernels of our own are measured on: joins, and with `local` all of them."""
FUSED = ("gpt2_xl", "deep_1000")
"""Models whose gradients are measured as products, and joined passes, that add to their sums.

And those with activations inside of products.
"""
FILES = {"gpt2_xl": "configs/gpt2_xl.yaml"} | {
    f"deep_{depth}": f"configs/deep_1p5b_{depth}_layers.yaml" for depth in DEPTHS
}


@dataclass(frozen=True)
class Case:
    """One measurement."""

    model: str
    """A key of FILES."""
    kernels: str
    """As train.kernels."""
    recipe: str
    """As train.fp8.recipe."""
    micro: int
    """Samples of a micro-batch."""
    accumulation: int
    """Micro-batches of a step."""
    graph: bool = False
    """As train.cuda_graph."""
    compiled: bool = False
    """As train.compile."""
    losses: str = "local"
    """As train.loss_kernel."""
    fused: bool = False
    """As train.gradient_accumulation_fusion."""
    inside: bool = False
    """As train.activation_in_product."""

    @property
    def precision(self) -> str:
        """Format of the matrix products."""
        return "bf16" if self.recipe == "none" else "fp8"

    @property
    def label(self) -> str:
        """Model, kernels, recipe, and how steps are launched."""
        how = ["compiled"] * self.compiled + ["graph" if self.graph else "eager"]
        how += [f"losses by {self.losses}"] * (self.losses != "local")
        how += ["sums in products"] * self.fused + ["activations in products"] * self.inside
        return (
            f"{self.model} {self.kernels} "
            f"{self.precision if self.recipe == 'none' else self.recipe} {' '.join(how)}"
        )

    def config(self) -> RunConfig:
        """The run of this case. Raises UserError for a case that cannot be configured."""
        return load_config(
            ROOT / FILES[self.model],
            [
                "name=benchmark",
                f"data.seq_length={SEQ}",
                f"model.max_position_embeddings={SEQ}",
                "parallel.recompute.granularity=none",
                f"train.micro_batch_size={self.micro}",
                f"train.global_batch_size={self.micro * self.accumulation}",
                "train.precision=bf16",
                f"train.kernels={self.kernels}",
                f"train.fp8.recipe={self.recipe}",
                f"train.cuda_graph={str(self.graph).lower()}",
                f"train.compile={str(self.compiled).lower()}",
                f"train.loss_kernel={self.losses}",
                f"train.gradient_accumulation_fusion={str(self.fused).lower()}",
                f"train.activation_in_product={str(self.inside).lower()}",
            ],
        )


def busy_seconds(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, end) intervals in microseconds, in seconds."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e6


def gpu_intervals(profile: torch.profiler.profile) -> list[tuple[float, float]]:
    """(start, end) in microseconds of everything a profiled GPU ran.

    Annotations are left out: they span idle time too.
    """
    from torch.autograd import DeviceType

    events = (
        event
        for event in profile.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    )
    return [(event.time_range.start, event.time_range.end) for event in events]


def measure(case: Case, steps: int) -> dict[str, object]:
    """One case in this process, on the current GPU."""
    from parallel.launch.one_process import single_process
    from pretrain.data.samples import next_tokens
    from pretrain.tasks.causal_lm import CAUSAL_LM
    from pretrain.train.build import build_engine
    from pretrain.train.steps import training_step

    config = case.config()
    begin = time.perf_counter()
    engine = build_engine(config, single_process())
    build = time.perf_counter() - begin
    batches = [next_tokens(tokens) for tokens in random_batches(case, config.model.vocab_size or 0)]
    engine.set_lr(1e-5)

    def step() -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        result = engine.train_step(training_step(CAUSAL_LM), lambda: iter(batches), len(batches))
        torch.cuda.synchronize()
        if not result.applied:
            raise RuntimeError(f"a step was skipped: loss {result.loss}, gradient norm {result.grad_norm}")
        return time.perf_counter() - begin

    captures = []
    for number in range(WARM_UP):
        step()
        if number == 0:  # a replay allocates nothing: the peak of a graph is that of its capture
            torch.cuda.reset_peak_memory_stats()
        captures += [engine.graph.capture_s] if engine.graph is not None else []
    gc.collect()
    seconds = [step() for _ in range(steps)]
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
    busy = busy_seconds(gpu_intervals(profile))
    return report(case, config, Measured(build, captures, seconds, busy, allocated, reserved))


def random_batches(case: Case, vocab: int) -> list[torch.Tensor]:
    """The micro-batches of a step [micro, SEQ + 1], of random token ids, on the GPU."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    return [
        torch.randint(0, vocab, (case.micro, SEQ + 1), device="cuda", generator=generator)
        for _ in range(case.accumulation)
    ]


@dataclass(frozen=True)
class Measured:
    """What was measured of a case."""

    build: float
    """Seconds."""
    captures: list[float | None]
    """Seconds of capturing a graph, after each step that warms up."""
    seconds: list[float]
    """Of every timed step."""
    busy: float
    """Seconds of a step in which the GPU ran something; 0 where none were seen."""
    allocated: int
    """Peak of a step in bytes."""
    reserved: int
    """Peak of a step in bytes."""


def report(case: Case, config: RunConfig, measured: Measured) -> dict[str, object]:
    """A case's row of the results."""
    from model.cost.flops import flops_per_token
    from model.parameters.size import parameter_count
    from parallel.hardware.gpus import mfu

    median, tokens = statistics.median(measured.seconds), case.micro * case.accumulation * SEQ
    flops = flops_per_token(config.model, SEQ).model
    gpu = torch.cuda.get_device_name()
    return asdict(case) | {
        "label": case.label,
        "parameters": parameter_count(config.model)["total"],
        "layers": config.model.num_layers,
        "hidden": config.model.hidden_size,
        "gpu": gpu,
        "build_s": measured.build,
        "capture_s": next((seconds for seconds in measured.captures if seconds is not None), None),
        "step_s": median,
        "steps_s": measured.seconds,
        "tokens_per_s": tokens / median,
        "tflops": tokens / median * flops / 1e12,
        "mfu": mfu(tokens / median, flops, gpu, precision=case.precision),
        "busy_s": measured.busy,
        "launch_share": max(0.0, 1 - measured.busy / median) if measured.busy else None,
        "memory_allocated_bytes": measured.allocated,
        "memory_reserved_bytes": measured.reserved,
    }


def worth(case: Case) -> int:
    """Where a case stands in the order of measurements.

    First what a run would use, last what that is compared with.
    """
    if case.compiled or case.kernels == "local":
        return 4
    if not case.graph:
        return 3
    return 2 if case.recipe != "none" else int(case.kernels.endswith("_joined") or case.fused)


def cases_for(
    models: Sequence[str],
    kernels: Sequence[str],
    recipes: Sequence[str],
    micro: int,
    accumulation: int,
    *,
    joined: bool = False,
    liger: bool = False,
) -> list[Case]:
    """The measurements of these models, the most valuable first (`worth`).

    GPT-2 XL comes with all kinds of kernels and recipes, the first recipe also eager.
    The family by depth comes with the last kind, to see depth and launches only.
    Compiled layers of PyTorch's kernels come at both ends of the family.
    joined: there is Triton for kernels of our own. liger: there is Liger-Kernel for losses, which
    GPT-2 XL is measured with beside its eager steps.
    """
    cases = []
    for model in models:
        family = model.startswith("deep_")
        for kind in kernels[-1:] if family else kernels:
            cases += [Case(model, kind, "none", micro, accumulation, graph) for graph in (False, True)]
        if model in COMPILED and "local" in kernels:
            cases.append(Case(model, "local", "none", micro, accumulation, graph=True, compiled=True))
        if model in JOINED and joined:
            for kind in dict.fromkeys((kernels[-1], "local")):
                cases.append(Case(model, f"{kind}_joined", "none", micro, accumulation, graph=True))
        if model in FUSED:
            for kind in (kernels[-1], *["local_joined"] * joined):
                cases.append(Case(model, kind, "none", micro, accumulation, graph=True, fused=True))
            if joined:
                cases.append(replace(cases[-1], inside=True))
        if liger and not family:
            cases.append(Case(model, kernels[-1], "none", micro, accumulation, losses="liger"))
        if recipes and not family:
            cases.append(Case(model, "te", recipes[0], micro, accumulation))
        cases += [
            Case(model, "te", recipe, micro, accumulation, graph=True)
            for recipe in (recipes[:1] if family else recipes)
        ]
    return sorted(cases, key=worth)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether want of GPU memory lies behind an error.

    Libraries and graphs have words of their own for it.
    """
    while error is not None:
        if (
            isinstance(error, torch.OutOfMemoryError)
            or "out of memory" in str(error).lower()
            or "ALLOC_FAILED" in str(error)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def run_case(case: Case, steps: int) -> dict[str, object]:
    """A case in a process of its own.

    As often as memory runs out, it is tried with half the micro-batch and twice the accumulation.
    """
    micro, accumulation = case.micro, case.accumulation
    while micro:
        fitting = replace(case, micro=micro, accumulation=accumulation)
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "--only",
            json.dumps(asdict(fitting)),
            "--steps",
            str(steps),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return json.loads(done.stdout.strip().splitlines()[-1])
        if done.returncode != OUT_OF_MEMORY:
            lines = (
                done.stdout.strip().splitlines()
                if done.returncode == FAILED
                else done.stderr.strip().splitlines()
            )
            return asdict(fitting) | {"label": case.label, "error": (lines or ["no message"])[-1]}
        micro, accumulation = micro // 2, accumulation * 2
    return asdict(case) | {"label": case.label, "error": "out of memory with one sample"}


def share_of(value: float | None, digits: int) -> str:
    """A share in per cent, or that it is unknown."""
    return "unknown" if value is None else f"{100 * value:.{digits}f} %"


def table(results: Sequence[dict[str, Any]]) -> Table:
    """What is printed."""
    out = Table(
        title=(
            f"One GPU, sequences of {SEQ}, no recomputation; "
            "MFU against the dense peak of the format of the matrix products"
        )
    )
    columns = (
        "case",
        "parameters",
        "micro-batch",
        "step",
        "tokens/s",
        "TFLOP/s",
        "MFU",
        "peak memory",
        "launch-time share",
    )
    for column in columns:
        out.add_column(column, justify="left" if column == "case" else "right")
    for row in results:
        if "error" in row:
            out.add_row(row["label"], "", str(row["micro"]), row["error"])
            continue
        share = share_of(row["mfu"], 1)
        memory = f"{row['memory_allocated_bytes'] / 2**30:.1f} GiB"
        numbers = (
            f"{row['step_s']:.3f} s",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['tflops']:.1f}",
            share,
            memory,
            share_of(row["launch_share"], 0),
        )
        out.add_row(row["label"], f"{row['parameters'] / 1e9:.2f} B", str(row["micro"]), *numbers)
    return out


def main(
    models: str = typer.Option(",".join(FILES), help="Models to measure, by name."),
    micro: int = typer.Option(8, min=1, help="Samples of a micro-batch; halved where memory runs out."),
    accumulation: int = typer.Option(4, min=1, help="Micro-batches of a step."),
    steps: int = typer.Option(10, min=2, help="Timed steps."),
    minutes: float = typer.Option(6, min=0, help="No measurement begins later than so many minutes."),
    out: Path = typer.Option(RESULTS, help="Folder for the JSON."),
    only: str = typer.Option("", hidden=True, help="One case as JSON, measured in this process."),
) -> None:
    """Measure and print."""
    if not torch.cuda.is_available():
        print(
            "benchmarks.gpu: this machine has no CUDA GPU that PyTorch can use, and these measurements "
            "are about nothing else (`fathom doctor` says more)",
            file=sys.stderr,
        )
        sys.exit(2)
    if only:
        try:
            print(json.dumps(measure(Case(**json.loads(only)), steps)))
        except Exception as error:
            traceback.print_exc()
            print(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            sys.exit(OUT_OF_MEMORY if out_of_memory(error) else FAILED)
        return
    from parallel.hardware.precision import this_machine
    from parallel.hardware.versions import installed

    machine, console = this_machine(), Console()
    unknown = [name for name in models.split(",") if name not in FILES]
    if unknown:
        sys.exit(f"benchmarks.gpu: unknown model {unknown[0]}; known: {', '.join(FILES)}")
    kernels = ["local", "te"] if machine.te else ["local"]
    path = out / (
        f"gpu-{(machine.gpu or 'unknown').lower().replace(' ', '-')}"
        f"-{datetime.now(timezone.utc):%Y-%m-%d}.json"
    )
    # Cases that an earlier start of today has measured stay,
    # so that a few models at a time make one file.
    results: dict[str, dict[str, Any]] = (
        {row["label"]: row for row in json.loads(path.read_text())["results"]} if path.is_file() else {}
    )
    joined, start = machine.triton is not None, time.monotonic()
    liger = installed("liger-kernel") is not None
    if not liger:
        console.print("losses by liger are not measured: liger-kernel is not installed")
    cases = cases_for(
        models.split(","), kernels, machine.recipes(), micro, accumulation, joined=joined, liger=liger
    )
    for number, case in enumerate(cases):
        if time.monotonic() - start > 60 * minutes:
            left = ", ".join(case.label for case in cases[number:])
            console.print(f"{minutes:g} minutes are over; not measured (--minutes): {left}")
            break
        row = results[case.label] = run_case(case, steps)
        console.print(f"{case.label}: {row.get('error') or format(row['tflops'], '.1f') + ' TFLOP/s'}")
        write_results(path, {**asdict(machine), "results": list(results.values())})
    console.print(table(list(results.values())))
    console.print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)

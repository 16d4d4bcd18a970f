"""`fathom plan --count`: the operators of one layer of each kind, as a run would start them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict

from rich.console import Console
from rich.table import Table

from model.errors import UserError
from model.words import written

if TYPE_CHECKING:
    from pretrain.config.schema import RunConfig
    from pretrain.plan.counted import LayerKind, Way

PHASES = ("forward", "backward", "accumulate")


class Kind(TypedDict):
    """Layers with the same operators."""

    stack: str
    layers: str
    """Their numbers, from 1 in the whole model."""
    operators: dict[str, dict[str, int]]
    """By kind: operators of each phase, kernels, and bytes read and written."""
    host_operators: int
    kernels: int
    moved: int
    """Bytes beside those of products, attention and messages, and of sums of gradients."""
    kept: int
    """Bytes that the forward pass keeps for the backward pass."""
    flops: int
    """Of products and attention over the full square, forward and backward."""


class Count(TypedDict):
    """The whole answer, of one micro-batch on one rank."""

    scheme: str
    precision: str
    samples: int
    seq_length: int
    tensor: int
    recompute: str
    joined: bool
    """With `train.kernels: local_joined`."""
    kinds: list[Kind]


def count(path: str, overrides: list[str]) -> Count:
    """Counts the layers of a configuration.

    Raises UserError for a configuration that is none, for kernels that run on GPUs only, and for a
    layout that no run can have.
    """
    from pretrain.config.load import load_config
    from pretrain.data.manifest import sized_model
    from pretrain.plan.counted import layer_kinds
    from pretrain.train.checks.feasibility import fit_configuration

    config = load_config(path, overrides)
    model = sized_model(config)
    parallel, train = config.parallel, config.train
    for key, given, counted in (
        ("train.kernels", train.kernels, ("auto", "local_joined", "local")),
        ("train.fp8.recipe", train.fp8.recipe, ("none",)),
        ("train.compile", train.compile, (False,)),
        ("parallel.context", parallel.context, (1,)),
    ):
        if given not in counted:
            raise UserError(
                f"--count counts layers of PyTorch's kernels as they are, not with {key}={written(given)}: "
                f"set {key}={written(counted[-1])}"
            )
    fit_configuration(config.model_copy(update={"model": model}))
    precision: Literal["fp32", "bf16"] = "fp32" if train.precision == "fp32" else "bf16"
    way = _way(config, precision)
    sized = model.model_copy(update={"vocab_size": model.vocab_size or 1})  # no layer depends on it
    return {
        "scheme": model.scheme,
        "precision": precision,
        "samples": way.samples,
        "seq_length": way.seq_length,
        "tensor": way.tensor,
        "recompute": parallel.recompute.granularity,
        "joined": way.joined,
        "kinds": [_shown(kind) for kind in layer_kinds(sized, way)],
    }


def _way(config: RunConfig, precision: Literal["fp32", "bf16"]) -> Way:
    """How a run of the configuration computes its layers."""
    from pretrain.plan.counted import Way

    parallel, train = config.parallel, config.train
    return Way(
        config.data.seq_length,
        config.data.source_length,
        train.micro_batch_size,
        element=4 if precision == "fp32" else 2,
        fp32_stream=train.fp32_residual,
        selective=parallel.recompute.granularity == "selective",
        documents=config.hides_documents,
        tensor=parallel.tensor,
        sequence_parallel=parallel.sequence_parallel,
        joined=train.kernels == "local_joined",
        alone=parallel.recompute.granularity == "full",
        fused_sums=train.gradient_accumulation_fusion,
        fused_residual=train.residual_in_product,
        fused_activation=train.activation_in_product,
    )


def _shown(kind: LayerKind) -> Kind:
    """A kind of layer as it is printed."""
    from model.cost.operators import table

    own = kind.counted
    return {
        "stack": kind.stack,
        "layers": _spans(kind.layers),
        "operators": table(own.operators),
        "host_operators": len(own.operators),
        "kernels": sum(one.kernels for one in own.operators),
        "moved": own.moved("forward") + own.moved("backward"),
        "kept": own.kept,
        "flops": sum(one.flops for one in own.operators),
    }


def show(report: Count, console: Console) -> None:
    """Prints one table a kind of layer."""
    console.print(
        f"One layer of {report['scheme']}, {report['precision']}, {report['samples']} x "
        f"{report['seq_length']} tokens, tensor-parallel size {report['tensor']}, "
        f"PyTorch's kernels for GPUs{' and our own' if report['joined'] else ''}"
    )
    if report["recompute"] == "full":
        console.print("Recomputation runs the forward pass once more.")
    for kind in report["kinds"]:
        table = Table(title=f"{kind['stack']}, layers {kind['layers']}", title_justify="left")
        for name in ("", *PHASES, "kernels", "MiB read", "MiB written"):
            table.add_column(name, justify="right" if name else "left")
        for name, row in kind["operators"].items():
            numbers = [str(row[column] or "") for column in (*PHASES, "kernels")]
            table.add_row(name, *numbers, *(f"{row[word] / 2**20:,.1f}" for word in ("read", "written")))
        table.add_section()
        rows = kind["operators"].values()
        totals = [str(sum(row[column] for row in rows)) for column in (*PHASES, "kernels")]
        both = (f"{sum(row[word] for row in rows) / 2**20:,.1f}" for word in ("read", "written"))
        table.add_row("all", *totals, *both)
        console.print()
        console.print(table)
        console.print(
            f"{kind['host_operators']} operators for the host; element-wise work moves "
            f"{kind['moved'] / 2**20:,.1f} MiB; {kind['kept'] / 2**20:,.1f} MiB kept for the backward "
            f"pass; {kind['flops'] / 1e9:,.1f} GFLOP"
        )


def _spans(numbers: tuple[int, ...]) -> str:
    """Numbers as `1-3, 5`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)

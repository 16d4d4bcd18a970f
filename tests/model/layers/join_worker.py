"""Joins with norms by Triton's interpreter: what they compute, written to a file.

A process of its own: TRITON_INTERPRET has to be in the environment before Triton is imported.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor

from model.cost.operators import Kept
from model.depth.schemes import SCHEMES
from model.layers import launching
from model.layers.activated import activate_at_once, activate_in_products
from model.layers.activation_pass import activation_pass
from model.layers.heads_pass import separate_pass
from model.layers.join_pass import join_norm
from model.layers.joined import After, Numbers, join_norms
from model.layers.normed import norm_at_once
from model.layers.normed_pass import normed_pass
from model.layers.product_pass import feed_pass
from model.layers.products import sum_in_products
from model.layers.separated import separate_at_once
from model.network.language_model import LanguageModel
from tests.model.cost.test_activations import LLAMA
from tests.model.layers import activation_worker, heads_worker, normed_worker, product_worker
from tests.model.narrow import narrow, open_gates, tokens
from tests.reference.join import Join

NAMES = ("residual", "branch", "bias", "skip", "weight", "shift", "gate")
TERMS = {
    "pre-norm": ("residual", "weight", "shift"),
    "RMSNorm": ("residual", "weight"),
    "B2T": ("residual", "skip", "weight", "shift"),
    "SpanNorm": ("skip", "weight", "shift"),
    "bias": ("residual", "bias", "weight"),
    "all": ("residual", "bias", "skip", "weight", "shift"),
    "no norm": ("residual", "bias", "skip"),
    "gate": ("residual", "weight", "shift", "gate"),
    "gate alone": ("residual", "gate"),
}
FORMATS = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
ROWS, ODD = (5, 3), (40, 100, 257)
"""Rows that no tile divides, and widths."""
SHARE = 0.75
"""Of the branch, as while it warms up."""


def joins_and_gradients(
    terms: tuple[str, ...],
    width: int,
    dtype: torch.dtype,
    stream: torch.dtype | None = None,
    device: str = "cpu",
    rows: tuple[int, ...] = ROWS,
    **numbers: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    """What the kernels and the reference give: both results, then the gradient of every tensor.

    stream: format of what is not a branch or a weight.
    """
    torch.manual_seed(width)
    own = Numbers(-1.0, 0.5, 1.0, eps=2.0**-8, out_scale=0.75, centred="shift" in terms)._replace(**numbers)
    given: list[Tensor | None] = []
    for name in NAMES:
        shape = (*rows, width) if name in ("residual", "branch", "skip") else (width,)
        shape = (1,) if name == "gate" else shape
        wide = stream if name in ("residual", "skip") else None
        there = name == "branch" or name in terms
        value = torch.randn(shape, dtype=torch.float64).to(device, wide or dtype)
        given.append(value.requires_grad_() if there else None)
    residual, branch, bias, skip, *after = given
    assert branch is not None
    share = torch.tensor(SHARE, dtype=dtype, device=device) if "bias" in terms else None
    results = join_norm(residual, branch, bias, skip, share, After(*after), own)
    made = [x for x in results if x is not None]
    # A gate's gradient is one sum, of which terms that cancel would leave little.
    weights = [torch.randn_like(x) + (x.detach() if "gate" in terms else 0) for x in made]
    torch.autograd.backward(made, weights)
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in given]
    residual, branch, bias, skip, *after = leaves
    assert branch is not None
    scale = float(own.branch_scale) * (1.0 if share is None else SHARE)
    scales = float(own.residual_scale), scale, float(own.skip_scale)
    norm = float(own.out_scale), float(own.eps), own.centred
    weight, shift, gate = after
    join = Join(residual, branch, bias, skip, weight, shift, gate, *scales, *norm)
    wanted = [x for x in join() if x is not None]
    if own.forked:
        wanted.append(wanted[1].clone())
    torch.autograd.backward(wanted, [weight.double() for weight in weights])
    ours = [x.detach() for x in made] + [x.grad for x in given if x is not None and x.grad is not None]
    theirs = [x.detach() for x in wanted] + [x.grad for x in leaves if x is not None and x.grad is not None]
    assert len(ours) == len(theirs) == len(made) + sum(x is not None for x in given)
    return ours, theirs


def error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference, each by the largest element of its tensor."""
    return max(
        float((own.double() - other).abs().max() / other.abs().max())
        for own, other in zip(ours, theirs, strict=True)
    )


def kernels() -> dict[str, float]:
    """Errors by case."""
    found = {}
    for number, (name, terms) in enumerate(TERMS.items()):
        for place, (label, dtype) in enumerate(FORMATS.items()):
            width = ODD[(number + place) % len(ODD)]
            found[f"{label} {name}"] = error(*joins_and_gradients(terms, width, dtype))
    wide: dict[str, Any] = {"stream": torch.float32, "narrow": torch.bfloat16}
    found["fp32 stream"] = error(*joins_and_gradients(TERMS["all"], 40, torch.bfloat16, **wide))
    one = joins_and_gradients(TERMS["pre-norm"], 40, torch.float64, residual_scale=1.0, branch_scale=1.0)
    found["fp64 one gradient for both"] = error(*one)
    twice = joins_and_gradients(TERMS["pre-norm"], 100, torch.float64, forked=True)
    found["fp64 a result for two readers"] = error(*twice)
    return found


def dropout() -> dict[str, Any]:
    """What is kept, and whether the backward pass knows."""
    share, shape = 0.25, (300, 100)
    branch = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    numbers = Numbers(1.0, 0.5, 0.0, dropout=share)
    masks: list[Tensor] = []
    same = True
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        branch.grad = None
        zeros = torch.zeros(shape, dtype=torch.float64)
        stream, *_ = join_norm(zeros, branch, None, None, None, After(), numbers)
        stream.backward(torch.full_like(stream, 3.0))
        assert branch.grad is not None
        masks.append(stream.detach())
        same = same and torch.equal(branch.grad, 3 * stream.detach())
    first = masks[0]
    kept = (first != 0).double()
    pairs = {
        "columns": (kept[:, 1:], kept[:, :-1]),
        "rows": (kept[1:], kept[:-1]),
        "fours": (kept[:, 4:], kept[:, :-4]),
    }
    return {
        "values": sorted(set(first.flatten().tolist())),
        "share": float(kept.mean()),
        "rows": [float(kept.mean(1).min()), float(kept.mean(1).max())],
        "neighbours": {
            name: float(((a - 1 + share) * (b - 1 + share)).mean()) for name, (a, b) in pairs.items()
        },
        "backward": same,
        "repeated": torch.equal(masks[0], masks[2]),
        "new": not torch.equal(masks[0], masks[1]),
    }


def measured(model: LanguageModel, *, added: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients. added: to sums that the layers' passes and products know."""
    model.zero_grad()
    if added:
        for parameter in model.parameters():
            parameter.grad = parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
        sum_in_products([model.decoder])  # Megatron-core's output projection adds no fp64
    torch.manual_seed(5)
    loss = model({"tokens": tokens(), "labels": tokens().roll(-1, 1)}).mean()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def models() -> dict[str, Any]:
    """Of every scheme, and of Llama's layers, in fp64: differences between apart and joined.

    And how many joins, and norms after activations, are computed so.
    """
    found = {}
    kinds = {scheme: narrow(scheme, 3) for scheme in SCHEMES}
    llama: dict[str, Any] = LLAMA
    kinds["llama"] = narrow("pre_ln", 3, **llama)
    kinds["llama, subln"] = narrow("subln", 3, **llama)
    for name, kind in kinds.items():
        model = kind.double()
        open_gates(model)
        loss, gradients = measured(model)
        joins = join_norms([model], join_norm)
        activate_at_once([model], activation_pass)
        norms = norm_at_once([model], normed_pass)
        separate_at_once([model], separate_pass)
        again, joined = measured(model)
        summed = measured(model, added=True)[1]
        fed = activate_in_products(model.decoder.layers, feed_pass)
        inside, added = measured(model, added=True)
        # Some are zero but for rounding, as a bias of keys'.
        least = 1e-3 * max(float(gradient.abs().max()) for gradient in gradients.values())
        worst = max(
            float((way[key] - gradient).abs().max()) / max(least, float(gradient.abs().max()))
            for key, gradient in gradients.items()
            for way in (joined, summed, added)
        )
        difference = max(float((other / loss - 1).abs()) for other in (again, inside))
        found[name] = {
            "joins": joins,
            "norms": norms,
            "fed": fed,
            "loss": difference,
            "gradients": worst,
        }
    return found


def dropped() -> dict[str, Any]:
    """A model with dropout: recomputation repeats it, and no mask is kept for the backward pass.

    Bytes that the backward pass has, of a forward pass apart and of one joined.
    """
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    found: dict[str, Any] = {}
    for name, core in {"plain": {}, "recomputed": full}.items():
        model = narrow("pre_ln", 3, core=core, hidden_dropout=0.1).double()
        for joined in (False, True):
            if joined:
                join_norms([model], join_norm)
            kept = Kept()
            with kept:
                loss, gradients = measured(model)
            found[f"{name} {'joined' if joined else 'apart'}"] = {
                "bytes": kept.bytes,
                "loss": float(loss),
                "norm": float(sum(gradient.square().sum() for gradient in gradients.values())),
            }
    return found


def main(output: str) -> None:
    """Everything, as JSON."""
    assert launching.programs(torch.device("cpu")) > 1
    with open(output, "w", encoding="utf-8") as file:
        json.dump(
            {
                "kernels": kernels(),
                "activations": activation_worker.errors(),
                "normed": normed_worker.errors(),
                "heads": heads_worker.errors(),
                "products": product_worker.errors(),
                "dropout": dropout(),
                "models": models(),
                "dropped": dropped(),
            },
            file,
        )


if __name__ == "__main__":
    main(sys.argv[1])

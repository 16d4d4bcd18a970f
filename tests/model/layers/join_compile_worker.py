"""Our kernels, compiled for a GPU that need not be there."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model.layers import (
    activation_kernel,
    heads_kernel,
    join_kernel,
    normed_kernel,
    parts_kernel,
    product_kernel,
)
from model.layers.launching import product_shape

HOPPER = GPUTarget("cuda", 90, 32)
PARTS = ("parts", "weight_parts", "shift_parts", "bias_parts", "gate_parts")
INTEGERS = ("n", "k", "h", "f", "programs", "batch", "groups", "per_group", "width", "turning")
NORM = {"weight", "shift", "normed", "means", "inverses", "d_normed", "weight_parts", "shift_parts"}
GATE = {"gate", "whole_stream", "gate_parts"}
BARE = {"bias", "skip", "share", "seed", "d_skip", "d_branch", "bias_parts"} | GATE


def compiled(function: Any, left_out: set[str], **flags: Any) -> Mapping[str, Any]:
    """One kernel in bf16 without these tensors: its code by language."""
    options = {name: flags.pop(name) for name in ("num_warps", "num_stages") if name in flags}
    kinds, values, attributes = {}, {}, {}
    for place, name in enumerate(function.arg_names):
        given = {"WIDE": tl.float32, "ROWS": 1, "BLOCK": 1024, **flags}
        if name in given or name in left_out:
            kinds[name], values[name] = "constexpr", given.get(name)
        elif name in INTEGERS or name.endswith(("_s", "_b", "_h")):
            kinds[name] = "i32"
        elif name.endswith("scale") or name in ("dropout", "eps"):
            kinds[name] = "fp32"
        else:
            numbers = {"means": "*fp32", "inverses": "*fp32", "seed": "*i64"} | dict.fromkeys(PARTS, "*fp32")
            kinds[name] = numbers.get(name, "*bf16")
            attributes[place,] = [["tt.divisibility", 16]]
    made = triton.compile(ASTSource(function, kinds, values, attributes), target=HOPPER, options=options)
    code: Mapping[str, Any] = made.asm
    return code


def main(output: str) -> None:
    """Sizes of the machine code, as JSON."""
    bare, narrow = NORM | GATE, torch.empty(0, dtype=torch.bfloat16, device="meta")
    cases: dict[str, tuple[Any, set[str], dict[str, Any]]] = {
        "forward": (join_kernel.forward, BARE, {"CENTRED": True}),
        "backward": (join_kernel.backward, BARE, {"CENTRED": True}),
        "forward, all": (join_kernel.forward, set(), {"CENTRED": True}),
        "backward, all": (join_kernel.backward, set(), {"CENTRED": True}),
        "forward, no norm": (join_kernel.forward, bare, {"CENTRED": False}),
        "backward, no norm": (join_kernel.backward, bare | {"stream", "bias_parts"}, {"CENTRED": False}),
    }
    for gated in (False, True):
        flags = {"KIND": "gelu", "GATED": gated, "ROWS": 8, "BLOCK": 256}
        cases[f"activation forward, {gated}"] = (activation_kernel.forward, set(), flags)
        cases[f"activation backward, {gated}"] = (activation_kernel.backward, set(), flags)
        inside = {"KIND": "gelu", "GATED": gated, **product_shape(narrow, gated=gated)}
        cases[f"product forward, {gated}"] = (product_kernel.forward, set(), inside)
        cases[f"product backward, {gated}"] = (product_kernel.backward, set(), inside)
        flags |= {"CENTRED": gated, "ROWS": 1, "BLOCK": 2048}
        out = set() if gated else {"shift", "means", "shift_parts", "bias_parts"}
        cases[f"activation and norm forward, {gated}"] = (normed_kernel.forward, out, flags)
        cases[f"activation and norm backward, {gated}"] = (normed_kernel.backward, out, flags)
    tile = {"ROWS": 8, "BLOCK": 256}
    cases["heads forward"] = (heads_kernel.forward, set(), tile)
    cases["heads backward"] = (heads_kernel.backward, set(), tile)
    cases["sums of parts"] = (parts_kernel.total, {"third"}, {"ADDED": True, "ROWS": 64, "BLOCK": 64})
    found = {
        name: len(compiled(kernel, out, **flags)["cubin"]) for name, (kernel, out, flags) in cases.items()
    }
    with open(output, "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1])

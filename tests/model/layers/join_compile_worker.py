"""The kernels of joins with norms, compiled for a GPU that need not be there."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model.layers import join_kernel

HOPPER = GPUTarget("cuda", 90, 32)
NORM = {"weight", "shift", "normed", "means", "inverses", "d_normed", "sums"}
BARE = {"bias", "skip", "share", "seed", "d_skip", "d_branch"}


def compiled(function: Any, left_out: set[str], **flags: Any) -> Mapping[str, Any]:
    """One kernel in bf16 without these tensors: its code by language."""
    kinds, values, attributes = {}, {}, {}
    for place, name in enumerate(function.arg_names):
        given = {"WIDE": tl.float32, "ROWS": 1, "BLOCK": 1024, **flags}
        if name in given or name in left_out:
            kinds[name], values[name] = "constexpr", given.get(name)
        elif name in ("n", "h"):
            kinds[name] = "i32"
        elif name.endswith("scale") or name in ("dropout", "eps"):
            kinds[name] = "fp32"
        else:
            numbers = {"means": "*fp32", "inverses": "*fp32", "sums": "*fp32", "seed": "*i64"}
            kinds[name] = numbers.get(name, "*bf16")
            attributes[place,] = [["tt.divisibility", 16]]
    made = triton.compile(ASTSource(function, kinds, values, attributes), target=HOPPER)
    code: Mapping[str, Any] = made.asm
    return code


def main(output: str) -> None:
    """Sizes of the machine code, as JSON."""
    cases = {
        "forward": (join_kernel.forward, BARE, {"CENTRED": True}),
        "backward": (join_kernel.backward, BARE, {"CENTRED": True, "BIAS": False}),
        "forward, all": (join_kernel.forward, set(), {"CENTRED": True}),
        "backward, all": (join_kernel.backward, set(), {"CENTRED": True, "BIAS": True}),
        "forward, no norm": (join_kernel.forward, NORM, {"CENTRED": False}),
        "backward, no norm": (join_kernel.backward, NORM | {"stream"}, {"CENTRED": False, "BIAS": False}),
    }
    found = {
        name: len(compiled(kernel, out, **flags)["cubin"]) for name, (kernel, out, flags) in cases.items()
    }
    with open(output, "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1])

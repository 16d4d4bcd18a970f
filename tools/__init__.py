"""The `fathom` command line: thin commands over importable functions."""

import importlib.util
import sys
from pathlib import Path

_OTHERS = [
    f"{name} ({spec.origin or next(iter(spec.submodule_search_locations or ()), '')})"
    for name in ("model", "parallel", "pretrain")
    if (spec := importlib.util.find_spec(name)) is not None
    and Path(spec.origin or "").resolve().parent.parent != Path(__file__).resolve().parent.parent
]
if _OTHERS:
    # Names this plain may be taken, by a PYTHONPATH or by another package in the same environment.
    print(
        f"fathom: error: Python finds other packages before Fathom's own: {', '.join(_OTHERS)}; "
        "take them out of PYTHONPATH, or give Fathom an environment of its own",
        file=sys.stderr,
    )
    sys.exit(2)

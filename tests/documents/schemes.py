"""Measures every scheme at initialisation and writes the table and pictures of docs/schemes.md.

python -m tests.documents.schemes
"""

from __future__ import annotations

import io
import math
import sys
import time
from pathlib import Path

from PIL import Image

from model.depth.schemes import SCHEMES
from model.files import atomic_write_bytes, atomic_write_text
from pretrain.probe.charts import save_picture
from pretrain.probe.records import Probe
from pretrain.probe.rules import trainable, verdict
from pretrain.probe.setup import Choices, probes

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT, IMAGES = ROOT / "docs" / "schemes.md", ROOT / "docs" / "images"
CONFIG = str(ROOT / "configs" / "quickstart.yaml")
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
PICTURED, DEEP, SEEDS = 48, 192, 3
VARIANTS = ("post_ln:rescale=true", "b2t:rescale=false", "deepscalelm_pre_ln:init.causal_correction=false")
HEADER = (
    f"| scheme | forward variance, {PICTURED} layers | late gradient, layer 1 / {PICTURED} "
    f"| forward variance, {DEEP} layers "
    f"| late gradient, layer 1 / {DEEP} | trainable at {DEEP}? |\n|---|---|---|---|---|---|"
)
COLOURS = 64


def measure(layers: int) -> dict[str, Probe]:
    """Every scheme with its defaults, and the variants, at one depth.

    In float64, so that no gradient is flushed to zero.
    """
    choices = Choices(
        layers=layers,
        seeds=SEEDS,
        tokens="synthetic",
        dtype="float64",
        compare=",".join([*SCHEMES, *VARIANTS]),
    )
    return {one.label: one for one in probes(CONFIG, ("model.init.unigram=false",), choices)}


def row(shallow: Probe, deep: Probe) -> str:
    """A line of the table."""
    cells = [
        cell
        for probe in (shallow, deep)
        for cell in (
            _range(probe.values("forward_variance")),
            _ratio(probe.layers[0].log10_grad_variance_late),
        )
    ]
    return f"| `{shallow.label}` | {' | '.join(cells)} | {trainable(deep)} |"


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def _ratio(log10: float) -> str:
    return f"{10**log10:.2g}" if log10 > -3 else f"10^{math.floor(log10 + 0.5)}"


def draw(probe: Probe) -> None:
    """The picture of one scheme, with a palette: a quarter of the bytes."""
    raw, small = io.BytesIO(), io.BytesIO()
    save_picture(
        [probe],
        raw,
        f"{probe.label}: {probe.num_layers} layers of width {probe.model.hidden_size}, at initialisation",
        verdict(probe),
        "png",
    )
    Image.open(raw).convert("RGB").quantize(COLOURS).save(small, "png", optimize=True)
    atomic_write_bytes(IMAGES / f"{probe.label}.png", small.getvalue())


def main() -> None:
    """Minutes on a small machine."""
    begin = time.monotonic()
    IMAGES.mkdir(exist_ok=True)
    shallow, deep = measure(PICTURED), measure(DEEP)
    for name in SCHEMES:
        draw(shallow[name])
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    table = "\n".join([HEADER, *(row(shallow[label], deep[label]) for label in shallow)])
    atomic_write_text(DOCUMENT, f"{before}{BEGIN}\n{table}\n{END}{after}")
    print(f"{DOCUMENT}: {len(shallow)} schemes in {time.monotonic() - begin:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()

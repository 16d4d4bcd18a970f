"""GPUs that `fathom plan` can plan for: what their data sheets say, and the shares of it that training reaches.

Speeds of matrix units come from `parallel/hardware/peaks.py`. Memory and bandwidths are the data sheets' for the SXM form in eight-GPU hosts with one 400 Gbit/s
network port per GPU (A100: 200 Gbit/s). The efficiencies are fitted to published runs, one number per kind of work and GPU: see docs/performance.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.errors import UserError
from parallel.hardware.peaks import peak_tflops


@dataclass(frozen=True)
class Accelerator:
    """One kind of GPU.

    device: the driver's name, the key to its peaks; memory: bytes; bandwidth: of its memory, link: of NVLink in one direction, network: of its port,
    all in bytes per second. matmul, attention: reached share of the peak in matrix products and in fused attention; fp8: matmul's share of the FP8 peak;
    fitted: whether these shares come from published runs on this GPU.
    """

    name: str
    device: str
    memory: float
    bandwidth: float
    link: float
    network: float
    matmul: float
    attention: float
    fp8: float = 0.0
    fitted: bool = True

    def peak(self, precision: str) -> float:
        """Operations per second in bf16, fp32 or fp8. Raises UserError for a format this GPU does not compute."""
        tflops = peak_tflops(self.device, precision)
        if tflops is None:
            raise UserError(
                f"--gpu {self.name} has no {precision}: plan with train.precision=bf16 and train.fp8.recipe=none, or for another GPU"
            )
        return tflops * 1e12


GIB = 2**30
ACCELERATORS = {
    one.name: one
    for one in (
        Accelerator("a100", "A100-SXM4-80GB", 80 * GIB, 2.04e12, 300e9, 25e9, matmul=0.76, attention=0.3),
        Accelerator(
            "h100", "H100 80GB HBM3", 80 * GIB, 3.35e12, 450e9, 50e9, matmul=0.54, attention=0.25, fp8=0.5
        ),
        Accelerator("h200", "H200", 141e9, 4.8e12, 450e9, 50e9, matmul=0.54, attention=0.25, fp8=0.5),
        Accelerator(
            "b200", "B200", 180e9, 7.7e12, 900e9, 50e9, matmul=0.54, attention=0.25, fp8=0.5, fitted=False
        ),
    )
}


def accelerator(name: str) -> Accelerator:
    """The GPU of that name, in any case. Raises UserError for one that is not in the table: a plan for a guessed machine would be worth nothing."""
    if name.lower() not in ACCELERATORS:
        raise UserError(
            f"--gpu {name} is not known: choose one of {', '.join(ACCELERATORS)}, or add it to parallel/hardware/accelerators.py"
        )
    return ACCELERATORS[name.lower()]

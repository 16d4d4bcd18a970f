"""Known GPUs have their data sheet's dense peak; everything else has none."""

from __future__ import annotations

import pytest

from parallel.hardware.gpus import GPUS, PLANNED, mfu, peak_tflops


@pytest.mark.parametrize(
    ("gpu", "bf16", "fp8"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, None),
        ("NVIDIA A100 80GB PCIe", 312, None),
        ("NVIDIA H100 80GB HBM3", 989, 1979),
        ("NVIDIA H100 PCIe", 756, 1513),
        ("NVIDIA H200", 989, 1979),
        ("NVIDIA H200 NVL", 835, 1671),
        ("NVIDIA GH200 480GB", 989, 1979),
        ("NVIDIA B200", 2250, 4500),
        ("NVIDIA GB200", 2500, 5000),
        ("NVIDIA L40S", 362, 733),
        ("NVIDIA L4", 121, 242),
        ("NVIDIA GeForce RTX 4090", 165, 330),
        ("Tesla V100-SXM2-32GB", None, None),
    ],
)
def test_known_gpus(gpu: str, bf16: float | None, fp8: float | None) -> None:
    assert peak_tflops(gpu) == bf16
    assert peak_tflops(gpu, "fp8") == fp8


@pytest.mark.parametrize(
    "gpu",
    [
        None,
        "",
        "cpu",
        "NVIDIA",
        "NVIDIA H100",  # some centres' custom part with fewer units
        "NVIDIA A100-SXM-64GB",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA H200 MIG 1g.18gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A10G",
        "NVIDIA X999",
    ],
)
def test_unknown_gpus_have_no_peak(gpu: str | None) -> None:
    assert peak_tflops(gpu) is None
    assert mfu(1e6, 1e9, gpu) is None


def test_precisions_keep_their_order() -> None:
    for speeds in (gpu.tflops for gpu in GPUS):
        assert speeds["fp32"] < speeds.get("bf16", speeds["fp16"]) < speeds.get("fp8", float("inf"))
    assert peak_tflops("NVIDIA H200", "fp4") is None
    for dtype, short in (("bfloat16", "bf16"), ("float16", "fp16"), ("float32", "fp32")):
        assert peak_tflops("NVIDIA H200", dtype) == peak_tflops("NVIDIA H200", short)


def test_mfu_is_a_share_of_all_gpus() -> None:
    assert mfu(1000.0, 312e9, "NVIDIA A100-SXM4-80GB") == pytest.approx(1.0)
    assert mfu(1000.0, 312e9, "NVIDIA A100-SXM4-80GB", count=4) == pytest.approx(0.25)
    assert mfu(1000.0, 19.5e9, "NVIDIA A100-SXM4-80GB", precision="fp32") == pytest.approx(1.0)
    with pytest.raises(ValueError, match="count=0"):
        mfu(1.0, 1.0, "NVIDIA H200", count=0)


def test_a_gpu_that_can_be_planned_for_has_all_that_a_plan_reads() -> None:
    assert set(PLANNED) == {"a100", "h100", "h200", "b200"}
    for gpu in PLANNED.values():
        for field in ("memory", "bandwidth", "link", "network", "matmul", "attention"):
            assert getattr(gpu, field) > 0, (gpu.name, field)
        assert ("fp8" in gpu.tflops) == (gpu.fp8 > 0), gpu.name

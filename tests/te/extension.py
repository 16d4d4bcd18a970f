"""A stand-in for `transformer_engine_torch`, Transformer Engine's compiled part.

It has its enumerations, and functions that say they are not there.

With it the Python part of Transformer Engine imports on any machine and its modules can be built.
Running one needs a kernel and raises RuntimeError.
"""

from __future__ import annotations

import enum
from typing import Any

OLDEST, NEWEST = "2.9.0", "2.20.2"
"""The releases of Transformer Engine whose names and values these are: the ends of its range."""
GONE = {"NVTE_F16_max512_seqlen"}
"""Names that the newest release has no more. It has more others, and no value has changed."""

OVERLAPS = """BULK_OVERLAP_AG BULK_OVERLAP_RS SPLIT_PIPELINED_AG_P2P SPLIT_PIPELINED_RS \
SPLIT_PIPELINED_RS_P2P ATOMIC_GEMM_RS ATOMIC_GEMM_AG_P2P
ATOMIC_GEMM_RS_P2P EXTERNAL_BULK_OVERLAP_AG"""
LAYOUTS = """SB3HD SBH3D SBHD_SB2HD SBHD_SBH2D SBHD_SBHD_SBHD BS3HD BSH3D BSHD_BS2HD BSHD_BSH2D \
BSHD_BSHD_BSHD T3HD TH3D THD_T2HD THD_TH2D THD_THD_THD
SBHD_BSHD_BSHD BSHD_SBHD_SBHD THD_BSHD_BSHD THD_SBHD_SBHD \
Paged_KV_BSHD_BSHD_BSHD Paged_KV_BSHD_SBHD_SBHD Paged_KV_SBHD_BSHD_BSHD
Paged_KV_SBHD_SBHD_SBHD Paged_KV_THD_BSHD_BSHD Paged_KV_THD_SBHD_SBHD BHSD_BHSD_BHSD QKV_Layout_NOT_SET"""
SCALINGS = "DELAYED_TENSOR_SCALING MXFP8_1D_SCALING BLOCK_SCALING_1D BLOCK_SCALING_2D NVFP4_1D_SCALING"
ENUMS: dict[str, tuple[tuple[str, int], ...]] = {
    "DType": (
        ("kByte", 0),
        ("kInt32", 2),
        ("kFloat32", 4),
        ("kFloat16", 5),
        ("kBFloat16", 6),
        ("kFloat8E4M3", 7),
        ("kFloat8E5M2", 8),
        ("kFloat4E2M1", 10),
    ),
    "FP8FwdTensors": tuple((f"GEMM{i // 3 + 1}_{('INPUT', 'WEIGHT', 'OUTPUT')[i % 3]}", i) for i in range(9)),
    "FP8BwdTensors": tuple((f"GRAD_{('OUTPUT', 'INPUT')[i % 2]}{i // 2 + 1}", i) for i in range(6)),
    "Float8BlockScaleTensorFormat": (("GEMM_READY", 0), ("COMPACT", 1), ("INVALID", 2)),
    "CommOverlapType": (("RS", 0), ("AG", 1)),
    "CommOverlapAlgo": tuple((name, i) for i, name in enumerate(OVERLAPS.split())),
    "NVTE_Bias_Type": tuple(
        (f"NVTE_{name}", i)
        for i, name in enumerate(("NO_BIAS", "PRE_SCALE_BIAS", "POST_SCALE_BIAS", "ALIBI"))
    ),
    "NVTE_Fused_Attn_Backend": (
        ("NVTE_F16_max512_seqlen", 0),
        ("NVTE_F16_arbitrary_seqlen", 1),
        ("NVTE_FP8", 2),
        ("NVTE_No_Backend", -1),
    ),
    "NVTE_Mask_Type": tuple(
        (f"NVTE_{name}_MASK", i)
        for i, name in enumerate(
            (
                "NO",
                "PADDING",
                "CAUSAL",
                "PADDING_CAUSAL",
                "CAUSAL_BOTTOM_RIGHT",
                "PADDING_CAUSAL_BOTTOM_RIGHT",
            )
        )
    ),
    "NVTE_QKV_Format": tuple(
        (f"NVTE_{name}", i)
        for i, name in enumerate(
            (
                "SBHD",
                "BSHD",
                "THD",
                "BSHD_2SBHD",
                "SBHD_2BSHD",
                "THD_2BSHD",
                "THD_2SBHD",
                "BHSD",
                "QKV_Format_NOT_SET",
            )
        )
    ),
    "NVTE_QKV_Layout": tuple((f"NVTE_{name}", i) for i, name in enumerate(LAYOUTS.split())),
    "NVTEScalingMode": (
        *((f"NVTE_{name}", i) for i, name in enumerate(SCALINGS.split())),
        ("NVTE_INVALID_SCALING", 100),
    ),
    "NVTERoutingMapFormat": (("BYTEMAP", 0), ("BITMAP_U8", 1)),
    "NVTEQBHistogramMode": (("TWO_KERNEL", 0), ("FUSED_ATOMIC", 1)),
    "NVTE_Softmax_Type": (
        ("NVTE_VANILLA_SOFTMAX", 0),
        ("NVTE_OFF_BY_ONE_SOFTMAX", 1),
        ("NVTE_LEARNABLE_SOFTMAX", 2),
    ),
}


def speak(version: str) -> None:
    """Takes on the enumerations of a release.

    The newest one compares some with its own at import.
    """
    gone = set() if version == OLDEST else GONE
    for name, members in ENUMS.items():
        kept = [member for member in members if member[0] not in gone]
        globals()[name] = enum.IntEnum(name, kept)  # type: ignore[misc]


class FP8TensorMeta:
    """A name for annotations."""


class CommOverlapCore(FP8TensorMeta):
    """A name for isinstance."""


CommOverlapBase = CommOverlapP2PBase = CommOverlapHelper = CommOverlap = CommOverlapP2P = CommOverlapCore


def get_cudnn_version() -> int:
    """A version that passes every check made while importing."""
    return 91900


def get_cublasLt_version() -> int:  # noqa: N802
    """A version that passes every check made while importing."""
    return 130100


def __getattr__(name: str) -> Any:
    """Every kernel: a function that raises RuntimeError when it is called."""
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"transformer_engine_torch.{name}: there are no kernels in the stand-in")

    return missing

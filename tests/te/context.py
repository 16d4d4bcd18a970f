"""Sequences that are cut, by Transformer Engine's layers. Runs inside ranks beside the stand-in."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path
from typing import Any

from tests.distributed import Group, rebuild, run_group
from tests.te.worker import SEQ, VOCAB, build, model_config

GROUPED = {"position": "rotary", "num_query_groups": 2}
NEAR = GROUPED | {"window": 2, "global_every": 3, "rotary_base_local": 9}
CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "documents": (True, {"scheme": "b2t"}),
    "documents, rotary, groups, swiglu, rmsnorm": (
        True,
        GROUPED | {"normalization": "rmsnorm", "activation": "swiglu", "bias": False},
    ),
    "documents, windows": (True, NEAR),
    "documents, soft caps": (True, GROUPED | {"attention": {"soft_cap": 0.5}}),
    "windows": (False, NEAR),
    "plain": (False, {"scheme": "spannorm"}),
}
"""Whether documents hide from each other, and the model."""
WORLDS = (4,)


def cut_model(model: Any, context: int, kinds: str, **core: Any) -> tuple[Any, Any]:
    """(model, topology) whose sequences are cut over so many ranks."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    from parallel.config import ParallelConfig

    TEDotProductAttention.cp_stream = "none"  # it would make one, which nothing here would use
    topology = rebuild(ParallelConfig(context=context), model)
    return build(model, topology, kinds, "cpu", **core), topology


def mean_gradients(kinds: str, context: int, documents: bool, fields: dict[str, Any]) -> dict[str, Any]:
    """Mean loss, as "loss", and its gradients by canonical name, in fp64; the same on all ranks."""
    import torch
    import torch.distributed as dist

    from model.parameters.names import named_parameters
    from model.weights.init import initialize_
    from pretrain.data.documents import document_parts
    from pretrain.train.steps import own_tokens
    from tests.te.standin import pretend_cuda

    model = model_config(**fields)
    chunk, topology = cut_model(model, context, kinds)
    chunk = chunk.double()
    named = list(named_parameters(chunk, 0, 1))
    initialize_(((one.name, one.parameter, one.shard) for one in named), model, SEQ, 1)
    tokens = torch.randint(0, VOCAB, (3, SEQ + 1), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
    if documents:  # every fourth token ends one
        batch |= document_parts(batch["tokens"] % 4, 0)
    with pretend_cuda("cpu"):
        loss = chunk(own_tokens(batch, topology)).mean()
    loss.backward()
    found = {one.name: one.parameter.grad for one in named} | {"loss": loss.detach().clone()}
    for value in found.values():
        dist.all_reduce(value)
        value.div_(dist.get_world_size())
    return found


def of_all(kinds: str, context: int) -> dict[str, Any]:
    """`mean_gradients` of all cases."""
    return {name: mean_gradients(kinds, context, *case) for name, case in CASES.items()}


def in_bf16() -> dict[str, str]:
    """What attends in 16 bits: ours where documents hide, else the ring, which is not there."""
    import torch

    found: dict[str, str] = {}
    chunk, _ = cut_model(model_config(), 2, "te", dtype=torch.bfloat16)
    attention = chunk.decoder.layers[0].self_attention.core_attention
    query, key, value = torch.randn(3, SEQ // 2, 1, 4, 8).bfloat16()
    mask = torch.zeros(1, 1, SEQ // 2, SEQ, dtype=torch.bool)
    for name, given in (("documents", mask), ("plain", None)):
        try:
            attention(query, key, value, given)
            found[name] = "ours"
        except RuntimeError as error:
            found[name] = str(error)
    return found


def compared() -> dict[str, Any]:
    """By world and case: the largest difference from one process with PyTorch's layers, relative.

    In the process that calls, nothing may have made process groups yet.
    """
    import torch

    cut = [Group(world, of_all, ("te", world)) for world in WORLDS]
    groups = [Group(1, of_all, ("local", 1)), *cut, Group(2, in_bf16)]
    answers: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        for index, group in enumerate(groups):
            good = run_group(Path(folder), index, group.world, group.function, group.args)
            assert good, f"{group.world} ranks failed"
            answers.append(pickle.loads((Path(folder) / f"result_{index}_0").read_bytes()))
    (one, *others), bf16 = answers[:-1], answers[-1]
    found: dict[str, Any] = {"bf16": bf16}
    for world, other in zip(WORLDS, others, strict=True):
        for name, expected in one.items():
            assert other[name].keys() == expected.keys()
            # What is added to all keys alike changes nothing: its gradient is rounding.
            least = 1e-4 * max(float(value.norm()) for value in expected.values())
            found[f"{name}, {world}"] = max(
                float((other[name][key] - value).norm()) / max(float(value.norm()), least)
                for key, value in expected.items()
            )
            assert all(torch.isfinite(value).all() for value in other[name].values())
    return found

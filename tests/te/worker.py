"""What the tests of this folder do in a process of their own.

Builds models from both kinds of parts beside the stand-in, and describes them as JSON.

python -m tests.te.worker FOLDER_OF_TRANSFORMER_ENGINE OUTPUT.json
"""

from __future__ import annotations

import itertools
import json
import sys
import unittest.mock
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.te import kernels, standin

LAYERS, WIDTH, HEADS, VOCAB, SEQ, SOURCE = 4, 32, 4, 96, 8, 12
NORMS, ACTIVATIONS, DEGREES = ("layernorm", "rmsnorm"), ("gelu", "swiglu"), (1, 2)


WINDOWS: dict[str, dict[str, Any]] = {
    "window": {"window": 2},
    "window-rotary": {"window": 2, "global_every": 3, "position": "rotary", "rotary_base_local": 9},
    "rotary-yarn-part": {
        "position": "rotary",
        "rotary": {"share": 0.5, "scaling": "yarn", "factor": 4.0, "original_positions": 9, "beta_slow": 0.5},
    },
    "capped": {"attention": {"soft_cap": 0.5, "qk_norm": True}, "logit_soft_cap": 2.0, "num_query_groups": 2},
    "capped-window": {"attention": {"soft_cap": 0.5, "qkv_bias": True}, "bias": False, "window": 2},
    "window-encoder": {"family": "bert", "window": 1, "global_every": 2},
    "rotary-documents": {
        "position": "rotary",
        "num_query_groups": 2,
        "window": 2,
        "global_every": 3,
        "rotary_base_local": 9,
    },
    "learned-documents": {"scheme": "b2t"},
    "capped-documents": {"attention": {"soft_cap": 0.5}, "position": "rotary"},
    "window-encoder-documents": {"family": "bert", "window": 2, "global_every": 2},
}
"""Models whose attention sees neighbours or documents only, by the name of the case."""


CROSSED: dict[str, dict[str, Any]] = {
    f"{scheme} encoder-decoder": {"scheme": scheme, "family": "seq2seq", "encoder_layers": 3, **more}
    for scheme, more in (
        ("deepscalelm_pre_ln", {"position": "sinusoidal", "logit_bias": True}),
        ("deepscalelm_post_ln", {"share_embeddings": False}),
        ("b2t", {"position": "rotary", "normalization": "rmsnorm", "activation": "swiglu", "bias": False}),
    )
}
"""Encoder-decoders, whose rows hold two pairs and padding on both sides."""


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name of a case, fields of its model)."""
    from model.depth.schemes import SCHEMES

    for scheme, normalization, activation in itertools.product(SCHEMES, NORMS, ACTIVATIONS):
        yield (
            f"{scheme}-{normalization}-{activation}",
            {"scheme": scheme, "normalization": normalization, "activation": activation},
        )


def model_config(**fields: Any) -> Any:
    from model.config import ModelConfig

    shape = {
        "num_layers": LAYERS,
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "vocab_size": VOCAB,
        "vocab_multiple": 32,
    }
    return ModelConfig(**shape | {"max_position_embeddings": SEQ} | fields)


def topology_of(tensor: int, sequence_parallel: bool, context: int = 1) -> Any:
    """Process groups of `tensor` x `context` imagined ranks, of which this is the first."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from parallel.config import ParallelConfig
    from parallel.topology import Topology, check_layout

    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    world = tensor * context
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    real = dist.new_group
    # Groups that ask for gloo would wait for ranks that are not there.
    with unittest.mock.patch.object(
        dist, "new_group", lambda *args, **kwargs: real(*args, **kwargs | {"backend": "fake"})
    ):
        return Topology(
            check_layout(
                ParallelConfig(tensor=tensor, sequence_parallel=sequence_parallel, context=context),
                model_config(),
                world,
            )
        )


def build(model: Any, topology: Any, kinds: Any, device: str, **core: Any) -> Any:
    """A model as on a GPU, its tensors on `device`.

    kinds: `local` or `te`.
    core: further fields of Megatron-core's configuration.
    """
    from model.layers.transformer_config import transformer_config
    from model.network.language_model import LanguageModel

    config = transformer_config(
        model, on_cpu=False, init_model_with_meta_device=device == "meta", **topology.core_fields(), **core
    )
    with standin.pretend_cuda(device):
        source = SOURCE if model.blueprint.crossed else None
        return LanguageModel(model, config, seq_length=SEQ, source_length=source, kernels=kinds)


def parameters(chunk: Any, topology: Any) -> dict[str, Any]:
    """Canonical name -> shape, attributes, and its place in the whole tensor.

    The attributes say how it is parallel.
    """
    from model.parameters.names import named_parameters
    from model.parameters.shards import full_shape

    described = {}
    for named in named_parameters(chunk, topology.tensor_rank, topology.layout.tensor):
        parameter, shard = named.parameter, named.shard
        described[named.name] = {
            "shape": list(parameter.shape),
            "whole": list(full_shape(parameter.shape, shard)),
            "shard": [shard.dim, shard.index, shard.count, shard.stride],
            "tensor_model_parallel": bool(getattr(parameter, "tensor_model_parallel", False)),
            "sequence_parallel": bool(getattr(parameter, "sequence_parallel", False)),
            "dtype": str(parameter.dtype),
        }
    return described


def sharded(chunk: Any) -> dict[str, Any]:
    """Megatron-core's sharded state dict under canonical keys.

    Global shape, offset and pieces of every tensor, without the state of FP8.
    """
    from model.parameters.names import canonical_name

    described = {}
    for key, part in chunk.sharded_state_dict(metadata={}).items():
        if not hasattr(part, "global_shape") or "_extra_state" in key:
            continue
        described[canonical_name(key, 0, chunk.placed)] = [
            list(map(int, field or ()))
            for field in (part.global_shape, part.global_offset, part.axis_fragmentations)
        ]
    return described


def describe(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """One case at every degree of tensor parallelism.

    At degrees above 1 it is with sequence parallelism.
    meta: by own names, what is on the meta device.
    """
    model = model_config(**fields)
    described: dict[str, Any] = {}
    for tensor in DEGREES:
        topology = topology_of(tensor, sequence_parallel=tensor > 1)
        for kinds in ("local", "te"):
            chunk = build(model, topology, kinds, "cpu")
            described[f"{kinds}-{tensor}"] = {
                "parameters": parameters(chunk, topology),
                "sharded": sharded(chunk),
            }
        meta = build(model, topology, "te", "meta")
        described[f"meta-{tensor}"] = {
            name: list(parameter.shape) for name, parameter in meta.named_parameters() if parameter.is_meta
        }
        described[f"te-{tensor}"]["own names"] = [name for name, _ in chunk.named_parameters()]
    return described


def compare_runs(name: str, fields: dict[str, Any]) -> dict[str, float]:
    """Loss and gradients of both kinds of model on the same weights and tokens.

    By plain forward passes; Transformer Engine's also with norms apart, joined with what is before.
    Returns the largest relative differences.
    """
    import torch

    from model.layers.joined import join_norms, joined
    from model.parameters.names import named_parameters
    from model.weights.init import initialize_

    model, topology = model_config(**fields), topology_of(1, False)
    tokens = torch.randint(0, VOCAB, (2, SEQ + 1), generator=torch.Generator().manual_seed(0))
    results: list[tuple[Any, dict[str, Any]]] = []
    for kinds in ("local", "te", "te_apart"):
        chunk = build(model, topology, kinds, "cpu").double()
        if kinds == "te_apart":
            fused = [name for name, _ in chunk.named_parameters() if "layer_norm_" in name]
            assert not fused, f"norms that are not apart: {fused}"
            join_norms([chunk], joined)
        named = list(named_parameters(chunk, 0, 1))
        source = SOURCE if model.blueprint.crossed else None
        placed = ((one.name, one.parameter, one.shard) for one in named)
        initialize_(placed, model, SEQ, 1, source_length=source)
        with torch.no_grad():
            for one in named:
                if one.parameter.dim() == 1:  # norms and biases at their initial values would hide mistakes
                    one.parameter.add_(torch.linspace(-0.3, 0.3, one.parameter.numel()).roll(len(one.name)))
        batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
        if name.endswith("documents"):
            # Of other lengths in both rows; neighbours over the border of rows have one number.
            documents = torch.stack((torch.arange(SEQ) // 5, 1 + torch.arange(SEQ) // 3))
            batch["documents"] = documents
            if model.stack.causal:
                batch["positions"] = torch.stack((torch.arange(SEQ) % 5, torch.arange(SEQ) % 3))
        if model.blueprint.crossed:
            batch["source"] = torch.randint(0, VOCAB, (2, SOURCE), generator=torch.Generator().manual_seed(1))
            batch["source_documents"] = torch.tensor([1] * 4 + [2] * 5 + [0] * 3).expand(2, SOURCE)
            batch["documents"] = torch.tensor([1] * 3 + [2] * 3 + [0] * 2).expand(2, SEQ)
        with standin.pretend_cuda("cpu"):
            loss = chunk(batch)
        loss.sum().backward()
        held = [
            layer.mlp.linear_fc1.normed
            for layer in chunk.decoder.layers
            if hasattr(layer.mlp.linear_fc1, "normed")
        ]
        assert not any(tensor is not None for tensor in held), "a layer keeps its normed input alive"
        results.append((loss.detach(), {one.name: one.parameter.grad for one in named}))
    (loss, gradients), *others = results
    assert all(other.keys() == gradients.keys() for _, other in others)
    # What is added to all keys alike changes nothing: its gradient is rounding, of any direction.
    least = 1e-4 * max(float(gradient.norm()) for gradient in gradients.values())
    worst = max(
        float((other[key] - gradient).norm()) / max(float(gradient.norm()), least)
        for _, other in others
        for key, gradient in gradients.items()
    )
    return {"loss": max(float(((loss - other) / loss).abs().max()) for other, _ in others), "gradient": worst}


def half(scheme: str, layers: int, fp32_residual: bool) -> dict[str, float]:
    """Cosines of the logits of both kinds of model in bf16 to those of PyTorch's parts in fp32.

    The weights are ones that bf16 holds.
    """
    import torch
    import torch.nn.functional as F

    from model.parameters.names import named_parameters
    from model.weights.init import initialize_

    model, topology = model_config(scheme=scheme, num_layers=layers), topology_of(1, False)
    tokens = torch.randint(0, VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(0))
    logits = {}
    for kinds, dtype in (("local", torch.float32), ("local", torch.bfloat16), ("te", torch.bfloat16)):
        wide = fp32_residual and dtype != torch.float32
        chunk = build(model, topology, kinds, "cpu", dtype=dtype, fp32_residual_connection=wide)
        initialize_(
            ((one.name, one.parameter, one.shard) for one in named_parameters(chunk, 0, 1)), model, SEQ, 1
        )
        with torch.no_grad(), standin.pretend_cuda("cpu"):
            for parameter in chunk.parameters():
                parameter.copy_(parameter.bfloat16())
            found = chunk.to(dtype)({"tokens": tokens})
        logits[kinds, dtype] = found.double().flatten()
    exact = logits["local", torch.float32]
    return {
        kinds: float(F.cosine_similarity(logits[kinds, torch.bfloat16], exact, dim=0))
        for kinds in ("local", "te")
    }


def half_runs() -> Iterator[tuple[str, str, int, bool]]:
    """(name, scheme, layers, whether with an fp32 residual).

    Deep where a scheme has residual constants.
    """
    from model.depth.plan import DepthPlan
    from model.depth.schemes import SCHEMES

    for scheme in SCHEMES:
        plan = DepthPlan.of(scheme, 2)
        if any(layer.attention.joined != 1.0 for layer in plan.folded()):
            yield scheme, scheme, 384, False
        yield f"{scheme}, fp32 residual", scheme, 24, True


def context_attention(**fields: Any) -> dict[str, Any]:
    """What core attention of a model over four imagined context-parallel ranks was told of them."""
    chunk = build(model_config(**fields), topology_of(1, False, context=4), "te", "cpu")
    core = chunk.decoder.layers[0].self_attention.core_attention
    told = {"class": type(core).__name__}
    if hasattr(core, "cp_group"):
        told |= {"size": core.cp_group.size(), "ranks": core.cp_global_ranks, "way": core.cp_comm_type}
    return told


def main(folder: str, output: str) -> None:
    te = standin.load(Path(folder))
    import megatron.core.models.gpt  # noqa: F401

    warnings.simplefilter("ignore")
    found: dict[str, Any] = {"described": {}, "compared": {}}
    for name, fields in cases():
        found["described"][name] = describe(name, fields)
    kernels.install(te)
    for name, fields in cases():
        found["compared"][name] = compare_runs(name, fields)
    found["compared"]["grouped-rotary-untied"] = compare_runs(
        "",
        {
            "scheme": "b2t",
            "num_query_groups": 2,
            "position": "rotary",
            "tie_embeddings": False,
            "normalization": "rmsnorm",
            "bias": False,
        },
    )
    for name, fields in (WINDOWS | CROSSED).items():
        found["compared"][name] = compare_runs(name, fields)
    found["context"] = {
        "plain": context_attention(num_query_groups=2, position="rotary"),
        "capped": context_attention(attention={"soft_cap": 0.5}),
    }
    found["half"] = {name: half(scheme, layers, wide) for name, scheme, layers, wide in half_runs()}
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:3])

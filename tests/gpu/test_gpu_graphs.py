"""A captured CUDA graph of forward and backward gives what eager execution gives."""

from __future__ import annotations

import pytest
import torch

from model.names import named_parameters
from pretrain.loop import forward_step
from tests.gpu.gpu_models import build, numerics_of, one_pass, tokens

WARM_UP, TOLERANCE = 3, 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["pre_ln", "b2t", "deepscalelm_pre_ln"])
@pytest.mark.parametrize("kernels", ["local", pytest.param("te", marks=pytest.mark.te)])
def test_replay_equals_eager(kernels: str, scheme: str) -> None:
    """To 1e-3 of their norms: a captured product may get another algorithm, and atomic additions in attention's backward pass come in any order."""
    chunk = build(numerics_of("bf16", kernels), scheme=scheme)
    static, other = tokens(0), tokens(1)
    eager = one_pass(chunk, other)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # everything that is allocated or chosen on first use must be there before the capture
        for _ in range(WARM_UP):
            one_pass(chunk, static)
    torch.cuda.current_stream().wait_stream(stream)
    for parameter in chunk.parameters():
        parameter.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses, _ = forward_step(iter([static]), chunk)
        losses.float().mean().backward()
    static.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    assert float((losses.float() - eager.losses).norm()) <= TOLERANCE * float(eager.losses.norm())
    for named in named_parameters(chunk, 0, 1):
        if named.name in eager.gradients:
            expected = eager.gradients[named.name]
            assert named.parameter.grad is not None
            # 1e-6 is for gradients that are zero but for rounding, such as that of the bias of keys.
            assert float((named.parameter.grad.float() - expected).norm()) <= TOLERANCE * float(expected.norm()) + 1e-6, named.name

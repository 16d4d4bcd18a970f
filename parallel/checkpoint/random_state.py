"""Random states of a process: what dropout draws from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parallel.engine.step_graph import tracked_generators


def rng_states() -> dict[str, Tensor]:
    """Random states of this process, as byte tensors by generator name."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    tracked = get_cuda_rng_tracker().get_states().items()
    return states | {f"tracker.{name}": _bytes(state) for name, state in tracked}


def _bytes(state: Any) -> Tensor:
    """A tracked state, which is a generator where CUDA graphs draw from it."""
    return state if isinstance(state, Tensor) else state.get_state()


def set_rng_states(states: dict[str, Tensor]) -> None:
    """Restores what `rng_states` gave."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    tracked = {
        name.removeprefix("tracker."): state for name, state in states.items() if name.startswith("tracker.")
    }
    if not tracked:
        return
    if not tracked_generators():
        get_cuda_rng_tracker().set_states(tracked)
        return
    for name, generator in get_cuda_rng_tracker().get_states().items():
        generator.set_state(tracked[name])

"""Parameters by name and shape alone, for tests of what does not ask what a parameter is for."""

from __future__ import annotations

from torch import nn

from model.parameters.names import NamedParameter
from model.parameters.shards import WHOLE, Shard, full_shape
from model.parameters.table import Role, Row


def local_parameter(name: str, parameter: nn.Parameter, shard: Shard = WHOLE) -> NamedParameter:
    """A local parameter under a made-up name, such as decoder.layers.3.mlp.weight."""
    layer = int(name.split(".")[2]) if name.startswith("decoder.layers.") else None
    row = Row(
        name=name,
        shape=full_shape(parameter.shape, shard),
        role=Role.NORM_GAIN,
        stack="decoder",
        layer=layer,
    )
    return NamedParameter(row, parameter, shard)

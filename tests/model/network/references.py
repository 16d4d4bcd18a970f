"""A model's losses and gradients against those of an independent reference, in fp64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from model.network.language_model import LanguageModel
from model.parameters.names import named_parameters


def assert_equals_reference(
    chunk: LanguageModel, given: Mapping[str, Tensor], losses: Tensor, gradients: Mapping[str, Tensor]
) -> None:
    """given: a batch with the weights of its labels.

    losses [b, s]: the reference's. gradients: of their weighted sum, by canonical name.
    """
    ours = chunk({name: value for name, value in given.items() if name != "weights"})
    (ours * given["weights"]).sum().backward()
    counted = given["weights"] > 0
    torch.testing.assert_close(ours[counted], losses[counted], rtol=1e-10, atol=1e-10)
    for one in named_parameters(chunk, 0, 1):
        gradient = one.parameter.grad
        assert gradient is not None, one.name
        allowed = 1e-9 * float(gradients[one.name].abs().max())
        torch.testing.assert_close(gradient, gradients[one.name], rtol=1e-9, atol=allowed, msg=one.name)

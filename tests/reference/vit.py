"""A classifier of images under every depth scheme, in plain PyTorch.

The layers are those of the decoder (`gpt.py`) without the causal mask; patches, positions and head
are written here, patches as a convolution.
Parameters are a dict from topology-free name to whole tensor, as in `encoder.py`.

    x = [class; conv(image)] + position,    then a norm where the scheme has one
    h = stack(x);    logits = scale pool(h) W^T (+ bias),    pool: the first token, or the mean
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference import gpt
from tests.reference.parts import Options, Weights, linear, norm


@dataclass(frozen=True)
class Vit:
    """A model."""

    stack: gpt.Shape
    patch: int
    class_token: bool
    embedding_norm: bool | None = None
    """None leaves it to the scheme."""
    sinusoid_scale: float = 1.0


def sines(places: Tensor, width: int) -> Tensor:
    """[n, width]: sines of all frequencies, then cosines."""
    rates = torch.tensor([1e4 ** (-2 * i / width) for i in range(width // 2)], dtype=torch.float64)
    angles = places.double()[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def _norm(parameters: gpt.Parameters, x: Tensor, name: str, options: Options) -> Tensor:
    pair: Weights = {"ln": parameters[f"{name}.weight"]}
    if f"{name}.bias" in parameters:
        pair["ln_b"] = parameters[f"{name}.bias"]
    return norm(x, pair, "ln", options)


def embed(parameters: gpt.Parameters, model: Vit, images: Tensor) -> Tensor:
    """The sum of all tables, [batch, tokens, hidden]."""
    weight = parameters["embedding.patches.weight"]
    kernel = weight.view(len(weight), images.shape[1], model.patch, model.patch)
    x = F.conv2d(images, kernel, parameters.get("embedding.patches.bias"), stride=model.patch)
    rows, columns = x.shape[2:]
    x = x.flatten(2).transpose(1, 2)
    if model.stack.position == "sinusoidal":
        place = torch.arange(rows * columns)
        half = x.shape[-1] // 2
        where = torch.cat((sines(place // columns, half), sines(place % columns, half)), dim=1)
        x = x + model.sinusoid_scale * where
    if model.class_token:
        x = torch.cat((parameters["embedding.class_token.weight"].expand(len(x), 1, -1), x), dim=1)
    if model.stack.position == "learned":
        x = x + parameters["embedding.position_embeddings.weight"]
    return x


def logits(
    parameters: gpt.Parameters, model: Vit, images: Tensor, trace: list[Tensor] | None = None
) -> Tensor:
    """[batch, padded classes]. images: [batch, channels, rows, columns].

    trace: gets the stream entering layer 1 and every layer's output.
    """
    shape = model.stack
    options = Options(
        heads=shape.heads,
        groups=shape.groups,
        activation=shape.activation,
        norm=shape.normalization,
        eps=shape.eps,
        causal=False,
    )
    family = gpt.FAMILIES[shape.scheme]
    x = embed(parameters, model, images)
    normed = family.embedding_norm if model.embedding_norm is None else model.embedding_norm
    if normed:
        x = _norm(parameters, x, "embedding.norm", options)
    if trace is not None:
        trace.append(x)
    layers = {name.replace("encoder.", "decoder.", 1): value for name, value in parameters.items()}
    x = family.run(layers, shape, x, options, trace)
    if family.final_norm:
        x = _norm(parameters, x, "encoder.final_layernorm", options)
    pooled = x[:, 0] if model.class_token else x.mean(1)
    return linear(
        shape.logit_scale * pooled, parameters["output_layer.weight"], parameters.get("output_layer.bias")
    )


def loss(scores: Tensor, labels: Tensor, weights: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean over images of the weighted cross-entropies of their labels.

    scores: [batch, classes]; labels, weights: [batch, labels of an image].
    """
    each = [
        F.cross_entropy(scores, labels[:, one], reduction="none", label_smoothing=smoothing)
        for one in range(labels.shape[1])
    ]
    return (torch.stack(each, 1) * weights).sum(1).mean()

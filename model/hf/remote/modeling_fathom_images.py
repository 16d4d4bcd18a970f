"""A classifier of images over an encoder of their patches.

This file travels with the weights and needs transformers and modeling_fathom.py only.
Shape letters: b batch, c channels, s positions, h hidden, v classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from .configuration_fathom import FathomConfig
from .modeling_fathom import FathomModel, FathomPreTrainedModel, capped


class FathomForImageClassification(FathomPreTrainedModel):
    """The class of an image, from its class token or from the mean of its patches.

    Raises ValueError for a configuration without images.
    """

    main_input_name = "pixel_values"

    def __init__(self, config: FathomConfig) -> None:
        super().__init__(config)
        if config.image_size is None:
            raise ValueError(f"{type(self).__name__} is for models of images, and this one has no image_size")
        self.model = FathomModel(config)
        del self.model.embed_tokens
        size, width = config.patch_size, config.hidden_size
        self.patches = nn.Conv2d(config.num_channels, width, size, stride=size, bias=config.bias)
        token = config.image_pooling == "class_token"
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if token else None
        self.lm_head = nn.Linear(width, config.num_labels, bias=False)
        self.logit_bias = nn.Parameter(torch.zeros(config.num_labels)) if config.logit_bias else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.patches

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """pixel_values [b, c, rows, columns], standardised; labels [b]: classes.

        Raises ValueError for images of another size.
        """
        wanted = [self.config.num_channels, *(self.config.image_size or [])]
        if list(pixel_values.shape[1:]) != wanted:
            raise ValueError(
                f"pixel_values of shape {list(pixel_values.shape[1:])}, this model reads {wanted}"
            )
        x_bsh = self.patches(pixel_values).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x_bsh = torch.cat((self.class_token.expand(len(x_bsh), 1, -1), x_bsh), dim=1)
        out = self.model(inputs_embeds=x_bsh, output_hidden_states=output_hidden_states)
        last = out.last_hidden_state
        pooled = last.mean(1) if self.class_token is None else last[:, 0]
        logits = F.linear(self.config.logit_scale * pooled, self.lm_head.weight, self.logit_bias)
        logits = capped(logits, self.config.logit_soft_cap)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels.view(-1))
        result = ImageClassifierOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)
        return result.to_tuple() if return_dict is False else result


# As in modeling_fathom.py: saving a loaded model writes these files again.
FathomForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = ["FathomForImageClassification"]

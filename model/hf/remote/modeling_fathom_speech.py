"""An encoder that hears frames of a recording, and a decoder that writes what they say.

This file travels with the weights and needs transformers, modeling_fathom.py and
modeling_fathom_seq2seq.py only.
Shape letters: b batch, f frames, m filters, c channels, t tokens of four frames, s positions of the
decoder, h hidden.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES

from .configuration_fathom import FathomConfig
from .modeling_fathom_seq2seq import FathomForConditionalGeneration, FathomSeq2SeqModel, FathomStack

KERNEL, STRIDE = 5, 2


class FathomSpeechEncoder(FathomStack):
    """Two convolutions with gates, each of which halves the number of places, and the layers.

    Raises ValueError for a configuration without frames.
    """

    main_input_name = "input_features"

    def __init__(self, config: FathomConfig) -> None:
        super().__init__(config)
        if config.speech is None:
            raise ValueError(f"{type(self).__name__} is for models of speech, and this one has no speech")
        filters, channels = config.speech["filters"], config.speech["channels"]
        self.embed_tokens = None  # type: ignore[assignment]
        given: dict[str, Any] = {"stride": STRIDE, "padding": KERNEL // 2, "bias": config.bias}
        self.first = nn.Conv1d(filters, channels, KERNEL, **given)
        self.second = nn.Conv1d(channels // 2, 2 * config.hidden_size, KERNEL, **given)

    def forward(  # type: ignore[override]
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        inputs_embeds: None = None,
        **kwargs: Any,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """input_features [b, f, m], standardised; attention_mask [b, f]: 0 for padding at ends.

        Of padding nothing is heard: a clip has the same tokens whatever stands behind it.
        """
        x_bcf = input_features.to(self.first.weight.dtype).transpose(1, 2)
        heard_bf = attention_mask
        for convolution in (self.first, self.second):
            if heard_bf is not None:
                x_bcf = x_bcf * heard_bf[:, None].to(x_bcf.dtype)
                heard_bf = heard_bf[:, ::STRIDE]
            x_bcf = F.glu(convolution(x_bcf), dim=1)
        return super().forward(None, heard_bf, inputs_embeds=x_bcf.transpose(1, 2), **kwargs)


class FathomSpeechModel(FathomSeq2SeqModel):
    """Both stacks."""

    main_input_name = "input_features"

    def make_encoder(self, config: FathomConfig) -> FathomStack:
        """What hears."""
        return FathomSpeechEncoder(config.of_encoder())

    def memory_mask(self, attention_mask: Tensor | None) -> Tensor | None:
        """[b, t] of [b, f]: a token is there where the first of its frames is."""
        return None if attention_mask is None else attention_mask[:, :: STRIDE * STRIDE]


class FathomForSpeechSeq2Seq(FathomForConditionalGeneration):
    """The model that writes what a recording says."""

    main_input_name = "input_features"
    model_class = FathomSpeechModel

    def forward(  # type: ignore[override]
        self, input_features: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Seq2SeqLMOutput | tuple[Any, ...]:
        """input_features, attention_mask: as `FathomSpeechEncoder.forward`, the rest as ever."""
        return super().forward(input_features, attention_mask, **kwargs)


# As in modeling_fathom.py: saving a loaded model writes these files again.
FathomForSpeechSeq2Seq.register_for_auto_class("AutoModelForSpeechSeq2Seq")
# pipeline("automatic-speech-recognition") tells by this table which models write and which tag.
MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.setdefault("fathom", FathomForSpeechSeq2Seq.__name__)

__all__ = ["FathomForSpeechSeq2Seq", "FathomSpeechModel"]

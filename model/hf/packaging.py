"""What a family's models are to transformers: one row a family.

Which stock classes there are, which of our own files travel along, and what a user writes to load
a folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from model.config import ModelConfig
from model.hf.names.conversions import Target

REMOTE = Path(__file__).with_name("remote")
"""The folder of what travels with our own classes."""
CONFIGURATION, MODELING, ENCODER, SEQ2SEQ, IMAGES, SPEECH = (
    "configuration_fathom.py",
    "modeling_fathom.py",
    "modeling_fathom_encoder.py",
    "modeling_fathom_seq2seq.py",
    "modeling_fathom_images.py",
    "modeling_fathom_speech.py",
)


@dataclass(frozen=True)
class Packaging:
    """How the models of one family are packed."""

    targets: tuple[Target, ...]
    """Best first; the last one is our own class, which computes everything."""
    auto: str
    """The class of transformers that loads such a folder."""
    own: str
    """Our class in the place of a stock one."""
    code: tuple[str, ...]
    """The files that travel with our own class."""
    auto_map: Mapping[str, str]
    """Where transformers finds our own classes."""
    task: str
    """What the Hub calls what the model does."""
    kind: str
    """What the model is, in words."""
    sample: tuple[str, ...]
    """Python that shows what it does, after `model` and `tokenizer` are loaded."""


def _auto_map(causal: Mapping[str, str]) -> dict[str, str]:
    return {
        "AutoConfig": "configuration_fathom.FathomConfig",
        "AutoModel": "modeling_fathom.FathomModel",
        **causal,
    }


PACKAGINGS: dict[str, Packaging] = {
    "gpt": Packaging(
        targets=(
            "gpt2",
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gpt_neox",
            "gemma2",
            "gemma3_text",
            "opt",
            "gemma",
            "fathom",
        ),
        auto="AutoModelForCausalLM",
        own="FathomForCausalLM",
        code=(CONFIGURATION, MODELING),
        auto_map=_auto_map({"AutoModelForCausalLM": "modeling_fathom.FathomForCausalLM"}),
        task="text-generation",
        kind="decoder-only language model",
        sample=(
            'ids = tokenizer("Once upon a time", return_tensors="pt").input_ids',
            "print(tokenizer.decode(model.generate(ids, max_new_tokens=32)[0]))",
        ),
    ),
    "bert": Packaging(
        targets=("bert", "megatron-bert", "eurobert", "modernbert", "fathom"),
        auto="AutoModelForMaskedLM",
        own="FathomForMaskedLM",
        code=(CONFIGURATION, MODELING, ENCODER),
        auto_map=_auto_map(
            {
                f"AutoModelFor{task}": f"modeling_fathom_encoder.FathomFor{task}"
                for task in ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
            }
        ),
        task="fill-mask",
        kind="bidirectional encoder for masked language modelling",
        sample=(
            'batch = tokenizer(f"Once upon a{tokenizer.mask_token}", return_tensors="pt")',
            "best = model(**batch).logits.argmax(-1)",
            "print(tokenizer.decode(best[batch.input_ids == tokenizer.mask_token_id]))",
        ),
    ),
    "seq2seq": Packaging(
        targets=("marian", "bart", "blenderbot", "mbart", "fathom"),
        auto="AutoModelForSeq2SeqLM",
        own="FathomForConditionalGeneration",
        code=(CONFIGURATION, MODELING, SEQ2SEQ),
        auto_map={
            "AutoConfig": "configuration_fathom.FathomConfig",
            "AutoModel": "modeling_fathom_seq2seq.FathomSeq2SeqModel",
            "AutoModelForSeq2SeqLM": "modeling_fathom_seq2seq.FathomForConditionalGeneration",
        },
        task="translation",
        kind="model of an encoder and a decoder that reads it",
        sample=(
            'batch = tokenizer("A sentence in the source language.", return_tensors="pt")',
            "best = model.generate(**batch, num_beams=4)[0]",
            "print(tokenizer.decode(best, skip_special_tokens=True))",
        ),
    ),
    "speech": Packaging(
        targets=("speech_to_text", "fathom"),
        auto="AutoModelForSpeechSeq2Seq",
        own="FathomForSpeechSeq2Seq",
        code=(CONFIGURATION, MODELING, SEQ2SEQ, SPEECH),
        auto_map={
            "AutoConfig": "configuration_fathom.FathomConfig",
            "AutoModelForSpeechSeq2Seq": "modeling_fathom_speech.FathomForSpeechSeq2Seq",
        },
        task="automatic-speech-recognition",
        kind="model of speech, whose decoder writes what its encoder hears",
        sample=('print(pipeline("automatic-speech-recognition", model=".")("recording.wav"))',),
    ),
    "vit": Packaging(
        targets=("vit", "fathom"),
        auto="AutoModelForImageClassification",
        own="FathomForImageClassification",
        code=(CONFIGURATION, MODELING, IMAGES),
        auto_map={
            "AutoConfig": "configuration_fathom.FathomConfig",
            "AutoModelForImageClassification": "modeling_fathom_images.FathomForImageClassification",
        },
        task="image-classification",
        kind="classifier of images",
        sample=('print(pipeline("image-classification", model=".")("image.png"))',),
    ),
}
"""By the name of the family."""


def packaging(config: ModelConfig) -> Packaging:
    """How a model is packed."""
    return PACKAGINGS[config.family]

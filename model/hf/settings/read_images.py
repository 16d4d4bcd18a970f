"""config.json of a classifier of images, and what else its folder says of images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from model.errors import UserError
from model.hf.folding.obstacles import UNGATED_ACTIVATIONS
from model.hf.settings.records import ADVICE, ProcessorFile, ViTFile
from model.hf.settings.refusal import activation, refuse_first
from model.hf.settings.write import STOCK_INIT
from model.records import as_record, read_record

CLASSIFIER = "ViTForImageClassification"


def image_fields(content: Mapping[str, object], kind: str, source: str) -> dict[str, object]:
    """Our fields of a Vision Transformer with a classifier. Raises UserError for another one."""
    data = as_record(content, ViTFile, source, ADVICE)
    sizes = {name: _pair(getattr(data, name)) for name in ("image_size", "patch_size")}
    (height, width), (patch, other) = sizes["image_size"], sizes["patch_size"]
    named = data.architectures or [CLASSIFIER]
    refuse_first(
        kind,
        [
            (patch != other, f"its patches are no squares (patch_size={data.patch_size})"),
            (not data.qkv_bias, "its queries, keys and values have no biases (qkv_bias=false)"),
            (
                named != [CLASSIFIER],
                f"it is a {named[0] if named else 'model without a class'}, not a {CLASSIFIER}",
            ),
        ],
    )
    return {
        "family": "vit",
        "scheme": "pre_ln",
        "init": STOCK_INIT,
        "num_layers": data.num_hidden_layers,
        "hidden_size": data.hidden_size,
        "num_attention_heads": data.num_attention_heads,
        "ffn_hidden_size": data.intermediate_size,
        "vocab_size": len(data.id2label),
        "position": "learned",
        "tie_embeddings": False,
        "logit_bias": True,
        "norm_epsilon": data.layer_norm_eps,
        "activation": activation(kind, data.hidden_act, UNGATED_ACTIVATIONS),
        "hidden_dropout": data.hidden_dropout_prob,
        "attention_dropout": data.attention_probs_dropout_prob,
        "image": {"height": height, "width": width, "channels": data.num_channels, "patch": patch},
    }


def _pair(size: int | tuple[int, ...]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


def image_facts(content: object, source: str, processor: Path | None) -> dict[str, object]:
    """Classes by number, mean and standard deviation of pixels in 0 .. 1, as a run keeps them.

    processor: preprocessor_config.json, where the folder has one.
    Raises UserError where classes are not numbered, or pixels are treated in another way.
    """
    model = as_record(content, ViTFile, source, ADVICE)
    labels = model.id2label
    numbers = {str(number) for number in range(len(labels))}
    if set(labels) != numbers:
        raise UserError(f"{source}: id2label does not number its {len(labels)} classes from 0 on: {ADVICE}")
    found: dict[str, object] = {"classes": [labels[str(number)] for number in range(len(labels))]}
    if processor is None:
        return {}
    data = read_record(processor, ProcessorFile, ADVICE)
    if not data.do_normalize or not data.do_rescale or abs(data.rescale_factor * 255 - 1) > 1e-6:
        raise UserError(
            f"{processor}: pixels have to be divided by 255 and standardised "
            "(do_rescale, rescale_factor, do_normalize): this is another kind of input"
        )
    if not len(data.image_mean) == len(data.image_std) == model.num_channels:
        raise UserError(
            f"{processor}: image_mean and image_std are not of num_channels={model.num_channels} in {source}"
        )
    return found | {"mean": data.image_mean, "std": data.image_std}

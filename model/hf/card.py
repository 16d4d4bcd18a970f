"""The README of an exported model.

How to use it, what it is, where it comes from, and what was proved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from model.config import ModelConfig
from model.depth.schemes import SCHEMES
from model.hf.mapping import norm_layers
from model.hf.packaging import packaging
from model.hf.settings.write import architecture
from model.words import printable

if TYPE_CHECKING:
    from model.hf.result import Export


def model_card(config: ModelConfig, result: Export, provenance: Mapping[str, object]) -> str:
    """Markdown with the metadata block that the Hub reads.

    provenance: label -> value, shown in order.
    """
    trust = ", trust_remote_code=True" if result.architecture == "fathom" else ""
    code = (
        "The depth scheme has no class in transformers, so its modelling code travels with the weights."
        if trust
        else ""
    )
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            f"pipeline_tag: {packaging(config).task}",
            f"tags: [fathom, {config.scheme}]",
            "---",
            "",
            f"# {provenance.get('name', result.path.name)}",
            "",
            f"A {packaging(config).kind}, {config.num_layers} layers deep, "
            f"pretrained with the depth scheme `{config.scheme}`:",
            f"{SCHEMES[config.scheme].summary} ({SCHEMES[config.scheme].source}). {code}".rstrip(),
            "",
            "```python",
            *_loading(config, trust, tokenizer=bool(result.tokenizer or result.copied_tokenizer)),
            "```",
            "",
            "## Model",
            "",
            *_table(_model_rows(config, result)),
            "## Provenance",
            "",
            *_table(
                {str(label): value for label, value in provenance.items() if label != "name"}
                or {"": "not recorded"}
            ),
            "## Proof",
            "",
            *_proof(config, result),
            "",
        ]
    )


def _loading(config: ModelConfig, trust: str, *, tokenizer: bool) -> list[str]:
    """Python that loads the model and shows what it does.

    Of images and speech a pipeline, which also reads files.
    """
    auto = packaging(config).auto
    if config.blueprint.inputs != "tokens":
        shown = [line.replace('model="."', f'model="."{trust}') for line in packaging(config).sample]
        return ["from transformers import pipeline", "", *shown]
    return [
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f'model = {auto}.from_pretrained("."{trust})',
        *(
            [f'tokenizer = AutoTokenizer.from_pretrained("."{trust})', *packaging(config).sample]
            if tokenizer
            else []
        ),
    ]


def _model_rows(config: ModelConfig, result: Export) -> dict[str, object]:
    options = ", ".join(f"{key}={value}" for key, value in config.scheme_options.items())
    return {
        "class": architecture(result.architecture, config)
        + (f" ({packaging(config).code[-1]})" if result.architecture == "fathom" else ""),
        "parameters": f"{result.parameters:,}",
        "layers": config.num_layers,
        "hidden size": config.hidden_size,
        "heads": f"{config.num_attention_heads} query, {config.groups} key/value, width {config.kv_channels}",
        "feed-forward": f"{config.ffn_size}, {config.activation}",
        "norms": config.normalization,
        "positions": config.position,
        **_window(config),
        ("vocabulary" if config.image is None else "classes"): config.vocab_size,
        "embeddings": "tied" if config.tie_embeddings else "untied",
        "scheme options": options or "defaults",
        "stored as": result.dtype,
    }


def _window(config: ModelConfig) -> dict[str, object]:
    if config.window is None:
        return {}
    side = "before it" if config.stack.causal else "on each side"
    others = "" if config.global_every is None else f", all in one layer of {config.global_every}"
    return {"attention": f"each token sees {config.window} {side}{others}"}


def _table(rows: Mapping[str, object]) -> list[str]:
    return [
        "| | |",
        "|---|---|",
        *(f"| {label} | {printable(value, 400).replace('|', '&#124;')} |" for label, value in rows.items()),
        "",
    ]


def _proof(config: ModelConfig, result: Export) -> list[str]:
    proof, extra = result.proof, norm_layers(result.architecture, config)
    asked = "tokens" if config.image is None else "images"
    lines = [
        "Before it was put in place, this folder was loaded with transformers in fp32 and its logits "
        "were compared with the pretraining model's "
        f"on {proof.tokens} {asked}: they differ by at most {proof.difference:.1e} "
        f"of their standard deviation ({proof.scale:.3g}); "
        f"allowed was {proof.tolerance:.1e}.",
    ]
    if proof.trained is not None:
        lines.append(
            "Computed in 16 bits, as in training, the pretraining model's logits have the cosine "
            f"{proof.trained:.5f} to these."
        )
    if result.folded:
        effect = (
            f", which moves the logits by {proof.epsilon_effect:.1e} standard deviations"
            if proof.epsilon_effect
            else ""
        )
        lines.append(
            "The depth scheme's constants are folded into the weights; "
            f"the one epsilon of all norms is {result.epsilon:.3g}{effect}. "
            "Fine-tuning has to know: where a constant made a matrix smaller, a step of the same rate "
            "changes it more. Lower the rate"
            + (", or export with `--architecture fathom`." if "fathom" in packaging(config).targets else ".")
        )
    for place, present, normed in zip(
        ("first", "last"), extra, ("embedding", "output of the stack"), strict=True
    ):
        if present:
            lines.append(
                f"The {place} layer is one more than in pretraining: "
                f"its branches are zero, and it only norms the {normed}."
            )
    if result.dtype != "float32":
        lines.append(
            f"Storing the weights as {result.dtype} afterwards moved the logits "
            f"by up to {result.dtype_difference:.1e} standard deviations."
        )
    if result.tokenizer:
        ties = (
            f", except that {result.tokenizer.ties} had another segmentation of the same score"
            if result.tokenizer.ties
            else ""
        )
        lines.append(f"The tokenizer gives the ids and text of the training data's on a fuzz corpus{ties}.")
    if result.copied_tokenizer:
        lines.append(
            f"The tokenizer was copied from {result.copied_tokenizer} as it is; "
            "whether the model was trained with it was not checked."
        )
    lines += [f"Not exact enough, and so not used: {reason}." for reason in result.skipped]
    return lines

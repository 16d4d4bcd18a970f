"""A depth scheme with its options as one word.

For example `b2t`, `b2t:rescale=false`, `post_ln:rescale=true:init.base=fairseq`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from model.config import ModelConfig
from model.depth.scheme import SCHEMES, scheme_names
from model.errors import UserError
from pretrain.config.compose import COMMAND_LINE
from pretrain.config.errors import checked
from pretrain.config.load import load_with_origins
from pretrain.config.yaml_reader import YamlError, parse

# Settings of the model, beside the scheme's own options, that belong to how a scheme is used.
SETTINGS = (
    "init.base",
    "init.std",
    "init.token_correlation",
    "init.causal_correction",
    "normalization",
    "activation",
    "position",
    "bias",
    "hidden_dropout",
    "attention_dropout",
)


@dataclass(frozen=True)
class Variant:
    """A scheme as it is to be compared."""

    text: str
    """As it was written."""
    scheme: str
    options: dict[str, float | bool] = field(default_factory=dict)
    """Of the scheme."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Dotted keys of the model section."""

    @property
    def slug(self) -> str:
        """The text as a file name."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.text)

    def apply(self, model: ModelConfig) -> ModelConfig:
        """The model under this scheme.

        Everything else is kept but what belongs to the scheme of `model`: its weights (model.init).
        Another scheme gets its own base initialisation unless the settings name one.
        Options of model.init that the base in force does not read are left out, unless they are
        among the settings.

        Raises UserError where the two do not fit together.
        """
        values = model.model_dump()
        values.update(scheme=self.scheme, scheme_options=self.options)
        init = values["init"]
        if self.scheme != model.scheme:
            init["base"] = "scheme"
        base = self.settings.get("init.base", init["base"])
        if base != "normal":
            del init["std"]
        if base != "scheme" or SCHEMES[self.scheme].base != "deepscale":
            del init["token_correlation"], init["causal_correction"]
        for key, value in self.settings.items():
            section, _, last = key.rpartition(".")
            (values[section] if section else values)[last] = value
        return validated(values, f"scheme {self.text!r}: ")

    def with_base(self, base: str | None) -> Variant:
        """The variant with a base initialisation that was asked for, unless it names its own.

        base: None changes nothing.
        """
        return self if base is None else replace(self, settings={"init.base": base, **self.settings})


def validated(values: dict[str, Any], prefix: str = "") -> ModelConfig:
    """The model of these values.

    Raises UserError in one line, after `prefix`, where they do not fit together.
    """
    return checked(ModelConfig, values, prefix)


def base_asked_for(path: str, overrides: Sequence[str]) -> str | None:
    """The base initialisation that an override on the command line gives, else None.

    `init.std` there means the base it fits.
    """
    config, composition = load_with_origins(path, overrides)
    given = {composition.origins.get(key) for key in ("model.init.base", "model.init.std")}
    return config.model.init.base if COMMAND_LINE in given else None


def parse_variant(text: str) -> Variant:
    """Reads NAME[:KEY=VALUE]..., KEY an option of the scheme or one of SETTINGS.

    Raises UserError in one line for anything else.
    """
    name, *pairs = text.strip().split(":")
    if name not in SCHEMES:
        raise UserError(f"scheme {name!r} is unknown; choose one of {', '.join(scheme_names())}")
    options: dict[str, float | bool] = {}
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(
                f"scheme {text!r}: {pair!r} is not of the form KEY=VALUE, "
                f"as in {name}:{next(iter(SCHEMES[name].options), 'init.base')}=..."
            )
        try:
            parsed = parse(value).value
        except YamlError as error:
            raise UserError(f"scheme {text!r}: {value!r} is not a value") from error
        if key in SETTINGS:
            settings[key] = parsed
        else:
            options[key] = (
                float(parsed) if isinstance(parsed, int) and not isinstance(parsed, bool) else parsed
            )
    try:
        SCHEMES[name].check_options(options)
    except ValueError as error:
        others = f"; beside them {', '.join(SETTINGS)}" if set(options) - set(SCHEMES[name].options) else ""
        raise UserError(f"scheme {text!r}: {error}{others}") from error
    return Variant(text.strip(), name, options, settings)


def parse_variants(text: str) -> list[Variant]:
    """Reads a comma-separated list.

    Raises UserError for an empty list, a scheme that occurs twice, or as `parse_variant`.
    """
    variants = [parse_variant(part) for part in text.split(",") if part.strip()]
    if not variants:
        raise UserError("no scheme is named: give a list such as pre_ln,b2t,deepscalelm_pre_ln")
    twice = {
        variant.text for variant in variants if [other.text for other in variants].count(variant.text) > 1
    }
    if twice:
        raise UserError(f"scheme {', '.join(sorted(twice))} is named twice")
    return variants

"""A depth scheme with its options as one word, or as a recipe in a file.

For example `b2t`, `b2t:rescale=false`, `post_ln:branch=1:factors.stream_norm.rate=1/layers`,
`configs/recipe/b2t.yaml`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from model.config import ModelConfig
from model.depth.schemes import SCHEMES, scheme_names
from model.errors import UserError
from pretrain.config.compose import COMMAND_LINE, compose
from pretrain.config.errors import checked
from pretrain.config.load import load_with_origins
from pretrain.config.sections.factors import FactorsConfig
from pretrain.config.yaml_reader import Plain, YamlError, parse

# Settings of the model, beside the scheme's own options, that belong to how a scheme is used.
SETTINGS = (
    "init.base",
    "init.std",
    "init.token_correlation",
    "init.causal_correction",
    "init.unigram",
    "logit_bias",
    "transfer.method",
    "transfer.base_layers",
    "transfer.base_encoder_layers",
    "transfer.base_hidden",
    "transfer.alpha",
    "normalization",
    "activation",
    "position",
    "bias",
    "hidden_dropout",
    "attention_dropout",
)
FACTORS = "factors."
"""Before the role of a factor of the optimizer."""
NOT_COMPARED = ("model.scheme", "optimizer.lr", "schedule.")
"""Beginnings of keys in a recipe that are read elsewhere, or left to whoever compares."""


@dataclass(frozen=True)
class Variant:
    """A scheme as it is to be compared."""

    text: str
    """As it was written."""
    scheme: str
    options: dict[str, float | bool] = field(default_factory=dict)
    """Of the scheme."""
    settings: dict[str, Plain] = field(default_factory=dict)
    """Dotted keys of the model section."""
    factors: dict[str, Plain] = field(default_factory=dict)
    """Dotted keys of optimizer.factors."""

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
            del init["token_correlation"], init["causal_correction"], init["mask_token_share"]
        for key, value in self.settings.items():
            section, _, last = key.rpartition(".")
            (values[section] if section else values)[last] = value
        return validated(values, f"scheme {self.text!r}: ")

    def apply_factors(self, model: ModelConfig, factors: FactorsConfig) -> FactorsConfig:
        """The optimizer's factors under this scheme.

        model, factors: of the configuration. Factors belong to a scheme: another scheme than the
        model's begins without any.
        Raises UserError for one that does not exist or has a wrong value.
        """
        kept = factors if self.scheme == model.scheme else FactorsConfig()
        values = kept.model_dump()
        for key, value in self.factors.items():
            role, _, name = key.partition(".")
            values.setdefault(role, {})[name] = value
        return checked(FactorsConfig, values, f"scheme {self.text!r}: factors.")

    def with_base(self, base: str | None) -> Variant:
        """The variant with a base initialisation that was asked for, unless it names its own.

        base: None changes nothing.
        """
        return self if base is None else replace(self, settings={"init.base": base, **self.settings})


def validated(
    values: Mapping[str, object], prefix: str = "", typed: Mapping[str, str] | None = None
) -> ModelConfig:
    """The model of these values.

    Raises UserError as `checked` does, where they do not fit together.
    """
    return checked(ModelConfig, values, prefix, typed)


def base_asked_for(path: str, overrides: Sequence[str]) -> str | None:
    """The base initialisation that an override on the command line gives, else None.

    `init.std` there means the base it fits.
    """
    config, composition = load_with_origins(path, overrides)
    given = {composition.origins.get(key) for key in ("model.init.base", "model.init.std")}
    return config.model.init.base if COMMAND_LINE in given else None


def parse_variant(text: str) -> Variant:
    """Reads NAME[:KEY=VALUE]..., or FILE.yaml, a recipe.

    KEY: an option of the scheme, one of SETTINGS, or factors.ROLE.NAME.
    Raises UserError in one line for anything else.
    """
    if text.strip().endswith(".yaml"):
        return _recipe(text.strip())
    name, *pairs = text.strip().split(":")
    if name not in SCHEMES:
        raise UserError(f"scheme {name!r} is unknown; choose one of {', '.join(scheme_names())}")
    options: dict[str, Plain] = {}
    settings: dict[str, Plain] = {}
    factors: dict[str, Plain] = {}
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
        elif key.startswith(FACTORS):
            factors[key.removeprefix(FACTORS)] = parsed
        else:
            options[key] = (
                float(parsed) if isinstance(parsed, int) and not isinstance(parsed, bool) else parsed
            )
    return Variant(text.strip(), name, _options(text, name, options), settings, factors)


def _options(text: str, name: str, given: Mapping[str, Plain]) -> dict[str, float | bool]:
    """Options of the scheme `name`. Raises UserError for one that does not fit."""
    scheme = SCHEMES[name]
    try:
        scheme.check_options(given)
    except ValueError as error:
        others = f"; beside them {', '.join(SETTINGS)}, {FACTORS}ROLE.rate"
        raise UserError(
            f"scheme {text!r}: {error}{others if set(given) - set(scheme.options) else ''}"
        ) from error
    return {key: value for key, value in given.items() if isinstance(value, (bool, int, float))}


def _recipe(path: str) -> Variant:
    """The scheme of a recipe's file. Its rate and warm-up are left to whoever compares.

    Raises UserError for a file without a scheme, or with keys that are none of a recipe's.
    """
    given = compose(path)
    name = _value(given.values, "model.scheme")
    if "model.scheme" not in given.origins or not isinstance(name, str) or name not in SCHEMES:
        raise UserError(f"recipe {path}: model.scheme={name!r}: choose one of {', '.join(scheme_names())}")
    settings: dict[str, Plain] = {}
    factors: dict[str, Plain] = {}
    for key in given.origins:
        section, _, rest = key.partition(".")
        value = _value(given.values, key)
        if isinstance(value, Mapping) or key.startswith(NOT_COMPARED):
            continue
        if section == "model" and rest in SETTINGS:
            settings[rest] = value
        elif key.startswith(f"optimizer.{FACTORS}"):
            factors[key.removeprefix(f"optimizer.{FACTORS}")] = value
        else:
            raise UserError(
                f"recipe {path}: {key} is no part of a recipe, which has model.scheme, its options, "
                f"optimizer.factors, a rate, a schedule, and of the model {', '.join(SETTINGS)}"
            )
    file = Path(path)
    text = f"{file.parent.name}/{file.stem}".lstrip("/")
    options = _value(given.values, "model.scheme_options")
    known = _options(text, name, options if isinstance(options, dict) else {})
    return Variant(text, name, known, settings, factors)


def _value(values: Plain, key: str) -> Plain:
    found = values
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


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

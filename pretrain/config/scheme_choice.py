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
from model.words import printable, written
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
    option: str = "scheme"
    """The option of the command line that named it, for refusals."""

    @property
    def typed(self) -> str:
        """The option with the text, as a refusal begins."""
        return f"{self.option} {printable(self.text)}"

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
        return validated(values, f"{self.typed}: ")

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
        return checked(FactorsConfig, values, f"{self.typed}: factors.")

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


def parse_variant(text: str, option: str = "scheme") -> Variant:
    """Reads NAME[:KEY=VALUE]..., or FILE.yaml, a recipe.

    KEY: an option of the scheme, one of SETTINGS, or factors.ROLE.NAME.
    option: of the command line, which refusals name.
    Raises UserError in one line for anything else.
    """
    text = text.strip()
    if text.endswith(".yaml"):
        return _recipe(text, option)
    name, *pairs = text.split(":")
    if name not in SCHEMES:
        raise UserError(
            f"{option} {printable(name, 60)} is unknown: choose one of {', '.join(scheme_names())}"
        )
    typed = f"{option} {printable(text)}"
    options: dict[str, Plain] = {}
    settings: dict[str, Plain] = {}
    factors: dict[str, Plain] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(
                f"{typed}: {printable(repr(pair), 60)} is not of the form KEY=VALUE, "
                f"as in {name}:{next(iter(SCHEMES[name].options), 'init.base')}=..."
            )
        try:
            parsed = parse(value).value
        except YamlError as error:
            raise UserError(f"{typed}: {printable(repr(value), 60)} is not a value") from error
        if key in SETTINGS:
            settings[key] = parsed
        elif key.startswith(FACTORS):
            factors[key.removeprefix(FACTORS)] = parsed
        else:
            options[key] = (
                float(parsed) if isinstance(parsed, int) and not isinstance(parsed, bool) else parsed
            )
    return Variant(text, name, _options(typed, name, options), settings, factors, option)


def _options(typed: str, name: str, given: Mapping[str, Plain]) -> dict[str, float | bool]:
    """Options of the scheme `name`. Raises UserError for one that does not fit."""
    scheme = SCHEMES[name]
    try:
        scheme.check_options(given)
    except ValueError as error:
        others = f"; beside them {', '.join(SETTINGS)}, {FACTORS}ROLE.rate"
        raise UserError(f"{typed}: {error}{others if set(given) - set(scheme.options) else ''}") from error
    return {key: value for key, value in given.items() if isinstance(value, (bool, int, float))}


def _recipe(path: str, option: str) -> Variant:
    """The scheme of a recipe's file. Its rate and warm-up are left to whoever compares.

    Raises UserError for a file without a scheme, or with keys that are none of a recipe's.
    """
    typed = f"{option} {printable(path)}"
    try:
        given = compose(path, near="recipe/*.yaml")
    except UserError as error:
        raise UserError(f"{typed}: {error}") from error
    name = _value(given.values, "model.scheme")
    if "model.scheme" not in given.origins or not isinstance(name, str) or name not in SCHEMES:
        raise UserError(f"{typed}: model.scheme={written(name)}: choose one of {', '.join(scheme_names())}")
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
                f"{typed}: {key} is no part of a recipe, which has model.scheme, its options, "
                f"optimizer.factors, a rate, a schedule, and of the model {', '.join(SETTINGS)}"
            )
    file = Path(path)
    text = f"{file.parent.name}/{file.stem}".lstrip("/")
    options = _value(given.values, "model.scheme_options")
    known = _options(typed, name, options if isinstance(options, dict) else {})
    return Variant(text, name, known, settings, factors, option)


def _value(values: Plain, key: str) -> Plain:
    found = values
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def parse_variants(text: str, option: str = "scheme") -> list[Variant]:
    """Reads a comma-separated list. option: as `parse_variant` has it.

    Raises UserError for an empty list, a scheme that occurs twice, or as `parse_variant`.
    """
    variants = [parse_variant(part, option) for part in text.split(",") if part.strip()]
    if not variants:
        raise UserError(f"{option} names no scheme: give a list such as pre_ln,b2t,deepscalelm_pre_ln")
    texts = [variant.text for variant in variants]
    twice = sorted({printable(one) for one in texts if texts.count(one) > 1})
    if twice:
        raise UserError(f"{option} names {', '.join(twice)} twice: name each scheme once")
    return variants

"""When a stack forgets its tokens, in words: the layers, what helps, and once."""

from __future__ import annotations

import math
from typing import Any

import pytest

from model.depth.schemes import SCHEMES
from pretrain.config.schema import RunConfig
from pretrain.config.yaml_reader import parse
from pretrain.train.callbacks.signal.forgetting import ForgettingWatch, forgetful_layers, remedies, spans
from tests.parallel.training import run_config

FADED = math.log(1e-5)


def collapsed(layers: int = 6, first: int = 3, forgetting: float = FADED) -> list[dict[str, float]]:
    """Rows of a stack that is one vector from layer `first` on."""
    return [
        {"layer": number, "common_share": 0.99 if number >= first else 0.2, "forgetting": forgetting}
        for number in range(1, layers + 1)
    ]


def config(scheme: str, **options: float) -> RunConfig:
    return run_config(model={"scheme": scheme, "scheme_options": options, "num_layers": 6})


def test_the_warning_names_layers_numbers_and_settings() -> None:
    text = ForgettingWatch().check(config("b2t"), collapsed())
    assert text is not None
    assert "in layers 3-6 of 6 the stream is nearly one vector for all tokens" in text
    assert "common share 0.990 to 0.990, limit 0.95" in text
    assert "norms pass on 1e-5.0 of what differs" in text
    for setting in (
        "model.scheme_options.branch: 2",
        "optimizer.factors.stream_norm.rate: 1/layers",
        "optimizer.factors.embedding.rate: sqrt(hidden)",
        "model.init.unigram: true",
        "optimizer.lr below 0.001",
    ):
        assert setting in text


def test_it_comes_once_and_again_after_a_recovery() -> None:
    watch, run = ForgettingWatch(), config("post_ln")
    found = [watch.check(run, rows) for rows in (collapsed(), collapsed(), collapsed(first=6), collapsed())]
    assert [text is not None for text in found] == [True, False, False, True]


@pytest.mark.parametrize(
    "rows",
    [
        collapsed(first=5),  # a third of the layers
        collapsed(forgetting=math.log(0.02)),
        collapsed(forgetting=math.nan),
        [{"layer": 1, "grad_norm": 1.0}],  # nothing was measured, as under a CUDA graph
    ],
)
def test_what_is_no_forgetting(rows: list[dict[str, float]]) -> None:
    assert ForgettingWatch().check(config("b2t"), rows) is None


def test_layers_need_not_be_neighbours() -> None:
    shares = [0.99, 0.99, 0.1, 0.97, 0.2, 0.96]
    assert spans(forgetful_layers(shares, FADED)) == "1-2, 4, 6"


def test_remedies_are_settings_that_the_run_does_not_have() -> None:
    recipe = {
        "embedding": {"rate": "sqrt(hidden)"},
        "stream_norm": {"rate": "1/layers"},
    }
    run = run_config(
        model={"scheme": "post_ln", "scheme_options": {"branch": 1.0}, "init": {"unigram": True}},
        factors=recipe,
    )
    assert remedies(run) == ["optimizer.lr below 0.001"]
    assert remedies(config("deepscalelm_post_ln"))[0] == "model.scheme_options: {alpha: 2, k: 1}"


def test_wide_models_are_told_to_carry_over_what_was_found_at_width_32() -> None:
    """With transfer in width, tables have the rate of the base's."""

    def found(hidden: int, **more: Any) -> list[str]:
        model = {"scheme": "post_ln", "hidden_size": hidden, "scheme_options": {"branch": 1.0}}
        return remedies(run_config({**model, **more}))

    advice, tables = (
        "model.transfer: {method: completep, base_hidden: 32}",
        "optimizer.factors.embedding.rate: ",
    )
    assert advice not in found(32)
    assert tables + "sqrt(hidden)" in found(32)
    assert advice in found(64)
    assert tables + "5.66" in found(64)
    carried = found(64, transfer={"method": "completep", "base_hidden": 16})
    assert advice not in carried
    assert tables + "4" in carried
    muon = run_config({"scheme": "post_ln", "hidden_size": 64}, kind="muon")
    assert not any(one.startswith("model.transfer") for one in remedies(muon))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_remedy_is_an_option_of_its_scheme(scheme: str) -> None:
    """A configuration that follows the advice is one."""
    wide = run_config(model={"scheme": scheme, "hidden_size": 64})
    for advice in remedies(config(scheme)) + remedies(wide)[:3]:
        key, _, value = advice.partition(": ")
        if key == "model.scheme_options.branch":
            config(scheme, branch=float(value))
        elif key == "model.scheme_options":
            config(scheme, alpha=2, k=4)
        elif key == "model.transfer":
            run_config(model={"scheme": scheme, "hidden_size": 64, "transfer": parse(value).value})


def test_each_stack_is_watched_and_named_by_itself() -> None:
    """A decoder that forgets under a sound encoder, then the encoder too."""
    both = run_config(
        model={
            "scheme": "b2t",
            "family": "seq2seq",
            "num_layers": 6,
            "encoder_layers": 3,
            "position": "rotary",
        },
    )
    watch, sound = ForgettingWatch(), collapsed(3, first=4)
    text = watch.check(both, sound + collapsed())
    assert text is not None
    assert text.startswith("decoder: the stack forgets its tokens: in layers 3-6 of 6")
    assert watch.check(both, sound + collapsed()) is None
    text = watch.check(both, collapsed(3, first=1) + collapsed())
    assert text is not None
    assert text.startswith("encoder: the stack forgets its tokens: in layers 1-3 of 3")

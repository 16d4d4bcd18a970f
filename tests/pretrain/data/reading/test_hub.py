"""Names of data sets without a network: one line, and soon."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import huggingface_hub
import pytest

from model.errors import UserError
from pretrain.data.images.reading import find_images
from pretrain.data.reading import hub
from tests.pretrain.data.reading.files import read

READS: dict[str, Callable[[str], object]] = {"text": read, "images": lambda given: find_images([given])}


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for settings, name in ((datasets.config, "HF_ENDPOINT"), (huggingface_hub.constants, "ENDPOINT")):
        monkeypatch.setattr(settings, name, "http://127.0.0.1:9")  # refuses at once
    monkeypatch.setattr(hub, "WAIT_S", 0.0)


@pytest.mark.usefixtures("unreachable")
@pytest.mark.parametrize(
    ("kind", "given"), [("text", "nosuch"), ("text", "imdb:plain:test"), ("images", "no/such")]
)
def test_a_mistyped_name_is_one_line_and_does_not_wait(
    caplog: pytest.LogCaptureFixture, kind: str, given: str
) -> None:
    started = time.monotonic()
    with caplog.at_level(logging.WARNING), pytest.raises(UserError) as caught:
        READS[kind](given)
    assert time.monotonic() - started < 10
    assert not caplog.records
    line = str(caught.value)
    assert line.startswith(f"INPUT {given}: no such file or folder here, and the Hub cannot be reached for")
    assert "\n" not in line
    assert datasets.config.HF_HUB_OFFLINE is False


@pytest.mark.usefixtures("unreachable")
def test_the_hub_is_not_asked_where_the_user_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_no_answer", lambda name: pytest.fail("the Hub was asked"))
    with pytest.raises(UserError, match="the cache has no data set of that name .*HF_DATASETS_OFFLINE"):
        read("nosuch")


@pytest.mark.usefixtures("unreachable")
def test_what_the_cache_holds_is_read_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_dataset` finds the cache by itself, once it does not ask the Hub."""
    asked: list[object] = []

    def load(name: str, config: str | None, **options: object) -> datasets.Dataset:
        asked.append((name, config, datasets.config.HF_HUB_OFFLINE))
        return datasets.Dataset.from_dict({"text": ["one", "two"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("imdb:plain:test") == (["one", "two"], [])
    assert asked == [("imdb", "plain", True)]
    monkeypatch.setattr(hub, "_no_answer", lambda name: "")
    read("imdb")
    assert asked[1] == ("imdb", None, False)

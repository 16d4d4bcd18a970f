"""The table of quick starts: one entry a family of models, by the name that `model.family` takes.

An entry says where its data come from, which configuration is trained, and what one does with the
model then. `quickstart.py` does the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FATHOM = "tools.cli"
"""The module behind `fathom`."""
SCHEME = "deepscalelm_pre_ln"
"""Trained where none is asked for."""


@dataclass(frozen=True)
class Making:
    """A command that makes something of the data, unless it is there."""

    made: Path
    arguments: tuple[str, ...]
    """Of `fathom`, or of another module."""
    files: tuple[str, ...] = ()
    """Those of the arguments that are many."""
    files_are: str = ""
    """What is shown instead of them."""
    module: str = FATHOM
    """Whose arguments they are."""


@dataclass(frozen=True)
class Trial:
    """A command that shows what the trained model does."""

    title: str
    arguments: tuple[str, ...]
    """{folder} is the run."""
    module: str = FATHOM


@dataclass(frozen=True)
class QuickStart:
    """What the quick start of a family does in its own way."""

    name: str
    """Of its configuration, its data and its run."""
    makings: Callable[[str], list[Making]]
    """From the name to the commands that make the data, in order."""
    auto_class: str
    """Of transformers, which loads the export."""
    go_on: str
    """A command to try the model with; {folder} is the run."""
    overrides: tuple[str, ...] = ()
    """What of a recipe does not suit the family."""
    trials: tuple[Trial, ...] = ()
    """What is shown of the model before the report."""

    @property
    def config(self) -> str:
        """The configuration's file."""
        return f"configs/{self.name}.yaml"

    @property
    def data(self) -> Path:
        """The data set's folder."""
        return _data(self.name)


def _data(name: str) -> Path:
    return Path("data") / name


def _library(name: str, *tokenizer: str) -> list[Making]:
    """A tokenizer of the Python standard library's source text, and the text prepared with it.

    tokenizer: options of its training.
    """
    from pretrain.data.reading.inputs import standard_library_files

    files = tuple(str(path) for path in standard_library_files())
    note = f"<{len(files)} files of the Python standard library>"
    model, data = Path(f"data/{name}_tokenizer.model"), _data(name)
    train = ("tokenizer", "train", *files, *tokenizer, "--out", str(model))
    prepare = ("data", "prepare", *files, "--out", str(data), "--tokenizer", str(model))
    split = ("--split", "0.97,0.03,0", "--split-by", "file")
    return [
        Making(model, train, files, note),
        Making(data / "dataset.json", (*prepare, *split), files, note),
    ]


def _catalogues(name: str) -> list[Making]:
    """English messages of Python packages with German translations, and a tokenizer of both."""
    text, model, data = Path("data/en-de"), Path(f"data/{name}_tokenizer.model"), _data(name)
    files, sides = str(text / "*.jsonl"), ("--pairs", "en,de")
    train = ("tokenizer", "train", files, *sides, "--vocab-size", "1024", "--special", "pad")
    prepare = ("data", "prepare", files, *sides, "--tokenizer", str(model), "--out", str(data))
    return [
        Making(text / "SOURCES.json", (str(text),), module="tools.dev.parallel_text"),
        Making(model, (*train, "--out", str(model))),
        Making(data / "dataset.json", (*prepare, "--split", "0.94,0.03,0.03")),
    ]


def _digits(name: str) -> list[Making]:
    """Images of digits in folders, and a data set of them."""
    images, data = f"data/{name}_images", _data(name)
    prepare = ("data", "prepare", images, "--images", "8", "--channels", "1", "--split", "0.8,0.2,0")
    return [
        Making(Path(images) / DIGITS, (images,), module="tools.dev.digit_images"),
        Making(data / "dataset.json", (*prepare, "--out", str(data))),
    ]


def _prompts(name: str) -> list[Making]:
    """Spoken prompts of Debian packages with their words, and a tokenizer of these."""
    clips, model, data = Path(f"data/{name}_clips"), Path(f"data/{name}_tokenizer.model"), _data(name)
    table, text = str(clips / "clips.tsv"), ("--text-key", "transcript")
    train = ("tokenizer", "train", table, *text, "--vocab-size", "512", "--special", "pad")
    prepare = ("data", "prepare", table, "--speech", "path,transcript", "--tokenizer", str(model))
    chosen = ("--max-seconds", "8", "--split", "0.9,0.1,0", "--out", str(data))
    return [
        Making(clips / PROMPTS, (str(clips),), module="tools.dev.spoken_prompts"),
        Making(model, (*train, "--out", str(model))),
        Making(data / "dataset.json", (*prepare, *chosen)),
    ]


PROMPTS = "SOURCE.txt"
"""A file beside the table of spoken prompts, written last."""
DIGITS = "SOURCE.txt"
"""A file beside the digits, written last."""
QUICKSTARTS = {
    "gpt": QuickStart(
        name="quickstart",
        makings=lambda name: _library(name, "--vocab-size", "4096"),
        auto_class="AutoModelForCausalLM",
        go_on="fathom generate {folder} --prompt 'def main(' --temperature 1 --top-p 0.95",
    ),
    "bert": QuickStart(
        name="quickstart_bert",
        makings=lambda name: _library(name, "--vocab-size", "1024", "--special", "all"),
        auto_class="AutoModelForMaskedLM",
        go_on="fathom fill {folder} 'def f(self): return [MASK].name'",
    ),
    "seq2seq": QuickStart(
        name="quickstart_translation",
        makings=_catalogues,
        auto_class="AutoModelForSeq2SeqLM",
        go_on="fathom translate {folder} --text 'Select the file to open.'",
        trials=(
            Trial(
                "Ten messages that it was not trained on",
                ("{folder}",),
                module="tools.dev.show_translations",
            ),
            Trial(
                "BLEU and chrF on them all, beside those of copying the source",
                ("eval", "{folder}", "--split", "test", "--translate"),
            ),
        ),
    ),
    "speech": QuickStart(
        name="quickstart_speech",
        makings=_prompts,
        auto_class="AutoModelForSpeechSeq2Seq",
        go_on="fathom transcribe {folder} data/quickstart_speech_clips/added.wav",
        # Recipes that carry a rate over from another width have no rule for two stacks, and a start
        # at the words' frequencies needs a bias that transformers' class has not.
        overrides=(
            "model.transfer.method=none",
            "model.transfer.base_hidden=null",
            "model.init.unigram=false",
        ),
        trials=(
            Trial(
                "Wrong words of prompts that it was not trained on",
                ("eval", "{folder}", "--translate"),
            ),
        ),
    ),
    "vit": QuickStart(
        name="quickstart_vit",
        makings=_digits,
        auto_class="AutoModelForImageClassification",
        # Recipes that carry a rate over from another width have no rule for patches.
        overrides=("model.transfer.method=none", "model.transfer.base_hidden=null"),
        go_on=".venv/bin/python -m tools.dev.check_export {folder} "
        "--prompt data/quickstart_vit_images/3/0003.png",
    ),
}

"""dataset.json: what a data set folder says about itself. Light: no torch, no Megatron."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from model.config import ModelConfig
from model.errors import UserError
from model.hf.tokenizer.special import Role
from model.records import Record, as_record, read_json
from model.speech import FrameMoments
from model.words import printable
from pretrain.config.load import complete_model
from pretrain.config.schema import RunConfig

MANIFEST = "dataset.json"
FORMAT: Literal[1] = 1
AGAIN = "prepare or copy the data set again"
Count = Annotated[int, Field(ge=0, lt=2**62)]
Vocabulary = Annotated[int, Field(ge=1, lt=2**31)]
SplitName = Literal[
    "train",
    "validation",
    "test",
    "train_source",
    "train_target",
    "validation_source",
    "validation_target",
    "test_source",
    "test_target",
]
"""Names of files. A data set of pairs has two for each split, `PAIRED`."""
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
PAIRED: dict[SplitName, tuple[SplitName, SplitName]] = {
    "train": ("train_source", "train_target"),
    "validation": ("validation_source", "validation_target"),
    "test": ("test_source", "test_target"),
}
"""Sources and targets of a split, which have equal document numbers."""


class SplitFacts(Record):
    """The two files of a split."""

    documents: Count
    tokens: Count
    """With end marks."""
    bytes: Count
    """Of the text in UTF-8."""
    sha256: str
    """Of the .bin file."""
    index_sha256: str | None = None
    """Of the .idx file. This and what follows is missing in data sets of version 0.1.0."""
    sample_sha256: str | None = None
    """Of the blocks of both files that are compared at every start."""


class BrokenFacts(Record):
    """A record that gave no document; the fields are those of `Broken`."""

    file: str
    line: int
    reason: str


class BrokenRecords(Record):
    """What was left out."""

    count: Count = 0
    examples: tuple[BrokenFacts, ...] = ()


class SourceFacts(Record):
    """One INPUT of `fathom data prepare`."""

    input: str
    kinds: tuple[str, ...]
    parts: int
    licences: dict[str, str] = Field(default_factory=dict)
    """Of its files, as `FILE.license` beside them says (SPDX)."""


class PairFacts(Record):
    """What only a data set of pairs has."""

    source: str
    target: str
    """What `--pairs` called the two sides."""
    max_tokens: Count
    """Of a side with its end mark."""
    source_token_correlation: float
    """As `token_correlation`, of the sources; that and all counts of tokens are of the targets."""
    one_side: BrokenRecords
    """Pairs of which one side is empty, left out."""
    too_long: BrokenRecords
    """Pairs with more than max_tokens, left out."""
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    """Inputs that are these splits, and nothing else is; none where shares decide."""
    held_out: Count = 0
    """Pairs left out because an input of `validation` or `test` has their source."""


class ImageFacts(Record):
    """What only a data set of images has."""

    classes: tuple[str, ...]
    """Their names, by the numbers that labels are."""
    channels: Count
    height: Count
    width: Count
    """Of every image that is stored, in pixels."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Of each channel in train, of pixels in 0 .. 1."""
    patch_correlations: dict[int, Annotated[float, Field(ge=0, lt=1)]] = Field(default_factory=dict)
    """Of two patches of an image, standardised, by the size of patches."""


class SpeechFacts(PairFacts):
    """What only a data set of speech has: its sources are frames, its targets what is said."""

    filters: Count
    """Numbers of a frame."""
    normalise: Literal["utterance", "global"]
    """Over which frames each filter is given mean 0 and variance 1: the clip's, or all of train."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Of each filter in train, before."""
    moments: FrameMoments
    """Of train."""
    max_seconds: float
    """Of a clip; longer ones are among those that are too long."""


class Manifest(Record):
    """The content of dataset.json."""

    format: Literal[1]
    tokenizer_sha256: str
    vocab_size: Vocabulary
    """Without padding."""
    eod_id: Count
    special: dict[Role, Count] = Field(default_factory=dict)
    """Ids of the tokenizer's special tokens. This and what follows is missing in version 0.1.0."""
    special_in_text: bool = False
    """Names of special tokens in the texts stand for those tokens. Missing in version 0.1.0."""
    begin_id: Count | None = None
    """What every document begins with; nothing of the kind where it is null."""
    seed: int = 0
    split: tuple[float, ...] = ()
    """Shares of train, validation and test."""
    split_by: str = ""
    text_key: str = ""
    limit: int | None = None
    splits: dict[SplitName, SplitFacts]
    unigram_entropy_nats: float | None = None
    """Loss of a model that only knows how often each token occurs in train."""
    token_correlation: float | None = None
    """Sum of the squared token frequencies of train."""
    token_counts_sha256: str | None = None
    """Of the file that says how often each token occurs in train. Missing in version 0.1.0."""
    empty_documents: Count = 0
    broken: BrokenRecords = BrokenRecords()
    left_out: tuple[str, ...] = ()
    """Files of folders that only describe the data beside them."""
    sources: tuple[SourceFacts, ...] = ()
    pairs: PairFacts | None = None
    """Of a data set of pairs; null where documents are texts."""
    speech: SpeechFacts | None = None
    """Of a data set of recordings, whose sources are filterbanks."""
    images: ImageFacts | None = None
    """Of a data set of images, whose tokens are the bytes of labels and pixels."""
    versions: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        if self.eod_id >= self.vocab_size:
            raise ValueError(f"eod_id {self.eod_id} is not in a vocabulary of {self.vocab_size}")
        for number in (*self.special.values(), self.begin_id or 0):
            if number >= self.vocab_size:
                raise ValueError(f"special token {number} is not in a vocabulary of {self.vocab_size}")
        for sides in PAIRED.values() if self.both is not None else ():
            found = [self.splits[side].documents for side in sides if side in self.splits]
            if len(found) != len(sides) or len(set(found)) > 1:
                raise ValueError(f"{sides[0]} and {sides[1]} have {found} documents, which must be equal")
        return self

    @property
    def both(self) -> PairFacts | None:
        """Of a data set whose splits have two sides each."""
        return self.pairs or self.speech

    @property
    def moments(self) -> FrameMoments | None:
        """Of a data set of speech."""
        return None if self.speech is None else self.speech.moments

    @property
    def patch_correlations(self) -> dict[int, float]:
        """Of a data set of images, by the size of patches; empty where there are none."""
        return {} if self.images is None else self.images.patch_correlations

    @property
    def labels(self) -> int:
        """How many tokens, or images, of train are counted."""
        facts = self.facts("", self.counted)
        return facts.tokens if self.images is None else facts.documents

    @property
    def counted(self) -> SplitName:
        """The files whose tokens are counted: a model's predictions are among them."""
        return "train" if self.both is None else PAIRED["train"][1]

    def facts(self, folder: Path | str, split: str) -> SplitFacts:
        """The facts of a split. Raises UserError, which names the folder, where there is none."""
        found = next((facts for name, facts in self.splits.items() if name == split), None)
        if found is not None:
            return found
        if self.both is not None and split in PAIRED:
            holds = "pairs, which only train.task=translation reads"
            if self.speech is not None:
                holds = "speech, which only a model of model.family=speech reads"
            raise UserError(f"data set {folder} holds {holds}")
        raise self._no_split(folder, split)

    def sides(self, folder: Path | str, split: str) -> tuple[SplitName, SplitName]:
        """The files of both sides of a split of pairs.

        Raises UserError, which names the folder, where there is no such split.
        """
        found = next((sides for name, sides in PAIRED.items() if name == split), None)
        if found is None or found[0] not in self.splits:
            raise self._no_split(folder, split)
        return found

    def _no_split(self, folder: Path | str, split: str) -> UserError:
        names = [name for name, sides in PAIRED.items() if name in self.splits or sides[0] in self.splits]
        return UserError(f"data set {folder}: no split {split!r}; it has {', '.join(names)}")

    def text(self) -> str:
        """What is written to dataset.json."""
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"


class _Sized(Record):
    vocab_size: Vocabulary


def load_manifest(folder: str | Path) -> Manifest:
    """Reads the manifest of a data set folder.

    Raises UserError when there is none, it is damaged, or this version cannot read it.
    """
    path = Path(folder) / MANIFEST
    try:
        content = read_json(path, AGAIN)
    except OSError as error:
        advice = "name a folder written by `fathom data prepare`"
        raise UserError(f"data set {folder}: no readable {MANIFEST} ({error.strerror}); {advice}") from error
    if isinstance(content, dict) and content.get("format") != FORMAT:
        found = printable(repr(content.get("format")))
        differs = f"{MANIFEST} has format {found}, this version reads format {FORMAT}"
        raise UserError(f"data set {folder}: {differs}; prepare the data set again")
    return as_record(content, Manifest, str(path), AGAIN)


def vocabulary_of(folder: str | Path) -> int | None:
    """Vocabulary of a data set, without padding; None while the folder holds none.

    Raises UserError for a damaged dataset.json.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    return as_record(read_json(path, AGAIN), _Sized, str(path), AGAIN).vocab_size


def sized_model(config: RunConfig) -> ModelConfig:
    """The model, with the vocabulary of its data where it says none and they are there.

    Raises UserError for a damaged dataset.json.
    """
    return complete_model(config, config.model.vocab_size or vocabulary_of(config.data.corpora[0].path))


def fingerprint(manifest: Manifest, split: SplitName | str) -> str:
    """Returns a hexadecimal name for the tokens of a split, the same wherever the folder lies.

    Orders of samples depend on it, so that it may never change for the same tokens.
    """
    facts = manifest.facts("", split)
    named = {key: getattr(facts, key) for key in ("documents", "tokens", "bytes", "sha256")}
    identity = json.dumps([manifest.tokenizer_sha256, split, named], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()


def pair_fingerprint(manifest: Manifest, split: SplitName | str) -> str:
    """As `fingerprint`, of both sides of a split of pairs."""
    names = [fingerprint(manifest, side) for side in manifest.sides("", split)]
    return hashlib.sha256("/".join(names).encode()).hexdigest()

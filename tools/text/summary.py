"""What `fathom data` says of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from model.words import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pretrain.data.manifest import ImageFacts, Manifest


def print_summary(folder: Path, manifest: Manifest) -> None:
    """Prints splits and their sizes, and what else there is to say."""
    from rich.console import Console
    from rich.table import Table

    columns = ("split", "documents", "tokens", "bytes of text", "bytes/token")
    if manifest.speech is not None:
        columns = ("split", "clips", "numbers", "bytes of files", "bytes of files/number")
    if manifest.images is not None:
        columns = ("split", "images", "bytes", "bytes of files", "bytes of files/byte")
    table = Table(*columns, title=printable(folder), title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, split in manifest.splits.items():
        ratio = f"{split.bytes / split.tokens:.2f}" if split.tokens else "-"
        table.add_row(name, f"{split.documents:,}", f"{split.tokens:,}", f"{split.bytes:,}", ratio)
    console = Console()
    console.print(table)
    for line in _remarks(manifest):
        console.out(line, highlight=False)


def _of_images(images: ImageFacts) -> Iterator[str]:
    mean, std = (", ".join(f"{value:.4f}" for value in values) for values in (images.mean, images.std))
    yield f"images of {images.channels}x{images.height}x{images.width}, mean {mean}, standard deviation {std}"
    usual = {
        size: value for size, value in images.patch_correlations.items() if size in (2, 4, 8, 14, 16, 32)
    }
    shown = ", ".join(f"{size}: {value:.3f}" for size, value in usual.items())
    yield f"correlation of patches by their size {shown}"


def _of_recordings(manifest: Manifest) -> Iterator[str]:
    from pretrain.data.speech.filterbanks import FRAMES_PER_SECOND

    speech = manifest.speech
    assert speech is not None
    hours = manifest.splits["train_source"].tokens / speech.filters / FRAMES_PER_SECOND / 3600
    yield (
        f"{hours:.2f} h of speech in train, {speech.filters} filters, normalised by {speech.normalise}; "
        f"correlation of tokens {speech.moments.correlation:.3f}"
    )


def _remarks(manifest: Manifest) -> Iterator[str]:
    """What there is to say about a data set, a line each."""
    from pretrain.data.reading.documents import Broken

    numbers = {
        "unigram entropy": manifest.unigram_entropy_nats,
        "token correlation": manifest.token_correlation,
    }
    if manifest.images is not None:
        yield from _of_images(manifest.images)
        numbers = {"entropy of classes": manifest.unigram_entropy_nats}
    known = [f"{name} {value:.5g}" for name, value in numbers.items() if value is not None]
    empty = f"empty documents {manifest.empty_documents}"
    if manifest.speech is not None:
        yield from _of_recordings(manifest)
    if manifest.images is None:
        yield ", ".join([f"vocabulary {manifest.vocab_size}", *known, empty])
    else:
        yield ", ".join([f"classes {manifest.vocab_size}", *known])
    if "mask" in manifest.special:
        ids = ", ".join(f"{name} {number}" for name, number in manifest.special.items())
        begins = "begin with cls" if manifest.begin_id is not None else "have no mark at their begin"
        yield f"special tokens {ids}; documents {begins}"
    paired = manifest.both is not None
    for share, (name, split) in zip(
        manifest.split, list(manifest.splits.items())[:: 1 + paired], strict=False
    ):
        if share and not split.documents:
            yield f"note: the {name} split is empty; give more documents or a larger share in --split"
    if manifest.left_out:
        names = ", ".join(printable(name, 4096) for name in manifest.left_out)
        yield f"note: left out, as it only describes the data: {names}; name it to read it"
    both, what = manifest.both, "pairs" if manifest.speech is None else "clips"
    if both is not None and both.held_out:
        yield f"left out {both.held_out} {what} whose source is in a split of its own"
    left_out = {"broken records": manifest.broken}
    if both is not None:
        longest = f"{both.max_tokens} tokens"
        if manifest.speech is not None:
            longest += f" or {manifest.speech.max_seconds:g} s"
        left_out[f"{what} of which one side is empty"] = both.one_side
        left_out[f"{what} longer than {longest}"] = both.too_long
    for what, broken in left_out.items():
        if not broken.count:
            continue
        yield f"left out {broken.count} {what}, the first {len(broken.examples)}:"
        for example in broken.examples:
            yield f"  {printable(Broken(example.file, example.line, example.reason).place, 5000)}"

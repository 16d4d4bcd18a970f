"""Files of a model of the Hugging Face Hub, fetched or found in its cache. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from model.errors import UserError
from model.words import printable


def download(name: str, patterns: Sequence[str]) -> Path:
    """The folder with those files of a model that match a pattern.

    Raises UserError where the Hub gives none.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = printable((str(error).splitlines() or [type(error).__name__])[0])
        raise UserError(
            f"{printable(repr(name))} is neither a folder nor a model that the Hub gives: {reason}"
        ) from error

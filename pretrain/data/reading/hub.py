"""Data sets that the `datasets` library knows by name, of the Hub or of its cache."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from model.errors import UserError
from model.words import printable

TRIES, WAIT_S = 2, 1.0
ANSWERS_WITHIN_S = 10.0
"""The library's own six tries wait for 23 s, which a mistyped file name would cost as well."""


def load_named(given: str, name: str, config: str | None = None, **options: Any) -> Any:
    """As `datasets.load_dataset`. The cache alone is asked where the Hub cannot be reached.

    given: the INPUT that is the data set.
    Raises UserError where neither has such a data set.
    """
    import datasets

    offline = datasets.config.HF_HUB_OFFLINE
    silent = "" if offline or Path(name).exists() else _no_answer(name)
    try:
        datasets.config.HF_HUB_OFFLINE = offline or bool(silent)
        return datasets.load_dataset(name, config, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        why = f"the datasets library cannot load a data set of that name: {printable(str(error), 300)}"
        if isinstance(error, ConnectionError) and silent:
            why = f"the Hub cannot be reached for a data set of that name ({printable(silent, 300)})"
        elif isinstance(error, ConnectionError) and offline:
            asked = "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set, and the Hub is not asked"
            why = f"the cache has no data set of that name ({asked})"
        raise UserError(f"INPUT {printable(given)}: no such file or folder here, and {why}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _no_answer(name: str) -> str:
    """Why the Hub gives no answer about a data set; empty where it gives one, whichever."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    reason = ""
    for number in range(TRIES):
        time.sleep(WAIT_S if number else 0)
        try:
            HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info(name, timeout=ANSWERS_WITHIN_S)
        except (HfHubHTTPError, HFValidationError):
            return ""
        except Exception as error:  # of whichever library the client is made with
            reason = str(error) or type(error).__name__
        else:
            return ""
    return reason

"""Modelling files that transformers copies when it loads an export go to a folder of the test run, not to the user's cache."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# Read once, when transformers is imported.
if "HF_MODULES_CACHE" not in os.environ:
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf_modules_")
    atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

"""Silence for libraries that print progress bars and reports while models load and save."""

from __future__ import annotations

import io
from collections.abc import Generator
from contextlib import contextmanager, redirect_stderr


@contextmanager
def quiet_transformers() -> Generator[None]:
    """Keep transformers to its errors, and put its settings back afterwards.

    Its reports of missing weights are silent too: who loads checks those and raises instead.
    """
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        # The GGUF reader has a bar of its own that heeds no setting.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()

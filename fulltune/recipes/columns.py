"""What errors of columns advise where columns are options, not settings."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager

from fulltune.errors import DataError

_SETTING = re.compile(r"`task\.columns=\{([^}]*)\}`")


@contextmanager
def columns_as_options() -> Generator[None]:
    """Advise `--column text=question` in an error of the rows, not `task.columns`."""
    try:
        yield
    except DataError as error:
        error.hint = error.hint and _SETTING.sub(_as_options, error.hint)
        raise


def _as_options(setting: re.Match[str]) -> str:
    pairs = (pair.partition(": ") for pair in setting[1].split(", "))
    return "`" + " ".join(f"--column {ours}={theirs}" for ours, _, theirs in pairs) + "`"

"""Errors whose cause a user can see and mend. The command line prints them without a traceback.

FulltuneError
├── ConfigError       a setting is unknown, out of range, or contradicts another
├── AssetError        an asset, model or data set could not be fetched or is not what was pinned
├── DataError         a file or record is not what the task declares
├── ModelError        a model folder is incomplete, corrupt, or cannot do the task
├── MemoryPlanError   the run does not fit the stated memory
├── CheckpointError   a checkpoint is missing, incomplete, corrupt, or of another model
├── RunFolderError    the run folder holds another run, or cannot be written
├── TrainingError     the run itself failed: a loss or gradient that is not finite (exit code 1)
└── MissingExtraError an optional package is not installed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

LIKENESS = 0.75
"""How like a name must be to be suggested: a slip of the fingers, not another word."""


def near_names(name: str, names: Iterable[str], count: int = 1) -> list[str]:
    """The names that a user may have meant, the likeliest first."""
    return difflib.get_close_matches(name, list(names), n=count, cutoff=LIKENESS)


def listed(names: Iterable[str]) -> str:
    """Names in code quotes with commas, for messages; `none` where there is none."""
    return ", ".join(f"`{name}`" for name in names) or "none"


def near_paths(path: Path, pattern: str = "*", count: int = 1) -> list[Path]:
    """The entries of the folder of a missing path whose names are like its own, endings aside."""
    folder = path.parent
    if not folder.is_dir():
        return []
    entries: dict[str, list[Path]] = {}
    for entry in sorted(folder.glob(pattern)):
        if not entry.name.startswith("."):
            entries.setdefault(entry.stem, []).append(entry)
    return [entry for stem in near_names(path.stem, entries, count) for entry in entries[stem]][
        :count
    ]


def first_line(error: BaseException) -> str:
    """What an error of a library says first; the rest is often pages of it."""
    return str(error).strip().split("\n")[0]


class FulltuneError(Exception):
    """Base of all errors that are not bugs.

    Args:
        message: what was given and why it cannot be used.
        hint: what to do about it; printed on a line of its own.
    """

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(FulltuneError, ValueError):
    """A setting is unknown, out of range, or contradicts another."""


class AssetError(FulltuneError, OSError):
    """An asset, model or data set could not be fetched, or is not what was pinned."""


class DataError(FulltuneError, ValueError):
    """A file or record is not what the task declares."""


class ModelError(FulltuneError, ValueError):
    """A model folder is incomplete or corrupt, or cannot do the task."""


class MemoryPlanError(FulltuneError, MemoryError):
    """The run does not fit the stated memory."""


class CheckpointError(FulltuneError, RuntimeError):
    """A checkpoint is missing, incomplete, corrupt, or of another model."""


class RunFolderError(FulltuneError, OSError):
    """The run folder holds another run, or cannot be written."""


class TrainingError(FulltuneError, ArithmeticError):
    """The run itself failed: a loss or gradient that is not finite."""

    exit_code = 1


class MissingExtraError(FulltuneError, ImportError):
    """An optional package is not installed."""

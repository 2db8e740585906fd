"""The folder of a run: whose it is, what it began with, and that no other run writes into it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from fulltune.config import Settings, build_config, differing_keys, dump_config, read_yaml
from fulltune.errors import ConfigError, FulltuneError, RunFolderError
from fulltune.tracking import restore_numbers, to_json_text

S = TypeVar("S", bound=Settings)

CONFIG, MANIFEST, CHECKPOINTS, MODEL = "config.yaml", "manifest.json", "checkpoints", "model"
MODEL_LAST = "model-last"
"""Weights of the last step, where those of an earlier one were the best."""
EVALUATIONS = "evaluations"
"""Results of `fulltune evaluate`, a file for each data set."""
LOCK = ".lock"
SETTINGS_BEING_WRITTEN = (f".{CONFIG}.", ".search.yaml.")
"""How the names of temporary files begin that a run or a search leaves when killed at its start."""

CHANGEABLE = (
    "device", "memory", "num_workers", "save_every", "keep_checkpoints",
    "evaluate.stop_after", "evaluate.num_samples", "tracking.sinks", "tracking.project",
    "tracking.offline", "run_dir",
)  # fmt: skip
"""Settings that a resumed run may change: they do not change what is learned."""


def has_run(folder: Path) -> bool:
    """Whether a run was started in the folder."""
    return (folder / CONFIG).exists()


def check_run_folder(folder: Path, config: S, *, resume: bool) -> S | None:
    """Whether a run may start, or go on, in ``folder``; nothing is written.

    Returns:
        The settings the run there was started with, or None for a new run.

    Raises:
        RunFolderError: the folder holds another run or other files, or cannot be written.
    """
    if has_run(folder):
        try:
            found = build_config(type(config), read_yaml(folder / CONFIG))
        except ConfigError as error:
            raise RunFolderError(
                f"`{folder}` holds a run whose settings this version cannot read: {error}",
                hint="give `run_dir` another name",
            ) from None
        state = "a finished" if is_finished(folder) else "an unfinished"
        if not resume:
            use = "go on with it by `--resume`"
            if is_finished(folder):
                use = f"look at it by `fulltune evaluate {folder}` or `fulltune report {folder}`"
            raise RunFolderError(
                f"`{folder}` holds {state} run", hint=f"give `run_dir` another name, or {use}"
            )
        differing = [
            key
            for key in differing_keys(found, config)
            if key not in CHANGEABLE and not _only_resolved(key, found, config)
        ]
        if differing:
            raise RunFolderError(
                f"`{folder}` holds {state} run of other settings (differs in "
                f"{', '.join(f'`{key}`' for key in differing)})",
                hint="give `run_dir` another name, or resume with the settings of the run",
            )
        return found
    # A run killed at its very start leaves hidden files, and nothing that could be lost.
    if folder.is_dir() and any(not _is_leftover(path) for path in folder.iterdir()):
        raise RunFolderError(
            f"`{folder}` is not empty, and holds no run", hint="give `run_dir` another name"
        )
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"`{folder}` is a file", hint="give `run_dir` another name")
    parent = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not parent.is_dir():
        raise RunFolderError(
            f"`{folder}` cannot be made: `{parent}` is a file",
            hint="give `run_dir` a folder you may write in",
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RunFolderError(
            f"`{folder}` cannot be made: no permission to write in `{parent}`",
            hint="give `run_dir` a folder you may write in",
        )
    return None


def _only_resolved(key: str, found: Settings, config: Settings) -> bool:
    """`auto` was resolved when the run began; asking for `auto` again asks for the same."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return bool(value == "auto")


def create_run_folder(folder: Path, config: Settings) -> None:
    """Make the folder with the full settings of the run.

    Raises:
        RunFolderError: it cannot be written.
    """
    with write_errors(folder):
        write_atomically(folder / CONFIG, dump_config(config))


@contextmanager
def locked(folder: Path, *, doing: str = "training", setting: str = "run_dir") -> Generator[None]:
    """Make the folder, and hold it for this process; the lock ends with it, however it ends.

    Args:
        folder: made where it is not.
        doing: what the other process does, for the message.
        setting: the setting that names the folder.

    Raises:
        RunFolderError: another process works in it, or it cannot be written.
    """
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(
                f"another process is {doing} in `{folder}`",
                hint=f"wait for it, or give `{setting}` another name",
            ) from None
        yield


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by ``text``; a reader sees the old or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)  # where the disk was full, its room is wanted back


@contextmanager
def write_errors(folder: Path) -> Generator[None]:
    """Say of a full disk or a lack of permission where it is and what to do.

    Raises:
        RunFolderError: what was done inside could not write.
    """
    try:
        yield
    except FulltuneError:
        raise
    except (OSError, SafetensorError) as error:
        raise RunFolderError(
            f"`{folder}` cannot be written: {error}",
            hint="free some space, or make it writable, then go on with `--resume`; "
            "checkpoints are intact",
        ) from None


@contextmanager
def writing(path: Path) -> Generator[None]:
    """Say of a file outside the run folder, such as a page, that it cannot be written.

    Raises:
        RunFolderError: what was done inside could not write.
    """
    try:
        yield
    except FulltuneError:
        raise
    except OSError as error:
        raise RunFolderError(
            f"`{path}` cannot be written: {error.strerror or error}", hint="name another place"
        ) from error


def flush_folder(folder: Path) -> None:
    """Have the files of a folder on the disk itself."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_folder(temporary: Path, final: Path) -> None:
    """Put a finished folder in the place of ``final``."""
    if final.exists():
        old = final.with_name(f".{final.name}.{os.getpid()}.old")
        final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old)
    else:
        temporary.rename(final)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run was writing; whoever calls holds the lock."""
    with write_errors(folder):
        for path in (*folder.glob(".*.tmp"), *folder.glob(".*.old")):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _is_leftover(path: Path) -> bool:
    return path.name == LOCK or (
        path.name.startswith(SETTINGS_BEING_WRITTEN) and path.suffix == ".tmp"
    )


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write `manifest.json`: where everything in the run came from, and what came out."""
    write_atomically(folder / MANIFEST, to_json_text(manifest, indent=1))


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `write_manifest` wrote; empty where the run has none yet."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        return restore_numbers(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise RunFolderError(
            f"`{path}` cannot be read: {error}",
            hint="the file was changed after the run wrote it; restore it",
        ) from None


def is_finished(folder: Path) -> bool:
    """Whether the run in the folder came to its end."""
    return bool(read_manifest(folder).get("finished"))

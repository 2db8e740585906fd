"""Checkpoints that are whole or not there.

A checkpoint is written into a hidden temporary folder, every file fsynced and hashed into a
manifest, and the folder renamed: whoever finds `step-00000100` finds all of it. One whose manifest
does not match is never loaded; the last valid one is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fulltune.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose files were found to be whole."""

    path: Path
    step: int
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors saved under ``name``."""
        return load_file(self.path / f"{name}.safetensors")


def save_checkpoint(
    folder: Path,
    name: str,
    *,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
) -> Path:
    """Write one checkpoint, whole or not at all.

    Args:
        folder: where checkpoints are kept.
        name: of the checkpoint, such as `step-00000100`.
        step: finished updates.
        tensors: file name -> tensors by name.
        state: what JSON can hold.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; earlier ones are intact.
    """
    final = folder / name
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        temporary.mkdir()
        for file_name, content in tensors.items():
            save_file(dict(content), temporary / f"{file_name}.safetensors")
        (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
        files = {
            path.name: {"size": path.stat().st_size, "sha256": _flushed_sha256(path)}
            for path in sorted(temporary.iterdir())
        }
        manifest = {"format": FORMAT, "step": step, "files": files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _flushed_sha256(temporary / MANIFEST)
        _flush_folder(temporary)
        if final.exists():  # of an earlier life of this run, at the same step
            replaced = folder / f".{name}.{os.getpid()}.old"
            final.rename(replaced)
            temporary.rename(final)
            shutil.rmtree(replaced)
        else:
            temporary.rename(final)
        _flush_folder(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to `{folder}`: {error}",
            hint="free some space or make the folder writable, then go on with `--resume`; "
            "earlier checkpoints are intact",
        ) from None
    return final


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint that `find_damage` has found whole."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return Checkpoint(path, _step_of(path), state)


def last_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, and what was wrong with newer ones.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    problems: list[str] = []
    remove_unfinished(folder)
    for path in _by_step(folder):
        problem = find_damage(path)
        if problem is None:
            return open_checkpoint(path), problems
        problems.append(f"{path.name}: {problem}")
    if problems:
        raise CheckpointError(
            f"no checkpoint in `{folder}` is whole: {'; '.join(problems)}",
            hint="start again in another run folder",
        )
    return None, problems


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None if every file is there with its recorded hash."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest.get("format") != FORMAT:
            return f"its format is {manifest.get('format')!r}, and this version reads {FORMAT}"
        for name, recorded in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"`{name}` is missing"
            if file.stat().st_size != recorded["size"]:
                return f"`{name}` has {file.stat().st_size} bytes, not {recorded['size']}"
            if _sha256(file) != recorded["sha256"]:
                return f"`{name}` does not match its hash"
    except FileNotFoundError:
        return "it has no manifest"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"it cannot be read: {error}"
    return None


def prune_checkpoints(folder: Path, *, keep: int, step: int, best_step: int | None = None) -> None:
    """Remove what a run that stands at ``step`` needs no more.

    Args:
        folder: where checkpoints are kept.
        keep: how many of the newest are kept. Those after ``step`` are not among them: the run went
            back behind them because they are damaged.
        step: finished updates.
        best_step: of best weights that no checkpoint names yet; others that none names are removed.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    kept = [path for path in _by_step(folder) if _step_of(path) <= step][:keep]
    named = {
        f"best-{best:08d}" for best in (*map(_best_step_of, kept), best_step) if best is not None
    }
    old = [path for path in _by_step(folder) if path not in kept]
    best = [path for path in folder.glob("best-*") if path.name not in named]
    try:
        for path in (*old, *best):
            # Renamed first: a kill in the middle of the removal leaves no torn one by its name.
            doomed = path.with_name(f".{path.name}.{os.getpid()}.old")
            path.rename(doomed)
            shutil.rmtree(doomed)
    except OSError as error:
        raise CheckpointError(
            f"old checkpoints in `{folder}` could not be removed: {error}",
            hint="make the folder writable, then go on with `--resume`",
        ) from None


def remove_unfinished(folder: Path) -> None:
    """Remove what interrupted saves and removals left; complete replaced ones are put back."""
    for path in folder.glob(".*.old"):
        name = path.name.split(".")[1]
        if not (folder / name).exists() and find_damage(path) is None:
            path.rename(folder / name)
        else:
            shutil.rmtree(path)
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path)


def _by_step(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=_step_of, reverse=True)


def _best_step_of(path: Path) -> int | None:
    """The step of the best weights that a checkpoint names; None where it names none or is torn."""
    try:
        step = json.loads((path / "state.json").read_text(encoding="utf-8"))["best"]["best_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return int(step) if step is not None else None


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flushed_sha256(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Cached folders that are whole or not there, whoever else builds the same one."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fulltune.errors import AssetError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def built_whole(folder: Path) -> Generator[Path]:
    """A temporary folder beside ``folder`` to build in, which then takes its name.

    An error while building leaves nothing behind. Where another process was first, its copy stays.

    Raises:
        AssetError: the disk is full.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield building
        building.chmod(0o755)  # mkdtemp makes it private; a cache may be shared
        try:
            building.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first: its copy is as good
                raise
    except (OSError, SafetensorError) as error:
        # Of safetensors only the text says why: `... (os error 28)`.
        is_full = any(f"os error {number})" in str(error) for number in _FULL)
        if not is_full and getattr(error, "errno", None) not in _FULL:
            raise
        raise AssetError(
            f"`{folder}` cannot be written: the disk is full",
            hint="free some space there, or, for a cache, name another folder as `FULLTUNE_CACHE`",
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)

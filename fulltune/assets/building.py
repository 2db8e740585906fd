"""Cached folders that are whole or not there, whoever else builds the same one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def built_whole(folder: Path) -> Generator[Path]:
    """A temporary folder beside ``folder`` to build in, which then takes its name.

    An error while building leaves nothing behind. Where another process was first, its copy stays.
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
    finally:
        shutil.rmtree(building, ignore_errors=True)
